"""A folder of one's own images: whatever Pillow reads, splits, masks, and what is told before a training."""

import io
import itertools
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from salnb import data, results
from salnb.data import base
from salnb.data.base import read_image

SIZE = 16


def picture(seed=0, size=(20, 28)):
    """A smooth one, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def put(root, *names, image=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (image or picture(zlib.crc32(name.encode()))).save(root / name)


@pytest.fixture
def folder(tmp_path):
    """Twelve images in each of two classes."""
    root = tmp_path / "photos"
    put(root, *(f"{c}/{c}-{i:02}.png" for c in ("cat", "dog") for i in range(12)))
    return root


def load(root, **options):
    return data.image_folder(root, SIZE, workers=0, **options)


def examples(split):
    return [one for batch in split.epoch(4) for one in zip(batch.images, batch.labels.tolist(), strict=True)]


# --- pictures of every kind ---------------------------------------------------------------------------------


def grey16(path):
    values = np.linspace(0, 65535, 20 * 20).astype(np.uint16).reshape(20, 20)
    Image.fromarray(values).save(path)
    return torch.from_numpy((values / 257).round().astype(np.uint8)).expand(3, -1, -1)


def real(path):
    values = np.linspace(0, 1, 20 * 20, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(path)
    return torch.from_numpy((values * 255).round().astype(np.uint8)).expand(3, -1, -1)


def rgb_of(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def transparent(path):
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 20).astype(np.uint8), (28, 1))))
    image.save(path)
    alpha = torch.from_numpy(np.array(image))[..., 3:].permute(2, 0, 1) / 255
    return rgb_of(image) * alpha + 255 * (1 - alpha)


def palette(path):
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=0)
    expected = torch.full((3, 4, 4), 255)
    expected[:, 0, 1] = torch.tensor([0, 255, 0])
    return expected


def saved(mode):
    def make(path):
        image = picture().convert(mode)
        image.save(path)
        return rgb_of(Image.open(path))

    return make


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture().save(path, exif=exif, quality=95)
    return rgb_of(Image.open(path).transpose(Image.Transpose.ROTATE_270))


def cmyk(path):
    picture().convert("CMYK").save(path, quality=95)
    return rgb_of(picture())


KINDS = {
    "grey.png": saved("L"),
    "bits.png": saved("1"),
    "palette.gif": palette,
    "palette.png": palette,
    "colour.webp": saved("RGB"),
    "16-bit.png": grey16,
    "16-bit.tiff": grey16,
    "real.tiff": real,
    "alpha.png": transparent,
    "grey-alpha.png": lambda path: (
        Image.new("LA", (4, 4), (0, 0)).save(path),
        torch.full((3, 4, 4), 255),
    )[1],
    "turned.jpg": turned,
    "cmyk.jpg": cmyk,
    "ycbcr.jpg": saved("YCbCr"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(kind, tmp_path):
    expected = KINDS[kind](tmp_path / kind)
    image = read_image(tmp_path / kind)
    assert image.dtype == torch.uint8
    assert image.shape == expected.shape
    assert (image.float() - expected.float()).abs().max() <= (25 if kind == "cmyk.jpg" else 1)
    assert data.read_photograph(tmp_path / kind, 8).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.float32([[0, 255]]), "from 0 to 255 in mode F"),
        (np.float32([[-0.5, 1]]), "from -0.5 to 1 in mode F"),
        (np.float32([[0, np.nan]]), "from nan to nan in mode F"),
        (np.int32([[7, 100_000]]), "from 7 to 100000 in mode I"),
        (np.int32([[0, 200]]), "from 0 to 200 in mode I"),
    ],
)
def test_grey_of_which_none_is_known_to_be_white_is_told(values, told, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    message = rf"a\.tiff cannot be read \(its values are {told}, of which none is known to be white\)$"
    with pytest.raises(data.DamagedFileError, match=message):
        data.read_photograph(tmp_path / "a.tiff", 8)


# --- splits -------------------------------------------------------------------------------------------------


def test_a_folder_is_split_by_class_and_by_a_seed(folder, tmp_path):
    parts = load(folder)
    assert parts.classes == ["cat", "dog"]
    assert [len(s) for s in (parts.train, parts.validation, parts.test)] == [20, 2, 2]
    names = [parts.train.rows, parts.validation.rows, parts.test.rows]
    assert sorted(itertools.chain(*names)) == sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*.png")
    )
    for split in (parts.validation, parts.test):
        assert [label for _, label in examples(split)] == [0, 1]
    assert {label for _, label in examples(parts.train.first(6))} == {0, 1}
    assert load(folder).test.rows == parts.test.rows
    assert any(load(folder, seed=seed).test.rows != parts.test.rows for seed in range(1, 4))
    image, label = parts.train[0]
    assert torch.equal(image, data.read_photograph(folder / parts.train.rows[0], SIZE))
    assert parts.classes[label] == parts.train.rows[0].split("/")[0]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folders_of_splits_are_taken_as_they_are(folder, name, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    put(root, f"{name}/cat/a.png", f"{name}/dog/deep/b.png")
    parts = load(root)
    assert parts.validation.rows == [f"{name}/cat/a.png", f"{name}/dog/deep/b.png"]
    assert [label for _, label in examples(parts.validation)] == [0, 1]
    assert [len(parts.train), len(parts.test)] == [22, 2]  # what is missing is put aside from train
    assert all(path.startswith("train/") for path in parts.test.rows)


@pytest.mark.parametrize("name", ["train", "val", "valid", "validation", "test"])
def test_a_class_may_be_named_like_a_split(name, tmp_path):
    root, record = tmp_path / "photos", tmp_path / "split.json"
    for split, count in {"train": 9, "val": 2, "test": 2}.items():
        put(root, *(f"{split}/{c}/{c}-{i}-{split}.png" for c in ("bus", name, "zebra") for i in range(count)))
    for parts in (load(root, record=record), load(root, record=record)):
        assert parts.classes == sorted(["bus", name, "zebra"])
        for split, count in ((parts.train, 9), (parts.validation, 2), (parts.test, 2)):
            assert sorted(label for _, label in examples(split)) == [0] * count + [1] * count + [2] * count
            assert all(f"/{parts.classes[split[i][1]]}/" in row for i, row in enumerate(split.rows))
    split, _ = data.images_to_test(root, SIZE)
    assert [label for _, label in examples(split)] == [0, 0, 1, 1, 2, 2]


def is_in_shared_memory(examples):
    return torch.tensor(base._collate(examples).images.is_shared())


def test_a_batch_is_made_where_processes_share_memory(folder):
    """Made elsewhere and then copied there, large ones tear holes into the memory of a process, which grows."""
    split = load(folder).train
    made = {
        workers: [*DataLoader(split, 4, num_workers=workers, collate_fn=is_in_shared_memory)]
        for workers in (0, 1)
    }
    assert made[1]
    assert all(made[1])
    assert not any(made[0])


def test_the_split_is_kept_with_the_run(folder, tmp_path):
    record = tmp_path / "run" / "split.json"
    first = load(folder, record=record)
    put(folder, "cat/new.png", "bird/new.png")
    again = load(folder, record=record, seed=5)
    assert (again.train.rows, again.classes) == (first.train.rows, ["cat", "dog"])
    assert results.read_record(record)["skipped"] == []


def test_workers_decode(folder):
    split = data.image_folder(folder, SIZE, workers=2).train
    batches = list(split.epoch(5, seed=3))
    assert [tuple(batch.images.shape) for batch in batches] == [(5, 3, SIZE, SIZE)] * 4
    assert all(batch.masks is None for batch in batches)


def test_masks_of_the_same_names(folder):
    mask = Image.new("L", (20, 28), 0)
    mask.paste(255, (0, 0, 10, 28))
    put(folder, *(f"masks/{c}/{c}-{i:02}.png" for c in ("cat", "dog") for i in range(12)), image=mask)
    parts = load(folder)
    (batch,) = parts.test.epoch(2)
    assert batch.masks.dtype == torch.bool
    assert batch.masks.shape == (2, 1, SIZE, SIZE)
    assert batch.masks.float().mean() == 0.5
    assert batch.masks[..., : SIZE // 2].all()
    assert not parts.train.masks
    assert len(parts.test.first(1).masks) == 1
    (folder / "masks" / parts.test.rows[0]).unlink()
    with pytest.raises(ValueError, match=r"1 of 4 images have no mask: cat/cat-\d\d.png$"):
        load(folder)


def test_masks_may_be_a_class_of_a_split(tmp_path):
    root = tmp_path / "faces"
    for split in ("train", "val", "test"):
        put(root, *(f"{split}/{c}/{c}-{split}.png" for c in ("masks", "none", "wrong")))
    parts = load(root)
    assert parts.classes == ["masks", "none", "wrong"]
    assert [label for _, label in examples(parts.test)] == [0, 1, 2]


@pytest.mark.parametrize("inside", ["a.png", "indoors/a.png"])
def test_a_class_is_not_taken_for_masks(folder, inside):
    (folder / "masks" / "cat").mkdir(parents=True)
    put(folder, "masks/cat/cat-00.png", f"masks/{inside}")
    if inside.startswith("indoors"):
        shutil.rmtree(folder / "masks" / "cat")
    told = r"data_dir .*photos: masks must have a folder for each class, .* rename it, or put"
    with pytest.raises(ValueError, match=told):
        load(folder)


@pytest.mark.parametrize("size", [0, -3, 2.5, 16.0, "16", None, 10_001])
def test_sizes_of_a_photograph(size, folder):
    message = rf"^size must (be a whole number|lie) in \[1, 10000\], got {size!r}$"
    with pytest.raises((TypeError, ValueError), match=message):
        data.read_photograph(folder / "cat" / "cat-00.png", size)
    with pytest.raises((TypeError, ValueError), match=message):
        data.image_folder(folder, size)


@pytest.mark.parametrize(
    "wrong", [{"workers": -1}, {"workers": "2"}, {"workers": None}, {"seed": 1.5}, {"seed": "0"}]
)
def test_numbers_of_a_folder(wrong, folder):
    ((name, value),) = wrong.items()
    message = rf"^{name} must (be a whole number|lie) in .*, got {value!r}$"
    with pytest.raises((TypeError, ValueError), match=message):
        data.image_folder(folder, SIZE, **wrong)


# --- what is told before a training --------------------------------------------------------------------------


def broken(root, *names):
    content = io.BytesIO()
    picture(size=(200, 200)).save(content, "JPEG")
    for name in names:
        (root / name).write_bytes(content.getvalue()[:1500])


def test_what_cannot_be_read_is_told_with_names_and_number(folder, tmp_path):
    broken(folder, "cat/bad.jpg")
    (folder / "dog" / "text.png").write_text("no image")
    told = r"data_dir .*photos: 2 of 26 images cannot be read: cat/bad.jpg .*truncated.*, dog/text.png .*; --skip"
    with pytest.raises(data.DamagedFileError, match=told):
        load(folder)
    record = tmp_path / "split.json"
    parts = load(folder, skip_unreadable=True, record=record)
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 24
    assert results.read_record(record)["skipped"] == ["cat/bad.jpg", "dog/text.png"]


def test_what_goes_wrong_later_is_told_by_name(folder):
    split = data.image_folder(folder, SIZE, workers=1).train
    broken(folder, split.rows[3])
    with pytest.raises(data.DamagedFileError, match=rf"^.*{split.rows[3]} cannot be read \(.*truncated"):
        list(split.epoch(4))


def test_an_unreadable_class_is_an_empty_one(folder):
    (folder / "bird").mkdir()
    broken(folder, "bird/bad.jpg")
    with pytest.raises(ValueError, match="no image in train of 1 classes: bird"):
        load(folder, skip_unreadable=True)


def empty_class(root):
    (root / "bird").mkdir()


def one_class(root):
    shutil.rmtree(root / "dog")


def other_class(root):
    put(root, "train/cat/a.png", "train/dog/a.png", "test/cat/b.png", "test/bird/b.png")


def no_train(root):
    put(root, "val/cat/a.png", "val/dog/a.png")


def small_class(root):
    put(root, "bird/a.png", "bird/b.png")


def twice(root):
    put(root, "train/cat/a.png", "train/cat/c.png", "train/dog/a.png", "train/dog/c.png", "val/dog/b.png")
    for name in ("test/cat/x.png", "test/dog/x.png", "val/cat/y.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / f"train/{name.split('/')[1]}/c.png", root / name)


MISTAKES = {
    "empty class": (empty_class, "no image in train of 1 classes: bird"),
    "one class": (one_class, "a folder for each of two or more classes, got cat"),
    "other classes": (other_class, "train and test differ in 2 classes: bird, dog"),
    "no train": (no_train, "has val, but no train"),
    "small class": (
        small_class,
        "class bird has 2 images, too few to put some aside for validation and test",
    ),
    "in two splits": (twice, r"3 files are in two splits: train/cat/c.png \(train\) is .*\(.*\), "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_by_name(mistake, folder):
    change, message = MISTAKES[mistake]
    change(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir must be a folder of images, got .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"loaded by image_folder"):
        data.load("folder", 32)


def test_images_to_test(folder, tmp_path):
    record = tmp_path / "split.json"
    parts = load(folder, record=record)
    (tmp_path / "link").symlink_to(folder)
    for spelled in (folder, tmp_path / "link", folder / ".." / folder.name):  # one folder
        assert len(data.images_to_test(spelled, SIZE, record=record)[0]) == len(parts.test)
    split, classes = data.images_to_test(folder, SIZE)
    assert (len(split), classes) == (24, ["cat", "dog"])
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    put(root, "val/cat/a.png", "val/dog/b.png")
    with pytest.raises(ValueError, match="has train and validation, but no test"):
        data.images_to_test(root, SIZE)
    put(root, "test/cat/a.png", "test/dog/b.png")
    assert data.images_to_test(root, SIZE, record=record)[0].rows == ["test/cat/a.png", "test/dog/b.png"]
