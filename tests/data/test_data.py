"""Data: the digit scenes, the paper's sets from files of their schema, and the errors where these are missing."""

import json
import os
import time
from functools import partial

import pytest
import torch
from PIL import Image

from salnb import data
from salnb.__main__ import main
from salnb._common.files import DRAFT
from salnb._common.packages import package_folder
from salnb.data import base, paper, scenes
from salnb.data import cache as kept
from tests.helpers.paper_files import SCHEMAS, put_files

hf = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Made once, as making them reads a large text file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALNB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data.digit_scenes(32)


@pytest.fixture
def cache(tmp_path, monkeypatch):  # an empty one
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def splits(dataset):
    return {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}


# --- digit scenes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("validation", 1000), ("test", 1000)])
def test_digit_scenes_have_the_documented_form(made, split, count):
    part = splits(made)[split]
    assert part.images.shape == (count, 3, 32, 32)
    assert part.images.dtype == torch.uint8
    assert part.masks.shape == (count, 1, 32, 32)
    assert part.masks.dtype == torch.bool
    assert part.labels.bincount().tolist() == [count // 10] * 10
    assert made.classes == list("0123456789")


def test_each_digit_is_visible_and_within_its_scene(made):
    for part in splits(made).values():
        share = part.masks.float().mean((1, 2, 3))
        assert share.min() > 0.005
        assert share.max() < 0.5
        # the mask's pixels differ in colour from those around them
        inside, images = part.masks, part.images.float() / 255
        mean = (images * inside).sum((2, 3)) / inside.sum((2, 3))
        around = torch.nn.functional.max_pool2d(inside.float(), 5, 1, 2).bool() & ~inside
        behind = (images * around).sum((2, 3)) / around.sum((2, 3))
        assert (mean - behind).norm(dim=1).median() > 0.4


def test_splits_share_no_digit():
    found = {
        split: {bytes(digit.numpy().tobytes()) for digit in scenes._digits(split)[0]}
        for split in ("train", "validation", "test")
    }
    assert len(set.union(*found.values())) == sum(map(len, found.values()))


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_splits_share_no_photograph(name):
    files = [file for part in data.PHOTOGRAPHS[name].values() for file in part]
    assert len(files) == len(set(files))
    # the two photographs of a stereo pair would be one photograph
    assert not {"motorcycle_left.png", "motorcycle_right.png"} <= set(files)


def test_photographs_lie_in_the_package_itself():
    """None of them is among those that scikit-image would download."""
    from importlib.metadata import files

    shipped = {file.name for file in files("scikit-image") if file.parent.name == "data"}
    used = {f for name in data.PHOTOGRAPHS for part in data.PHOTOGRAPHS[name].values() for f in part}
    assert used <= shipped
    assert all((package_folder("skimage") / "data" / file).exists() for file in used)


def test_scenes_depend_on_the_seed_only():
    digits = torch.randint(256, (40, 28, 28), dtype=torch.uint8)
    photos = [torch.randint(256, (3, 60, 80), dtype=torch.uint8) for _ in range(2)]

    def scene(seed):
        return scenes.compose(digits, photos, 32, torch.Generator().manual_seed(seed))

    first, again, other = scene(1), scene(1), scene(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_scenes_of_every_size(size):
    digits = scenes._digits("test")[0][::200]
    photo = torch.full((3, 300, 400), 128, dtype=torch.uint8)
    images, masks = scenes.compose(digits, [photo], size, torch.Generator().manual_seed(0))
    assert images.shape == (5, 3, size, size)
    # on a plain background exactly the digit differs
    changed = (images != 128).any(1, keepdim=True)
    assert (changed | ~masks).all()
    assert changed.float().mean() < 0.4


def test_mask_follows_the_digit_as_placed_by_hand():
    """A full square of ink: its mask is the rectangle that height and place say."""
    ink = scenes._placed(
        torch.full((1, 28, 28), 255, dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([[0.5, -0.5]]), 32
    )
    expected = torch.zeros(32, 32)
    expected[0:16, 16:32] = 1
    torch.testing.assert_close((ink[0, 0] >= 0.5).float(), expected)


def test_scenes_are_kept_and_a_damaged_file_is_made_again(cache, monkeypatch):
    calls = []

    def make():
        calls.append(1)
        return {"images": torch.arange(1000)}

    for _ in range(2):
        assert torch.equal(kept.cached("thing", make)["images"], torch.arange(1000))
    assert len(calls) == 1
    (file,) = cache.glob("thing.*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="truncated or altered.*made again"):
        assert torch.equal(kept.cached("thing", make)["images"], torch.arange(1000))
    assert len(calls) == 2
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="truncated or altered"):
        kept.cached("thing", make)


def test_what_a_killed_process_left_long_ago_is_removed(cache):
    cache.mkdir()
    for name, age in (("old", 100_000), ("new", 100)):
        draft = cache / f"{DRAFT}{name}"
        draft.write_bytes(b"some")
        os.utime(draft, (time.time() - age,) * 2)
    kept.cached("thing", lambda: {})
    assert [path.name for path in cache.glob(f"{DRAFT}*")] == [f"{DRAFT}new"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_files_of_every_kind_are_read_in_three_colours(tmp_path, mode):
    colours = Image.new("RGB", (3, 2), (200, 100, 50)).convert(mode)
    colours.save(tmp_path / "image.png")
    pixels = base.read_image(tmp_path / "image.png")
    assert pixels.shape == (3, 2, 3)
    assert pixels.dtype == torch.uint8
    assert tuple(pixels[:, 1, 2].tolist()) == colours.convert("RGB").getpixel((2, 1))


def test_a_large_jpeg_is_decoded_no_smaller_than_needed(tmp_path):
    Image.new("RGB", (400, 240)).save(tmp_path / "image.jpg")
    shapes = {
        least: tuple(base.read_image(tmp_path / "image.jpg", least=least).shape) for least in (30, 100, 200)
    }
    assert shapes == {30: (3, 30, 50), 100: (3, 120, 200), 200: (3, 240, 400)}
    assert base.read_image(tmp_path / "image.jpg").shape == (3, 240, 400)


# --- the paper's sets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_paper_sets_from_files(name, cache):
    labels = put_files(name)
    for _ in range(2):  # the second time from what was kept
        dataset = data.load(name, 64, workers=0)
    assert [len(part) for part in splits(dataset).values()] == [18, 2, 5]
    side = 64 if name == "imagenet" else 32
    (test,) = dataset.test.epoch(8)
    assert test.images.shape == (5, 3, side, side)
    assert test.images.dtype == torch.uint8
    assert test.labels.tolist() == labels[:5]
    everything = [batch for part in (dataset.train, dataset.validation) for batch in part.epoch(7)]
    assert sorted(torch.cat([batch.labels for batch in everything]).tolist()) == sorted(labels)
    assert len(dataset.classes) == SCHEMAS[name][3]
    if name == "cifar10":
        assert torch.equal(test.images[0], (data.photos("cifar10").images[0] * 255).round().byte())


def test_imagenet_streamed_is_the_same_images(cache):
    put_files("imagenet")
    disk, stream = data.load("imagenet", 32, workers=0), data.load("imagenet-streamed", 32)
    assert len(stream.train) == len(disk.train)
    for ours, theirs in zip(splits(stream).values(), splits(disk).values(), strict=True):
        for a, b in zip(ours.epoch(4), theirs.epoch(4), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


def test_decoding_in_other_processes_gives_the_same(cache):
    put_files("imagenet")
    alone, helped = (data.load("imagenet", 32, workers=n).train for n in (0, 2))
    for a, b in zip(alone.epoch(4, seed=3), helped.epoch(4, seed=3), strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_damaged_files_are_noticed(name, how, cache):
    put_files(name)
    data.load(name, 32, workers=0)
    file = paper.files_folder(name) / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-100] if how == "truncated" else content)
    with pytest.raises(data.DamagedFileError, match=r"train-00000-of-00001\.parquet"):
        data.load(name, 32, workers=0)


def test_files_that_were_never_whole_are_named(cache):
    put_files("cifar10")
    file = paper.files_folder("cifar10") / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(data.DamagedFileError, match=r"cifar10 cannot be read"):
        data.load("cifar10", 32)


def test_files_of_another_schema_are_refused(cache):
    folder = paper.files_folder("cifar10")
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        hf.Dataset.from_dict({"image": [1, 2]}).to_parquet(folder / f"{split}-0.parquet")
    with pytest.raises(data.DamagedFileError, match=r"columns img .* and label .* got image"):
        data.load("cifar10", 32)


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "imagenet-streamed"])
def test_without_network_the_error_says_what_to_do(name, cache, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(data.NotFetchedError) as error:
        data.load(name, 32)
    plain = name.removesuffix("-streamed")
    for part in (
        paper.HUB[plain].repository,
        "train-*.parquet",
        str(paper.files_folder(plain)),
        "127.0.0.1:9",
    ):
        assert part in str(error.value)


def test_a_missing_part_is_named(cache):
    put_files("svhn")
    (paper.files_folder("svhn") / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(data.NotFetchedError, match=r"no test-\*.parquet"):
        data.load("svhn", 32)


def test_unknown_names_are_answered():
    with pytest.raises(ValueError, match=r"data 'cifar-10' is unknown \(did you mean 'cifar10'\?\)"):
        data.load("cifar-10", 32)
    with pytest.raises(ValueError, match=r"size of digit-scenes must be one of 32, 64, 96, 224, got 33"):
        data.load("digit-scenes", 33)


# --- batches -----------------------------------------------------------------------------------------------


def numbered(count=23):
    """Arrays whose every pixel is the image's number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return data.Arrays(images.contiguous(), torch.arange(count))


def labels_of(split, **options):
    return [batch.labels.tolist() for batch in split.epoch(5, **options)]


def test_an_epoch_in_order_holds_everything_once():
    assert labels_of(numbered()) == [list(range(start, min(start + 5, 23))) for start in range(0, 23, 5)]


def test_a_shuffled_epoch_leaves_out_the_incomplete_batch():
    epoch = labels_of(numbered(), seed=1)
    assert [len(batch) for batch in epoch] == [5] * 4
    assert len({label for batch in epoch for label in batch}) == 20
    assert epoch == labels_of(numbered(), seed=1)
    assert epoch != labels_of(numbered(), seed=2)


def test_an_interrupted_epoch_goes_on_where_it_was():
    assert labels_of(numbered(), seed=1, start=2) == labels_of(numbered(), seed=1)[2:]


@pytest.mark.parametrize("seed", [None, 4])
def test_shares_make_up_the_batches(seed):
    whole = labels_of(numbered(), seed=seed)
    parts = [labels_of(numbered(), seed=seed, share=data.Share(i, 2)) for i in range(2)]
    for number, batch in enumerate(whole):
        assert sorted(batch) == sorted(label for part in parts for label in part[number])


def test_a_streamed_epoch_goes_on_where_it_was(cache):
    put_files("imagenet")
    stream = data.load("imagenet-streamed", 32).train
    whole = labels_of(stream, seed=1)
    assert [len(batch) for batch in whole] == [5, 5, 5]
    assert labels_of(stream, seed=1, start=1) == whole[1:]
    parts = [labels_of(stream, seed=1, share=data.Share(i, 2)) for i in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_batches_are_floats_of_the_asked_size():
    (first, *_) = data.batches(numbered(), 8, torch.device("cpu"), batch_size=5)
    assert first.images.shape == (5, 3, 8, 8)
    assert first.images.dtype == torch.float32
    torch.testing.assert_close(first.images[:, 0, 0, 0], torch.arange(5) / 255)
    (same, *_) = data.batches(numbered(), 4, torch.device("cpu"), batch_size=5)
    assert same.images.shape == (5, 3, 4, 4)


@pytest.mark.parametrize("kind", ["arrays", "disk", "stream"])
def test_first_images(kind, cache):
    if kind != "arrays":
        put_files("imagenet")
    split = {
        "arrays": lambda: numbered(),
        "disk": lambda: data.load("imagenet", 32, workers=0).train,
        "stream": lambda: data.load("imagenet-streamed", 32).train,
    }[kind]()
    assert len(split.first(7)) == 7
    assert labels_of(split.first(7)) == [
        batch[:2] if i else batch for i, batch in enumerate(labels_of(split)[:2])
    ]


# --- the command ------------------------------------------------------------------------------------------


def test_data_command_prints_what_there_is(cache, capsys):
    put_files("cifar10")
    assert main(["data", "cifar10"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["images"] == {"train": 18, "validation": 2, "test": 5}
    assert described["classes"] == 10


@pytest.mark.parametrize("count", [1500, 1001, 999, 2000.0, "2000"])
def test_scenes_of_a_test_that_are_no_thousands_are_refused(count):
    for make in (data.digit_scenes, partial(data.load, "digit-scenes", 32)):
        with pytest.raises((TypeError, ValueError), match=r"test_scenes must .*got '?\d"):
            make(test_scenes=count)
