"""Grids: what the tables compare, the scales, and every mistake in a scale file."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from salnb import results
from salnb._common import catalog
from salnb.study import grids
from salnb.study import scale as scales
from salnb.study.grids import STUDIES, UNCHOSEN, trainings
from salnb.study.scale import STUDY_NAMES, Scale, load_scale

ROOT = Path(__file__).resolve().parents[2]
SCALES = sorted(path.stem for path in (ROOT / "notebooks" / "scales").glob("*.yml"))
BASE = {"data": ["digit-scenes"], "networks": ["small"], "seeds": [0, 1]}


def scale_of(**changes):
    return load_scale(BASE | changes)


def by_cell(found):
    """The settings of trainings, by their factors without the seed; the seeds' must be alike."""
    cells = {}
    for training in found:
        factors = tuple((k, v) for k, v in training.factors.items() if k != "seed")
        settings = {k: v for k, v in training.settings.items() if k != "seed"}
        assert cells.setdefault(factors, settings) == settings
        assert training.factors["seed"] == training.settings["seed"]
    return {tuple(v for _, v in factors): settings for factors, settings in cells.items()}


def differences(settings, other):
    return {k: settings.get(k) for k in settings.keys() | other.keys() if settings.get(k) != other.get(k)}


# --- the scale files ---------------------------------------------------------------------------------------


def test_the_scales_that_are_promised_are_there():
    assert {"smoke", "laptop", "laptop-strong", "gpu", "colab", "paper"} == set(SCALES)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_file_sets_the_one_parameter_of_the_chapters(name):
    values = yaml.safe_load((ROOT / "notebooks" / "scales" / f"{name}.yml").read_text())
    assert list(values) == ["scale"]
    # a chapter is given the mapping, the command the name
    given, named = load_scale(values["scale"]), load_scale(name)
    assert given.to_dict() == named.to_dict()
    assert (given.name, named.name) == ("given", name)


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("name", SCALES)
def test_every_scale_plans_every_study(name, study):
    found = trainings(study, load_scale(name), *UNCHOSEN)
    names, folders = Counter(t.name for t in found), Counter(t.config("runs").out for t in found)
    assert set(names.values()) == set(folders.values()) == {1}
    assert all(re.fullmatch(r"[\w.=+-]+", name) for name in names)
    factor, reference, _ = grids.REFERENCES[study]
    assert reference in {t.factors[factor] for t in found}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_chooses_one_weight_for_each_data_set(name):
    """All studies of a folder share the trainings that the weight is chosen from."""
    from salnb.study.runner import _choice

    shared = {}
    for study in ("table1", "table2", "open"):
        for training in trainings("gamma", _choice(load_scale(name), study), *UNCHOSEN):
            assert shared.setdefault(training.name, training.settings) == training.settings


def test_a_study_has_a_scale_of_its_own():
    scale = scale_of(
        training={"size": 64, "epochs": 2},
        studies={"table2": {"networks": ["resnet18"], "training": {"epochs": 5}}},
    )
    assert scale.for_study("table1").to_dict() == scale.to_dict() | {"studies": {}}
    assert scale.for_study("table2").networks == ("resnet18",)
    assert scale.for_study("table2").training == {"size": 64, "epochs": 5}
    assert scale.for_study("table2").seeds == scale.seeds
    assert {t.settings["model"] for t in trainings("table2", scale, *UNCHOSEN)} == {"resnet18"}
    assert {t.settings["model"] for t in trainings("table1", scale, *UNCHOSEN)} == {"small"}


def test_settings_for_all_trainings_hold_in_every_study():
    scale = scale_of(studies={"table2": {"training": {"device": "cuda"}}, "open": {"seeds": [3]}})
    changed = scale.with_training(device="cpu")
    for study in STUDIES:
        assert {t.settings["device"] for t in trainings(study, changed, *UNCHOSEN)} == {"cpu"}
    assert changed.for_study("open").seeds == (3,)
    assert scale.training == {}


def test_a_scale_from_a_file(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump({"scale": BASE}))
    assert load_scale(path) == load_scale(str(path)) == Scale(name="mine", **BASE)


