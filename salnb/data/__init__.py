"""Images to work with: photographs that come in a package, digit scenes, and the paper's data sets."""

from typing import Any

from salnb._common.catalog import DATA, unknown
from salnb._common.files import DamagedFileError
from salnb.data.base import (
    WHOLE,
    Arrays,
    Dataset,
    DiskImages,
    Examples,
    Share,
    Split,
    StreamedImages,
    batches,
    cache_folder,
)
from salnb.data.paper import HUB, NotFetchedError, load_paper, local_files, verify
from salnb.data.photographs import CIFAR10_CLASSES, Photos, imagenet_classes, photos
from salnb.data.scenes import PHOTOGRAPHS, digit_scenes

__all__ = [
    "CIFAR10_CLASSES",
    "PHOTOGRAPHS",
    "WHOLE",
    "Arrays",
    "DamagedFileError",
    "Dataset",
    "DiskImages",
    "Examples",
    "NotFetchedError",
    "Photos",
    "Share",
    "Split",
    "StreamedImages",
    "batches",
    "cache_folder",
    "digit_scenes",
    "fetch",
    "imagenet_classes",
    "load",
    "load_paper",
    "photos",
]


def load(name: str, size: int, *, workers: int = 4) -> Dataset:
    """A data set by its name.

    Args:
        name: "digit-scenes", "digit-scenes-shifted", "cifar10", "cifar100", "svhn", "imagenet" (from
            disk) or "imagenet-streamed" (over the network).
        size: height and width of the digit scenes and of ImageNet's photographs; the others stay as they
            are stored, and `batches` resizes them.
        workers: processes that decode ImageNet's photographs.

    Raises:
        ValueError, NotFetchedError, DamagedFileError: see `digit_scenes` and `load_paper`.
    """
    if name not in DATA:
        raise unknown("data", name, DATA)
    if name in PHOTOGRAPHS:
        return digit_scenes(size, name=name)
    plain = name.removesuffix("-streamed")
    return load_paper(plain, size, workers=workers, streamed=plain != name)


def fetch(name: str, size: int = 32) -> dict[str, Any]:
    """Make sure that a data set is here and whole; downloads show their progress.

    Args:
        name: as in `load`.
        size: as in `load`.

    Returns:
        What there is: the number of images of each split, the number of classes, the folder.

    Raises:
        ValueError, NotFetchedError, DamagedFileError: see `load`.
    """
    plain = name.removesuffix("-streamed")
    if plain in HUB and local_files(plain):
        verify(plain)  # `load` does not, where that would take minutes
    dataset = load(name, size)
    return {
        "name": name,
        "images": {split: len(getattr(dataset, split)) for split in ("train", "validation", "test")},
        "classes": len(dataset.classes),
        "folder": str(cache_folder()),
    }
