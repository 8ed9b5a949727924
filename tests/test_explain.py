"""Maps of photographs: what is drawn, what is written, and what is said of it."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from salnb import explain, models, saliency, trained
from salnb.__main__ import main
from salnb.augment import CutOut, HorizontalFlip
from salnb.losses import normalize_maps, saliency_loss

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
NAMES = ["blue", "dark red", "green"]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return trained.Trained(models.build("small", 3).eval(), "small", NAMES, 32)


@pytest.fixture
def run(tmp_path, network):
    trained.save(tmp_path, network.model, "small", NAMES, 32)
    return tmp_path


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/a.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / name
        )
    return tmp_path / "photos"


def call(run, *arguments):
    return main(["explain", *map(str, arguments), "--model", str(run), "--device", "cpu"])


def test_maps_and_pictures(run, photos, network, capsys, tmp_path):
    out = tmp_path / "maps"
    assert call(run, photos, "--out", out, "--batch-size", "2") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("a-2.npy", "a-2.png", "a.npy", "a.png", "b.npy", "b.png", "scores.json")
    ]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["a-2"]["file"] == str(photos / "more" / "a.png")
    images = network.read(photos / "a.png")
    best = network.model(images).softmax(1)[0]
    assert [one["label"] for one in scores["a"]["top"]] == best.argsort(descending=True).tolist()
    assert scores["a"]["top"][0]["probability"] == pytest.approx(best.max().item(), abs=1e-6)
    assert scores["a"]["target"] == best.argmax()
    expected = saliency.grad_cam(network.model, images)[0, 0].numpy()
    np.testing.assert_allclose(np.load(out / "a.npy"), expected, atol=1e-6)
    with Image.open(out / "a.png") as picture:
        assert picture.size > (300, 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a"
    assert lines[1].split("%")[1].strip() == f"{scores['a']['top'][0]['class']} ({best.argmax()})"
    assert lines[-1] == f"3 of 3 photographs explained, in {out}"


def test_a_class_by_its_name_all_methods_and_the_pair(run, photos, network, tmp_path):
    out = tmp_path / "maps"
    options = ("--target", "red", "--method", "vanilla_gradient", "--all", "--augment", "rotation")
    assert call(run, photos / "b.jpg", "--out", out, *options) == 0
    names = {"b.npy", "b.png", "b-methods.png", "b-rotation.png", "scores.json"}
    assert {path.name for path in out.iterdir()} == names
    expected = saliency.vanilla_gradient(network.model, network.read(photos / "b.jpg"), 1)[0, 0].numpy()
    np.testing.assert_allclose(np.load(out / "b.npy"), expected, atol=1e-6)
    assert json.loads((out / "scores.json").read_text())["b"]["target"] == 1


def test_a_layer_of_a_transformer(photos, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    vit = trained.Trained(models.Normalized(model, [0.5] * 3, [0.5] * 3).eval(), "vit", NAMES, 224)
    options = {"layer": "blocks.11.norm1", "reshape": "tokens"}
    files = {"a": photos / "a.png"}
    explain.explain(vit, files, tmp_path / "maps", method_options=options, log=lambda line: None)
    options["layer"] = "network.blocks.11.norm1"
    expected = saliency.grad_cam(vit.model, vit.read(photos / "a.png"), **options)[0, 0]
    np.testing.assert_allclose(np.load(tmp_path / "maps" / "a.npy"), expected.numpy(), atol=1e-6)


def test_what_cannot_be_read_is_told_and_the_others_are_done(run, photos, capsys, tmp_path):
    (photos / "a.png").write_bytes(b"no image")
    assert call(run, photos, "--out", tmp_path / "maps", "--batch-size", "1") == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"salnb: {photos / 'a.png'} cannot be read (cannot identify")
    assert output.err.count("\n") == 1
    assert output.out.endswith(f"2 of 3 photographs explained, in {tmp_path / 'maps'}\n")


def test_an_unknown_class_is_told_before_anything_is_written(run, photos, capsys, tmp_path):
    assert call(run, photos, "--out", tmp_path / "maps", "--target", "tabby") == 2
    assert "error: target 'tabby' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


def refused(run, capsys, *arguments):
    """The error, of one line, with which everything stays as it was."""
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert call(run, *arguments) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


OWN = {
    "picture.png": (),
    "map.npy": (),
    "cat-methods.png": ("cat.jpg", "--all"),
    "cat-rotation.png": ("cat.jpg", "--augment", "rotation"),
    "scores.json": (),
}


@pytest.mark.parametrize("name", OWN)
def test_a_photograph_is_never_replaced(run, photos, name, capsys, monkeypatch):
    for file in (name, "cat.jpg"):
        shutil.copy(photos / "b.jpg", photos / file)
    monkeypatch.chdir(run)
    others = [photos / one if one.endswith("jpg") else one for one in OWN[name]]
    for out in ("photos", run / "photos" / "more" / ".."):
        error = refused(run, capsys, f"photos/{name}", *others, "--out", out)
        assert error == (
            f"salnb: error: out {out}: {name} would replace the photograph photos/{name}; "
            "name another folder\n"
        )


def test_a_photograph_behind_a_link_is_never_replaced(run, photos, capsys, network):
    (run / "link").symlink_to(photos)
    assert "a.png would replace the photograph" in refused(run, capsys, run / "link/a.png", "--out", photos)
    with pytest.raises(ValueError, match=r"a\.png would replace the photograph"):
        explain.explain(network, {"a": photos / "a.png"}, run / "link")


def test_maps_may_lie_beside_photographs_of_other_names(run, photos):
    content = (photos / "b.jpg").read_bytes()
    assert call(run, photos / "b.jpg", "--out", photos) == 0
    assert (photos / "b.jpg").read_bytes() == content
    assert (photos / "b.png").exists()


def test_where_nothing_can_be_written_is_told_at_once(run, photos, capsys):
    (run / "file").write_text("")
    (run / "maps" / "b.npy").mkdir(parents=True)
    reasons = {"file": "Not a directory", "file/x": "Not a directory", "maps": "Is a directory"}
    for name, reason in reasons.items():
        error = refused(run, capsys, photos, "--out", run / name)
        assert error.endswith(f"out {run / name} cannot be written to: {reason}\n")


@pytest.mark.parametrize("what", ["methods", "rotation"])
def test_two_photographs_never_share_a_picture(run, photos, capsys, what):
    for name in ("cat.png", f"cat-{what}.png"):
        shutil.copy(photos / "a.png", photos / name)
    options = ["--all"] if what == "methods" else ["--augment", "rotation"]
    error = refused(run, capsys, photos, "--out", run / "maps", *options)
    told = f"cat-{what}.png would be of both {photos}/cat-{what}.png and {photos}/cat.png; explain them into"
    assert (
        told in error or f"of both {photos}/cat.png and {photos}/cat-{what}.png; explain them into" in error
    )
    assert not (run / "maps").exists()


def test_out_without_a_name_is_refused(run, photos, capsys):
    assert refused(run, capsys, photos, "--out", "").endswith("out must name a folder, got ''\n")


def test_a_full_disk_is_told_in_a_line(run, photos, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert call(run, photos / "b.jpg", "--out", run / "maps") == 2
    told = f"salnb: error: [Errno 28] No space left on device: '{run / 'maps' / 'b.npy'}'\n"
    assert capsys.readouterr().err.endswith(told)
    assert not list((run / "maps").iterdir())


@pytest.mark.parametrize("augmentation", [HorizontalFlip(1.0), CutOut()], ids=["flip", "cutout"])
def test_what_is_compared(network, augmentation):
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    steps, valid, losses = explain.compared_maps(network, images, labels, augmentation, seed=3)
    params = augmentation.make_params(images, torch.Generator().manual_seed(3))
    new = augmentation.images(images, params)
    maps, new_maps = (saliency.vanilla_gradient(network.model, x, labels) for x in (images, new))
    first, second, where = augmentation.align(maps, new_maps, params)
    a, b = (normalize_maps(m, where, "max") for m in (first, second))
    expected = [new, normalize_maps(maps), normalize_maps(new_maps), b, (a - b).abs()]
    for name, value in zip(steps, expected, strict=True):
        assert torch.equal(steps[name], value), name
    assert torch.equal(valid, where)
    assert losses.mean().item() == pytest.approx(saliency_loss(first, second, where).item(), rel=1e-5)


def test_names_of_classes_are_no_formulas(network, photos, tmp_path):
    network.classes = ["$\\no$", "a$b$", "$$"]
    files = {"a": photos / "a.png"}
    assert not explain.explain(network, files, tmp_path / "out", augment="horizontal_flip")
    assert (tmp_path / "out" / "a-horizontal_flip.png").exists()


def test_a_network_of_other_classes_than_its_description_is_refused(run):
    record = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(record | {"classes": [*NAMES, "another"]}))
    with pytest.raises(ValueError, match="has other classes than the network beside it"):
        trained.load(run)
