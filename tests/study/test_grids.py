"""Grids: what the tables and the open questions compare."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from salnb._common import catalog
from salnb.study import grids
from salnb.study.grids import STUDIES, UNCHOSEN, trainings
from salnb.study.scale import STUDY_NAMES, load_scale

ROOT = Path(__file__).resolve().parents[2]
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
        key: (
            *(settings[k] for k in ("augmentation", "alpha", "beta", "gamma")),
            "layer_relative" in settings,
        )
        for key, settings in cells.items()
    }
    for network in ("vgg16_bn", "resnet50"):
        of = {strategy: weights["digit-scenes", network, strategy] for strategy in grids.TABLE3_STRATEGIES}
        assert of == {
            "none": ("identity", 1, 0, 0, False),
            "class+invariance": ("affine", 0.5, 0.5, 0, False),
            "all three": ("affine", 1 / 3, 1 / 3, 1 / 3, False),
            "class+invariance, relative": ("affine", 0.5, 0.5, 0, True),
            "all three, relative": ("affine", 1 / 3, 1 / 3, 1 / 3, True),
        }
    assert len(cells) == 10


def test_the_choice_of_a_weight_has_seeds_of_its_own():
    scale = scale_of(gammas=[0.1, 1], gamma_seeds=[7], networks=["small", "resnet18"])
    found = trainings("gamma", scale, *UNCHOSEN)
    assert [(t.factors["gamma"], t.settings["gamma"]) for t in found] == [("0", 0), ("0.1", 0.1), ("1", 1)]
    assert {(t.settings["seed"], t.settings["model"]) for t in found} == {(7, "small")}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_that_is_stopped_early_is_balanced(study):
    found = trainings(study, scale_of(seeds=[5, 3, 4], gamma_seeds=[9, 8]), *UNCHOSEN)
    seeds = [t.factors["seed"] for t in found]
    order = [9, 8] if study == "gamma" or study.endswith("-tuning") else [5, 3, 4]
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
