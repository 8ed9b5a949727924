"""Settings: the catalogue is true, and every mistake is answered at once, by name."""

import json
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salnb.__main__ import COMMANDS, main
from salnb._common import catalog
from salnb.train.config import Config

# --- the catalogue against the modules that own the things -------------------------------------------------


def test_catalogue_names_what_there_is():
    from salnb import augment, data, losses, saliency

    assert list(catalog.AUGMENTATIONS) == list(augment.AUGMENTATIONS)
    for name, least in catalog.AUGMENTATIONS.items():
        assert augment.AUGMENTATIONS[name]().least_samples == least
    assert list(catalog.METHODS) == list(saliency.METHODS)
    assert set(catalog.NORMALIZATIONS) == losses.NORMALIZATIONS
    assert set(catalog.DISTANCES) == losses.DISTANCES
    known = {*data.PHOTOGRAPHS, "digit-scenes-shortcut", *data.paper.HUB, "folder"}
    assert {name.removesuffix("-streamed") for name in catalog.DATA} == known


def test_timm_names_are_those_that_timm_lists():
    timm = pytest.importorskip("timm")
    names = timm.list_models()
    for name in names[:: max(1, len(names) // 100)]:
        catalog.network(f"timm:{name}")


# --- mistakes ----------------------------------------------------------------------------------------------

UNKNOWN = [
    ("data", "cifar-10", "cifar10"),
    ("model", "resnet81", "resnet18"),
    ("model", "timm:resnett18", "timm:resnet18"),
    ("augmentation", "afine", "affine"),
    ("method", "gradcam", "grad_cam"),
    ("normalize", "zscor", "zscore"),
    ("distance", "l11", "l1"),
    ("optimizer", "adam", "adamw"),
    ("schedule", "cosin", "cosine"),
    ("precision", "fp61", "fp16"),
]


@pytest.mark.parametrize(("name", "given", "near"), UNKNOWN)
def test_unknown_names_list_the_known_ones(name, given, near):
    expected = rf"^{name} '{given}' is unknown \(did you mean '{near}'\?\); known: "
    with pytest.raises(ValueError, match=expected):
        Config(out="run", **{name: given})


MISTAKES = [
    ({"out": ""}, ValueError, "out must name a folder, got ''"),
    ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    ({"size": 33}, ValueError, "size of digit-scenes must be one of 32, 64, 96, 224, got 33"),
    ({"size": 16, "data": "svhn", "model": "vgg16_bn"}, ValueError, "size must be at least 32 for vgg16_bn, got 16"),
    ({"size": 32.0}, TypeError, "size must be of type int, got 32.0"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    ({"epochs": True}, TypeError, "epochs must be of type int, got True"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"pool": 0}, ValueError, "pool must be at least 1, got 0"),
    ({"pool": 33}, ValueError, "pool must be at most 32, the size of the images, got 33"),
    ({"pool": 2.0}, TypeError, "pool must be of type int, got 2.0"),
    ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
    ({"samples": None}, TypeError, "samples must be of type int, got None"),
    ({"every": 0}, ValueError, "every must be at least 1, got 0"),
    ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
    ({"gamma": -0.5}, ValueError, "gamma must be at least 0, got -0.5"),
    ({"beta": float("nan")}, ValueError, "beta must be a finite number, got nan"),
    ({"alpha": 0, "gamma": 0}, ValueError, "one of alpha, beta and gamma must be positive"),
    ({"alpha": "1"}, TypeError, "alpha must be of type float, got '1'"),
    ({"learning_rate": 0}, ValueError, "learning_rate must be positive, got 0.0"),
    ({"batch_size": 1, "augmentation": "mixup"}, ValueError, "batch_size must be at least 2 for mixup, which mixes"),
    ({"batch_size": 6001}, ValueError, "batch_size must be at most 6000, the number of training images, got 6001"),
    ({"batch_size": 9, "train_images": 8}, ValueError, "batch_size must be at most 8"),
    ({"device": "gpu"}, ValueError, "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
    ({"device": "cpu", "precision": "fp16"}, ValueError, "precision fp16 is for GPUs: with device cpu, take 32 or"),
    ({"method": "grad_cam", "model": "resnet18"}, ValueError, "method grad_cam needs a layer with more than one pixel, "
     "which resnet18 lacks at size 32: take a size of at least 33"),
    ({"layers": ("stage1",)}, ValueError, "layers are for the invariance loss, got stage1 with beta=0"),
    ({"beta": 1, "model": "timm:resnet18"}, ValueError, "layers must be named for beta > 0 with timm:resnet18, got none"),
    ({"layers": (1,), "beta": 1}, TypeError, r"layers must be names of layers, got \(1,\)"),
    ({"layers": "stage1", "beta": 1}, TypeError, "layers must be names of layers, got 'stage1'"),
    ({"layers": None}, TypeError, "layers must be names of layers, got None"),
    ({"out": None}, TypeError, "out must be of type str, got None"),
    ({"out": b"run"}, TypeError, "out must be of type str, got b'run'"),
    ({"out": "a\0b"}, ValueError, r"out must name a folder, got 'a\\x00b'"),
    ({"out": "\ud800"}, ValueError, r"out must name a folder, got '\\ud800'"),
    ({"samples": np.float64(3)}, TypeError, f"samples must be of type int, got {re.escape(repr(np.float64(3)))}"),
    ({"compile": np.True_}, TypeError, f"compile must be of type bool, got {np.True_!r}"),
    ({"detach_original": 1}, TypeError, "detach_original must be of type bool, got 1"),
    ({"train_images": "9"}, TypeError, r"train_images must be of type int | None, got '9'"),
    ({"data": ["svhn"]}, TypeError, r"data must be of type str, got \['svhn'\]"),
    ({"gamma": 10**400}, ValueError, "gamma must be a finite number, got inf"),
    ({"save_minutes": float("nan")}, ValueError, "save_minutes must be a finite number, got nan"),
    ({"size": [10**5000]}, TypeError, "size must be of type int, got a value of type list"),
    ({"seed": 2**64}, ValueError, r"seed must be less than 2\*\*64, got a number of 65 bits"),
    ({"epochs": 10**5000}, ValueError, r"epochs must be less than 2\*\*64, got a number of 16610 bits"),
    ({"swap": True}, ValueError, "swap is for digit-scenes-shortcut, got data digit-scenes"),
    ({"right_reasons": True, "data": "svhn"}, ValueError, r"right_reasons is a saliency loss, .*, got gamma=1.0 with svhn"),
    ({"right_reasons": True, "gamma": 0}, ValueError, r"right_reasons is a saliency loss, .*, got gamma=0.0 with digit"),
    ({"originals_only": True, "confidence": 0.9}, ValueError, "originals_only and confidence do not go together"),
    ({"device": "cuda:01"}, ValueError, "device must be auto, cpu, cuda, cuda:N or mps, got 'cuda:01'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_answered_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        Config(**{"out": "run"} | changes)


def test_grad_cam_needs_no_layer_where_the_saliency_loss_has_no_weight():
    Config(out="run", method="grad_cam", model="resnet18", gamma=0)


def test_layers_come_with_the_network():
    assert Config(out="run", model="resnet18", beta=1).compared_layers == tuple(
        f"network.layer{i}" for i in (1, 2, 3, 4)
    )
    assert Config(out="run").compared_layers == ()
    assert Config(out="run", beta=1, layers=["a"]).compared_layers == ("a",)


def test_numbers_are_one_configuration_however_they_are_written():
    assert Config(out="run", gamma=1).to_dict() == Config(out="run", gamma=1.0).to_dict()
    assert type(Config(out="run", gamma=1).gamma) is float
    numbers = {
        "gamma": np.float32(0.5),
        "seed": np.int64(7),
        "train_images": np.uint16(99),
        "weight_decay": 0,
    }
    config = Config(out=Path("run"), layers=["a"], beta=Fraction(1, 4), **numbers)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    plain = {"gamma": 0.5, "seed": 7, "train_images": 99, "weight_decay": 0.0}
    assert config == Config(out="run", layers=("a",), beta=0.25, **plain)


FIELDS = get_type_hints(Config)
WORDS = sorted(
    {*catalog.DATA, *catalog.NETWORKS, *catalog.AUGMENTATIONS, *catalog.METHODS, *catalog.PRECISIONS, "cpu"}
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [10**400, -(10**5000), 2**63, -0.0, 1j, b"cpu", Fraction(1, 3), Decimal(1), Path("x"), object(), int]
    ),
    st.sampled_from(
        [
            np.int8(3),
            np.uint64(2**64 - 1),
            np.float16(0.5),
            np.float64("nan"),
            np.True_,
            np.array(3),
            np.str_("cpu"),
        ]
    ),
    st.text(st.characters(), max_size=4).filter(lambda text: not text.startswith("timm:")),
    st.sampled_from(WORDS),
    st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, max_size=3))
def test_any_value_makes_a_sound_configuration_or_is_answered_by_name(changes):
    config = None
    try:
        config = Config(**{"out": "run"} | changes)
    except (TypeError, ValueError) as error:
        answer = str(error)
    if config is None:
        named = rf"(one of )?({'|'.join(FIELDS)})\b.*\b(got|known: |for GPUs|lacks)"
        assert re.match(named, answer, re.DOTALL), answer
    else:
        for name, kind in FIELDS.items():
            kind = {tuple[str, ...]: tuple, int | None: (int, type(None))}.get(kind, kind)
            value = getattr(config, name)
            assert isinstance(value, kind), name
            assert kind is bool or not isinstance(value, bool), name
        assert Config(**json.loads(json.dumps(config.to_dict()))) == config


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert COMMANDS[command].help in capsys.readouterr().out


def test_every_setting_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name in Config(out="run").to_dict():
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "OUT", "--model", "resnet81"], "did you mean 'resnet18'"),
        (["train", "--out", "OUT", "--model", "timm:resnett18"], "did you mean 'timm:resnet18'"),
        (["train", "--out", "OUT", "--size", "100"], "size of digit-scenes must be one of"),
        (["train", "--out", "OUT", "--augmentation", "cutmix", "--batch-size", "1"], "which mixes images"),
        (["train", "--out", "OUT", "--model", "densenet121", "--method", "grad_cam"], "needs a layer"),
        (["train", "--out", "HELD"], "holds a run of other settings"),
        (["train", "--out", "DAMAGED"], r"holds a config\.json that is not of a run"),
        (["train", "--out", "OUT/" + "x" * 300], "cannot be written to: File name too long"),
        (["train", "--out", "OUT", "--save-minutes", "nan"], "save_minutes must be a finite number, got nan"),
        (["train", "--out", "OUT", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["train", "--out", "OUT", "--pool", "64"], "pool must be at most 32, the size of the images"),
        (["study", "tabel1", "--out", "OUT"], "study 'tabel1' is unknown .did you mean 'table1'"),
        (["study", "table1", "--out", "OUT", "--scale", "labtop"], "did you mean 'laptop'"),
        (["study", "table1", "--out", "OUT", "--scale", "SCALE"], "size must be of type int, got '32'"),
        (["study", "table1", "--out", "OUT", "--on", "rai"], "on 'rai' is unknown .did you mean 'ray'"),
        (["study", "table1", "--out", "OUT", "--on", "ray", "--share", "0"], "share must be positive, got 0"),
        (["study", "table1", "--out", "OUT", "--device", "gpu"], "device must be auto, cpu, cuda"),
        (
            ["study", "table1", "--out", "OUT", "--scale", "colab", "--device", "cpu"],
            "precision fp16 is for GPUs",
        ),
        (["data", "imagnet"], "did you mean 'imagenet'"),
        (["data", "digit-scenes", "--size", "5"], "size of digit-scenes must be one of"),
        (["data", "digit-scenes", "--size", "0"], "size of digit-scenes must be one of .*, got 0"),
        (["data", "svhn", "--size", "32"], "size is for digit-scenes, got 32 with svhn"),
        (["data", "folder"], "data folder is one's own"),
        (["train", "--out", "OUT", "--data", "folder"], "data_dir and data folder go together, got None"),
        (["train", "--out", "OUT", "--data-dir", "x"], "go together, got 'x' with 'digit-scenes'"),
        (
            ["train", "--out", "OUT", "--data", "folder", "--data-dir", "x"],
            "data_dir must be a folder .* got x",
        ),
        (["train", "--out", "OUT", "--weights", "x.pt"], "weights must be DEFAULT, a file or .* got 'x.pt'"),
        (["train", "--out", "OUT", "--config", "x.yml"], "config x.yml cannot be read: No such file"),
        (
            ["train", "--out", "OUT", "--config", "DAMAGED/config.json"],
            r"config .* cannot be read: .* line 1",
        ),
        (["train", "--out", "OUT", "--config", "SCALE"], r"config .*: 'scale' is unknown"),
        (["evaluate", "OUT"], "out is no finished run: it has no model.json"),
        (["explain", "x.jpg", "--out", "OUT"], "no photograph x.jpg"),
        (["explain", "DAMAGED", "--out", "OUT"], "no photograph in the folder .*damaged"),
        (["explain", "SCALE", "--out", "OUT", "--method", "gradcam"], "did you mean 'grad_cam'"),
        (["explain", "SCALE", "--out", "OUT", "--augment", "mixup"], "augment 'mixup' is unknown"),
        (["explain", "SCALE", "--out", "OUT", "--model", "OUT"], "model must be a finished run, torchvision"),
        (["explain", "SCALE", "--out", "OUT", "--model", "timm:resnett18"], "did you mean 'timm:resnet18'"),
        (["explain", "SCALE", "--out", "OUT", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (
            ["explain", "SCALE", "--out", "OUT", "--layer", "a", "--method", "smoothgrad"],
            "layer: for the methods with Grad-CAM, got smoothgrad",
        ),
        (["plot", "OUT", "--out", "x.png"], "out is no run with an epoch behind it .*No such file"),
        (["plot", "OUT", "--out", "x.pdf"], "out must be a file whose name ends in .png, got x.pdf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_a_line_without_loading_torch(tmp_path, held, arguments, message):
    scale = tmp_path / "scale.yml"
    scale.write_text("scale: {data: [digit-scenes], networks: [small], seeds: [0], training: {size: '32'}}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for word in ("out", "held", "scale", "damaged"):
        path = {"held": held, "scale": scale}.get(word, tmp_path / word)
        arguments = [re.sub(rf"^{word.upper()}\b", str(path), argument) for argument in arguments]
    program = (
        "import sys; from salnb.__main__ import main; status = main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'datasets'} & set(sys.modules))); sys.exit(status)"
    )
    answer = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stdout == "[]\n"
    assert answer.stderr.startswith("salnb: error: ")
    assert answer.stderr.count("\n") == 1
    assert re.search(message, answer.stderr)
    assert not (tmp_path / "out").exists()


def test_the_module_answers_as_the_command_does():
    """Started as ``python -m salnb`` its name is another, and its errors are answers all the same."""
    answer = subprocess.run(
        [sys.executable, "-m", "salnb", "data", "imagnet"], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("salnb: error: data 'imagnet' is unknown (did you mean 'imagenet'?)")


def test_what_is_not_explained_shows_its_traceback(tmp_path, monkeypatch):
    """An error of a library is a bug here, not an answer."""

    def broken(args):
        json.loads("{")

    monkeypatch.setitem(COMMANDS, "data", COMMANDS["data"]._replace(run=broken))
    with pytest.raises(json.JSONDecodeError):
        main(["data", "svhn"])


def test_ctrl_c_is_answered_in_a_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "data", COMMANDS["data"]._replace(run=interrupted))
    assert main(["data", "svhn"]) == 130
    assert capsys.readouterr().err == "salnb: stopped by Ctrl-C\n"


def test_unknown_commands_and_options():
    for arguments in (["trian"], ["train"], ["train", "--out", "x", "--gama", "1"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
