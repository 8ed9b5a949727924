"""Scales: the files, every mistake in one, and where they are installed."""

import os
import re
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from salnb import results
from salnb.study import grids
from salnb.study import scale as scales
from salnb.study.grids import STUDIES, UNCHOSEN, trainings
from salnb.study.scale import Scale, load_scale

ROOT = Path(__file__).resolve().parents[2]
SCALES = sorted(path.stem for path in (ROOT / "notebooks" / "scales").glob("*.yml"))
BASE = {"data": ["digit-scenes"], "networks": ["small"], "seeds": [0, 1]}


def scale_of(**changes):
    return load_scale(BASE | changes)


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
    build = pytest.importorskip("hatchling.build")

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


def test_what_yaml_takes_for_something_else_is_as_it_was_meant(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(
        "scale: {data: [cifar10], networks: [small], seeds: [0], training: {precision: 32}, "
        "studies: {table1: {training: {learning_rate: 1e-3}}}}"
    )
    training = load_scale(path).for_study("table1").training
    assert training == {"precision": "32", "learning_rate": 0.001}
