"""Folders of images that are not what they seem: masks, names of splits, records, and what does not fit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from salnb import data, models, trained
from salnb._common.files import DamagedFileError

PATHS = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(12)]


def put(root, paths, values):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values()).save(root / path)


@pytest.fixture
def root(tmp_path):
    random = np.random.default_rng(0)
    put(tmp_path / "photos", PATHS, lambda: random.integers(256, size=(20, 30, 3), dtype=np.uint8))
    return tmp_path / "photos"


def mask(height=20, width=30, white=255, channels=()):
    values = np.zeros((height, width, *channels), dtype=np.uint8)
    values[: height // 2, ..., :1] = white
    if not channels:
        values[: height // 2] = white
    return values


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (mask(white=1), "a mask is white, 255, where the object is, this one 1 at most"),
        (mask(channels=(3,)), "this one has colours"),
        (mask(height=30, width=20), "it has 20 × 30 pixels, which is another shape than 30 × 20"),
    ],
)
def test_what_is_no_mask_is_told_before_a_training(root, values, why):
    put(root / "masks", PATHS, lambda: values)
    with pytest.raises(DamagedFileError, match=rf"4 masks cannot be used: masks/cat/\d+.png .*{why}"):
        data.image_folder(root, 8, workers=0)


def with_alpha(alpha, mode):
    """A mask with an alpha channel, and what each mode makes of it."""
    image = Image.merge("RGBA", [Image.fromarray(mask())] * 3 + [Image.fromarray(alpha)])
    if mode != "P":
        return image.convert(mode)
    palette = Image.fromarray(mask() // 255, "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.info["transparency"] = bytes([int(alpha.min()), 255])
    return palette


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("alpha", [0, 254, 255])
def test_a_transparent_mask_is_told_before_a_training(root, mode, alpha):
    """The object may be what is opaque or what is cut out; on white, all of it would be."""
    image = with_alpha(np.where(mask() == 0, alpha, 255).astype(np.uint8), mode)
    for path in PATHS:
        (root / "masks" / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / "masks" / path)
    if alpha < 255:
        with pytest.raises(DamagedFileError, match=r"4 masks .* transparent in places: save it without"):
            data.image_folder(root, 8, workers=0)
    else:
        (batch,) = data.image_folder(root, 8, workers=0).test.epoch(4)
        assert batch.masks.float().mean() == pytest.approx(0.5, abs=0.13)


def test_a_damaged_mask_is_told_before_a_training(root):
    put(root / "masks", PATHS, mask)
    for path in PATHS:
        (root / "masks" / path).write_bytes(b"")
    with pytest.raises(DamagedFileError, match="4 masks cannot be used"):
        data.image_folder(root, 8, workers=0)


@pytest.mark.parametrize(
    "values", [mask(), mask(white=0), mask(height=40, width=60), mask(height=41, width=61)]
)
def test_masks_that_are_empty_or_of_another_resolution(root, values):
    put(root / "masks", PATHS, lambda: values)
    (batch,) = data.image_folder(root, 8, workers=0).test.epoch(4)
    assert batch.masks.float().mean() == pytest.approx(0.5 * bool(values.any()), abs=0.13)


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("train", "Val"), ("training", "testing"), ("train", "TEST")]
)
def test_folders_that_are_named_almost_like_splits_are_no_classes(root, tmp_path, names):
    (tmp_path / "whole").mkdir()
    for name in names:
        root.rename(tmp_path / "whole" / name)
        put(root, PATHS[:1], mask)
    with pytest.raises(ValueError, match="folders of splits are named train, val and test, got"):
        data.image_folder(tmp_path / "whole", 8, workers=0)


def test_a_split_has_one_folder(root, tmp_path):
    for name in ("train", "val", "validation"):
        put(tmp_path / "whole" / name, PATHS, mask)
    with pytest.raises(ValueError, match="has val and validation, which are one split"):
        data.image_folder(tmp_path / "whole", 8, workers=0)


def test_a_class_may_be_named_like_a_split_in_capitals(root):
    (root / "dog").rename(root / "Train")
    assert data.image_folder(root, 8, workers=0).classes == ["Train", "cat"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"classes": None}, "it must have classes and splits"),
        ({"splits": []}, "it must have classes and splits"),
        ({"splits": {"train": PATHS, "validation": PATHS}}, "test must be a list of paths"),
        ({"classes": ["car", "dog"]}, "in train are images of no class of the record: cat/"),
    ],
)
def test_a_damaged_record_of_a_split_is_told(root, tmp_path, change, why):
    data.image_folder(root, 8, workers=0, record=tmp_path / "split.json")
    kept = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps(kept | change))
    with pytest.raises(ValueError, match=rf"split\.json.*: .*{why}"):
        data.image_folder(root, 8, workers=0, record=tmp_path / "split.json")


def test_images_and_labels_are_as_many():
    with pytest.raises(ValueError, match="must be as many, got 10 images, 3 labels"):
        data.Arrays(torch.zeros(10, 3, 4, 4), torch.arange(3))


@pytest.mark.parametrize("seed", [2**70, float("nan"), "1"])
def test_seeds_of_a_pass(seed):
    arrays = data.Arrays(torch.zeros(4, 3, 4, 4), torch.arange(4))
    with pytest.raises((TypeError, ValueError), match="seed must"):
        next(arrays.epoch(2, seed=seed))


def test_a_class_is_named_by_its_name_before_its_number():
    classes = ["0", "1", "10", "2", "many"]
    network = trained.Trained(models.build("small", 5).eval(), "small", classes, 32)
    assert [network.label_of(name) for name in classes] == [0, 1, 2, 3, 4]
    assert network.label_of("4") == 4
