"""Data sets are the same whatever dtype and device torch makes tensors of by default."""

import contextlib

import pytest
import torch

from salnb import data
from tests.helpers.defaults import DTYPES, default_dtype
from tests.helpers.paper_files import SCHEMAS, put_files

pytest.importorskip("datasets")


def described(dataset):
    """Everything about a data set that a default of torch might change."""
    batches = [b for part in (dataset.train, dataset.validation, dataset.test) for b in part.epoch(100)]
    batches += dataset.train.epoch(7, seed=5)
    floats = data.batches(dataset.test, 16, torch.device("cpu"), batch_size=50)
    return [t for batch in (*batches, *floats) for t in batch if t is not None]


NAMES = [
    "digit-scenes",
    "digit-scenes-shifted",
    "digit-scenes-shortcut",
    "cifar10",
    "cifar100",
    "svhn",
    "imagenet",
    "imagenet-streamed",
]


def loaded(folder, default):
    """All data sets, made, kept and loaded under a default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALNB_CACHE", str(folder))
        for name in SCHEMAS:
            put_files(name)
        with default:
            return [described(data.load(name, 32, workers=0)) for name in NAMES for _ in range(2)]


@pytest.fixture(scope="module")
def plain(few_scenes, tmp_path_factory):
    """What there is where nothing was changed."""
    return loaded(tmp_path_factory.mktemp("plain"), contextlib.nullcontext())


@pytest.mark.parametrize("default", [*DTYPES, "device"], ids=str)
def test_defaults_of_torch_change_no_data_set(default, plain, tmp_path):
    changed = loaded(tmp_path, torch.device("meta") if default == "device" else default_dtype(default))
    for name, ours, theirs in zip([name for name in NAMES for _ in range(2)], plain, changed, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.device) == (b.dtype, b.device), name
            assert torch.equal(a, b), name
    assert {t.dtype for tensors in plain for t in tensors} == {
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.float32,
    }


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "cifar100"])
@pytest.mark.parametrize("default", [*DTYPES, "device"], ids=str)
def test_defaults_of_torch_change_no_photograph(name, default):
    expected = data.photos(name)
    with torch.device("meta") if default == "device" else default_dtype(default):
        photos = data.photos(name)
    assert photos.images.dtype == torch.float32
    assert torch.equal(photos.images, expected.images)
    assert torch.equal(photos.labels, expected.labels)


def test_decoding_in_other_processes_under_another_default_device(tmp_path, monkeypatch):
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path))
    put_files("imagenet")
    expected = next(data.load("imagenet", 32, workers=0).train.epoch(4))
    with torch.device("meta"):
        batch = next(data.load("imagenet", 32, workers=1).train.epoch(4))
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.labels, expected.labels)