MISTAKES = [
    ({"sedes": [0]}, ValueError, r"key of scale 'given' 'sedes' is unknown \(did you mean 'seeds'\?\)"),
    ({"training": {"epoch": 1}}, ValueError, r"training of scale 'given': setting 'epoch' is unknown \(did you mean 'epochs'\?\)"),
    ({"studies": {"tabel1": {}}}, ValueError, r"studies of scale 'given': study 'tabel1' is unknown \(did you mean 'table1'\?\)"),
    ({"studies": {"table1": {"network": ["small"]}}}, ValueError, r"'network' is unknown \(did you mean 'networks'\?\)"),
    ({"studies": {"table1": {"training": {"modle": "small"}}}}, ValueError, r"setting 'modle' is unknown \(did you mean 'model'\?\)"),
    ({"studies": {"table1": {"studies": {}}}}, ValueError, "table1 of scale 'given' must not have studies of its own"),
    ({"studies": {"table1": [1]}}, TypeError, r"table1 of scale 'given' must be a mapping, got \[1\]"),
    ({"studies": {"table1": {"training": 3}}}, TypeError, "training of table1 of scale 'given' must be a mapping, got 3"),
    ({"studies": None}, TypeError, "studies of scale 'given' must be a mapping, got None"),
    ({"training": None}, TypeError, "training of scale 'given' must be a mapping, got None"),
    ({"data": ["cifar-10"]}, ValueError, r"data of scale 'given': 'cifar-10' is unknown \(did you mean 'cifar10'\?\)"),
    ({"data": "digit-scenes"}, TypeError, "data of scale 'given' must be a list, not empty, got 'digit-scenes'"),
    ({"seeds": []}, TypeError, r"seeds of scale 'given' must be a list, not empty, got \[\]"),
    ({"seeds": 3}, TypeError, "seeds of scale 'given' must be a list, not empty, got 3"),
    ({"seeds": [0, 1, 0]}, ValueError, r"seeds of scale 'given' must not name anything twice, got \[0, 1, 0\]"),
    ({"seeds": [1, 2], "gamma_seeds": [2, 3]}, ValueError, r"gamma_seeds of scale 'given' must not be among seeds, got \[2\]"),
    ({"studies": {"open": {"seeds": [1000]}}}, ValueError, r"gamma_seeds of scale 'given' must not be among seeds, got \[1000\]"),
    ({"gammas": [0, 1]}, ValueError, r"gammas of scale 'given' must be positive numbers, got \(0, 1\)"),
    ({"gammas": ["1e-1"]}, ValueError, "gammas of scale 'given' must be positive numbers"),
    ({"gammas": [float("nan")]}, ValueError, r"gammas of scale 'given' must be positive numbers, got \(nan,\)"),
    ({"gammas": [float("inf")]}, ValueError, r"gammas of scale 'given' must be positive numbers, got \(inf,\)"),
    ({"gammas": [True]}, ValueError, r"gammas of scale 'given' must be positive numbers, got \(True,\)"),
    ({"gammas": [1, 1.0]}, ValueError, r"gammas of scale 'given' must not name anything twice, got \[1, 1.0\]"),
    ({"gammas": [0.1, 0.10000001]}, ValueError, "gammas of scale 'given' must not name anything twice"),
    ({"seeds": ["0", "1"]}, TypeError, r"seeds of scale 'given' must be whole numbers, got \('0', '1'\)"),
    ({"seeds": [0.5]}, TypeError, r"seeds of scale 'given' must be whole numbers, got \(0.5,\)"),
    ({"gamma_seeds": [True]}, TypeError, r"gamma_seeds of scale 'given' must be whole numbers, got \(True,\)"),
    ({"seeds": b"01"}, TypeError, "seeds of scale 'given' must be a list, not empty, got b'01'"),
    ({"data": [["cifar10"]]}, ValueError, r"data of scale 'given': \['cifar10'\] is unknown"),
    ({"data": {"cifar10": 1}}, TypeError, "data of scale 'given' must be a list, not empty, got {'cifar10': 1}"),
    ({"training": {"seed": 3}}, ValueError, "training of scale 'given' must leave seed to the studies"),
    ({"training": {"out": "a", "gamma": 1}}, ValueError, "training of scale 'given' must leave gamma, out to the"),
    ({"studies": {"open": {"training": {"model": "small"}}}}, ValueError, "must leave model to the studies"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES, ids=[str(m[0]) for m in MISTAKES])
def test_mistakes_in_a_scale_are_answered_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        scale_of(**changes)


def test_what_a_scale_lacks_is_named():
    with pytest.raises(ValueError, match="scale 'given' lacks data, seeds"):
        load_scale({"networks": ["small"]})
    with pytest.raises(ValueError, match="key of scale 'given' 3 is unknown"):
        load_scale(BASE | {3: 1})
    with pytest.raises(ValueError, match=r"scale 'labtop' is unknown \(did you mean 'laptop'\?\)"):
        load_scale("labtop")


NO_SCALES = [
    b"seeds: [0]", b"- 1", b"", b"scale: [", b"\xff\xfe\x00", b"scale: caf\xe9", b"3", b"scale",
    b"scale: {seeds: !!int x}", b"scale: {seeds: 2020-13-45}", b"? [1]\n: 2", b"scale: !!python/object:os.x y",
]  # fmt: skip


@pytest.mark.parametrize("content", NO_SCALES, ids=repr)
def test_what_is_no_scale_file_is_named(tmp_path, content):
    path = tmp_path / "mine.yml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"scale {path} is no file with a mapping named scale") as refused:
        load_scale(path)
    assert "\n" not in str(refused.value)
    path.write_text("scale: 3")
    with pytest.raises(TypeError, match="scale 'mine' must be a mapping, got 3"):
        load_scale(path)
    with pytest.raises(ValueError, match="is no file with a mapping"):
        load_scale(tmp_path / "missing.yml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": ["resnet81"]}, "model 'resnet81' is unknown"),
        ({"training": {"size": 33}}, "size of digit-scenes must be one of"),
        ({"training": {"size": "32"}}, "size must be of type int, got '32'"),
        ({"seeds": [-1]}, "seed must be at least 0, got -1"),
        ({"networks": ["resnet18"], "variants": ["grad_cam"]}, "method grad_cam needs a layer"),
        ({"training": {"alpha": float("nan")}}, "alpha must be a finite number, got nan"),
        (
            {"training": {"layers": None}},
            "training of scale 'given': layers must be names of layers, got None",
        ),
        ({"training": {"layers": "stage1"}}, "layers must be names of layers, got 'stage1'"),
        ({"networks": [3]}, "training of scale 'given': model must be of type str, got 3"),
        ({"variants": [3]}, "variants of scale 'given': variant 3 is unknown"),
        ({"data": ["svhn"]}, "train_images must be given in the study of open questions for svhn"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_training_could_do_is_found_when_it_is_planned(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trainings("open", scale_of(**changes), *UNCHOSEN)


# --- the tables --------------------------------------------------------------------------------------------


def test_every_study_has_its_name_and_what_it_is_compared_with():
    assert tuple(STUDIES) == tuple(grids.REFERENCES) == STUDY_NAMES


def test_table1_has_every_augmentation_with_and_without_the_term_and_nothing_else_changed():
    assert grids.TABLE1_AUGMENTATIONS == (
        "horizontal_flip", "vertical_flip", "rescale", "contrast", "rotation", "combined", "mixup", "cutout", "augmix",
    )  # fmt: skip
    assert set(grids.TABLE1_AUGMENTATIONS) <= set(catalog.AUGMENTATIONS)
    scale = scale_of(data=["digit-scenes", "cifar10"], training={"epochs": 2, "size": 32})
    found = trainings("table1", scale, {"digit-scenes": 0.5, "cifar10": 3.0}, UNCHOSEN[1])
    assert len(found) == 2 * len(grids.TABLE1_AUGMENTATIONS) * 2 * 2
    cells = by_cell(found)
    for data, augmentation in itertools.product(scale.data, grids.TABLE1_AUGMENTATIONS):
        without, with_it = (
            cells[data, "small", augmentation, strategy] for strategy in ("reference", "saliency")
        )
        assert differences(with_it, without) == {"gamma": {"digit-scenes": 0.5, "cifar10": 3.0}[data]}
        assert without == {
            "data": data, "model": "small", "augmentation": augmentation, "gamma": 0.0, "epochs": 2, "size": 32,
        }  # fmt: skip


def test_table2_pairs_each_network_on_each_data_set():
    scale = scale_of(data=["cifar10", "cifar100"], networks=["densenet121", "resnet18"])
    cells = by_cell(trainings("table2", scale, *UNCHOSEN))
    assert set(cells) == set(
        itertools.product(scale.data, scale.networks, ["simclr"], ["reference", "saliency"])
    )
    for data, network in itertools.product(scale.data, scale.networks):
        pair = [cells[data, network, "simclr", strategy] for strategy in ("saliency", "reference")]
        assert differences(*pair) == {"gamma": 1.0}


def test_table3_has_the_papers_weights():
    cells = by_cell(trainings("table3", scale_of(networks=["vgg16_bn", "resnet50"]), *UNCHOSEN))
    weights = {
        key: tuple(settings[name] for name in ("augmentation", "alpha", "beta", "gamma"))
        for key, settings in cells.items()
    }
    for network in ("vgg16_bn", "resnet50"):
        of = {strategy: weights["digit-scenes", network, strategy] for strategy in grids.TABLE3_STRATEGIES}
        assert of == {
            "none": ("identity", 1, 0, 0),
            "class+invariance": ("affine", 0.5, 0.5, 0),
            "all three": ("affine", 1 / 3, 1 / 3, 1 / 3),
        }
    assert len(cells) == 6


def test_the_choice_of_a_weight_has_seeds_of_its_own():
    scale = scale_of(gammas=[0.1, 1], gamma_seeds=[7], networks=["small", "resnet18"])
    found = trainings("gamma", scale, *UNCHOSEN)
    assert [(t.factors["gamma"], t.settings["gamma"]) for t in found] == [("0", 0), ("0.1", 0.1), ("1", 1)]
    assert {(t.settings["seed"], t.settings["model"]) for t in found} == {(7, "small")}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_that_is_stopped_early_is_balanced(study):
    found = trainings(study, scale_of(seeds=[5, 3, 4], gamma_seeds=[9, 8]), *UNCHOSEN)
    seeds = [t.factors["seed"] for t in found]
    order = [9, 8] if study == "gamma" else [5, 3, 4]
    assert seeds == [seed for seed in order for _ in range(len(found) // len(order))]


# --- open questions ----------------------------------------------------------------------------------------

# factor of the variant: the settings that it may touch, besides the weight
TOUCHED = {
    "gamma": set(),
    "normalize": {"normalize"},
    "distance": {"distance"},
    "pool": {"pool"},
    "warmup": {"warmup"},
    "every": {"every"},
    "originals": {"detach_original"},
    "method": {"method", "samples"},
}


def test_open_questions_change_one_factor_at_a_time():
    asked = []

    def match(settings, changed):
        asked.append(differences(changed, settings))
        assert settings["gamma"] == changed["gamma"] == 2.0
        return 7.0

    scale = scale_of(training={"epochs": 3, "batch_size": 50})
    cells = by_cell(trainings("open", scale, {"digit-scenes": 2.0}, match))
    default = cells["digit-scenes", "all images", "default"]
    assert differences(cells["digit-scenes", "all images", "reference"], default) == {"gamma": 0.0}
    assert default["gamma"] == 2.0
    kinds = {}
    for (_, images, variant), settings in cells.items():
        if images != "all images" or variant in ("default", "reference"):
            continue
        changed = differences(settings, default)
        kind = re.split("[ =]", variant)[0]
        kind = "method" if kind in catalog.METHODS else kind
        kinds.setdefault(kind, []).append(variant)
        assert changed.keys() - {"gamma"} <= TOUCHED[kind], variant
        if kind in ("normalize", "distance", "pool", "method"):  # each with a unit of its own
            assert changed["gamma"] == 7.0, variant
            assert {k: v for k, v in changed.items() if k != "gamma"} in asked
        elif kind != "gamma":
            assert "gamma" not in changed, variant
    assert kinds == {
        "gamma": ["gamma × 0.1", "gamma × 0.3", "gamma × 3", "gamma × 10", "gamma × 100"],
        "normalize": ["normalize=zscore", "normalize=l2", "normalize=sum", "normalize=none"],
        "distance": ["distance=l1", "distance=cosine"],
        "pool": ["pool=2", "pool=4"],
        "warmup": ["warmup 25%", "warmup 50%"],
        "every": ["every=2", "every=4"],
        "originals": ["originals fixed"],
        "method": ["deconvnet", "guided_backprop", "smoothgrad", "grad_cam", "guided_grad_cam"],
    }
    assert tuple(kinds["method"]) == grids.OPEN_METHODS
    # each is matched once, and not once for each seed
    assert len(asked) == sum(len(kinds[kind]) for kind in ("normalize", "distance", "pool", "method"))
    steps = 3 * (6000 // 50)
    assert cells["digit-scenes", "all images", "warmup 25%"]["warmup"] == steps // 4
    assert cells["digit-scenes", "all images", "gamma × 0.3"]["gamma"] == pytest.approx(0.6)


def test_a_scale_may_name_what_of_the_open_questions_is_tried():
    few = scale_of(variants=["pool=2", "1 in 10"])
    found = {(t.factors["images"], t.factors["variant"]) for t in trainings("open", few, *UNCHOSEN)}
    both = {(images, v) for images in ("all images", "1 in 10") for v in ("reference", "default")}
    assert found == both | {("all images", "pool=2")}
    with pytest.raises(ValueError, match=r"variant 'pool=3' is unknown \(did you mean 'pool=\d'\?\)"):
        trainings("open", scale_of(variants=["pool=3"]), *UNCHOSEN)


def test_fewer_images_are_seen_as_often():
    cells = by_cell(trainings("open", scale_of(training={"epochs": 3, "batch_size": 50}), *UNCHOSEN))
    for part in (4, 10):
        for variant in ("reference", "default"):
            settings = cells["digit-scenes", f"1 in {part}", variant]
            assert settings["train_images"] == 6000 // part
            assert settings["epochs"] * (settings["train_images"] // 50) == 3 * (6000 // 50)
    # where a batch would not be full, the question is not asked
    few = by_cell(
        trainings("open", scale_of(training={"train_images": 200, "batch_size": 50, "size": 32}), *UNCHOSEN)
    )
    assert {images for _, images, _ in few} == {"all images", "1 in 4"}


def test_what_is_the_default_is_no_variant():
    cells = by_cell(trainings("open", scale_of(training={"normalize": "zscore", "pool": 2}), *UNCHOSEN))
    variants = {variant for _, _, variant in cells}
    assert {"normalize=zscore", "pool=2"}.isdisjoint(variants)
    assert {"normalize=l2", "pool=4"} <= variants


def test_equal_settings_share_a_run_and_practical_ones_do_not_part_them():
    scale = scale_of(networks=["small"], training={"epochs": 2})
    reference, saliency = trainings("table2", scale, *UNCHOSEN)[:2]
    again = trainings("table2", scale.with_training(device="cpu", save_minutes=1, workers=0), *UNCHOSEN)[0]
    assert reference.config("runs").out == again.config("runs").out
    assert reference.config("runs").out != saliency.config("runs").out
    # however they are written
    written = reference._replace(settings=reference.settings | {"gamma": 0, "alpha": 1, "pool": 1})
    assert written.config("runs").out == reference.config("runs").out
    assert Path(reference.config("runs").out).parent == Path("runs")


def test_planning_needs_no_torch():
    program = (
        "import sys; from salnb import study; from salnb.study.grids import UNCHOSEN;"
        "study.trainings('open', study.load_scale('laptop'), *UNCHOSEN);"
        "print(sorted({'torch', 'numpy', 'scipy', 'tqdm'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout == "[]\n", answer.stderr


# --- the installed package ---------------------------------------------------------------------------------


def test_scales_and_records_are_installed_where_they_are_looked_for(tmp_path, monkeypatch):
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    installed = targets["wheel"]["force-include"]
    assert installed == {"notebooks/scales": "salnb/scales", "results": "salnb/records"}
    assert all((ROOT / source).is_dir() for source in installed)  # or nothing can be installed
    assert scales._folder() == ROOT / "notebooks" / "scales"
    assert results.published() == ROOT / "results"
    # as the wheel lays them out
    for source, target in installed.items():
        (tmp_path / target).mkdir(parents=True)
        for path in (ROOT / source).glob("*.yml"):
            (tmp_path / target / path.name).write_bytes(path.read_bytes())
    for module, where in ((scales, "salnb/study"), (results, "salnb")):
        monkeypatch.setattr(module, "__file__", str(tmp_path / where / "module.py"))
    assert scales._folder() == tmp_path / "salnb" / "scales"
    assert load_scale("smoke").data == ("digit-scenes",)
    assert results.published() == tmp_path / "salnb" / "records"


def test_a_built_wheel_holds_scales_and_records(tmp_path):
    from hatchling import build

    here = os.getcwd()
    os.chdir(ROOT)
    try:
        name = build.build_wheel(str(tmp_path))
    finally:
        os.chdir(here)
    names = zipfile.ZipFile(tmp_path / name).namelist()
    assert {f"salnb/scales/{scale}.yml" for scale in SCALES} <= set(names)
    assert any(name.startswith("salnb/records/") for name in names)
    assert "salnb/py.typed" in names  # a type checker takes the package's annotations into account
