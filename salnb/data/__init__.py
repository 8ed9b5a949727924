"""Images to work with: photographs that come in a package, digit scenes, and the paper's data sets."""

# ruff: noqa: F403, F405  each module says in its `__all__` what is shown here

from typing import Any

from salnb._common.catalog import DATA, unknown
from salnb._common.files import DamagedFileError
from salnb.data import base, cache, folder, paper, photographs, scenes
from salnb.data.base import *
from salnb.data.cache import *
from salnb.data.folder import *
from salnb.data.paper import *
from salnb.data.photographs import *
from salnb.data.scenes import *

__all__ = ["DamagedFileError", "fetch", "load"]
__all__ += base.__all__
__all__ += cache.__all__
__all__ += folder.__all__
__all__ += paper.__all__
__all__ += photographs.__all__
__all__ += scenes.__all__


def load(name: str, size: int, *, workers: int = 4, test_scenes: int = 1000) -> Dataset:
    """A data set by its name.

    Args:
        name: "digit-scenes", "digit-scenes-shifted", "digit-scenes-shortcut", "cifar10", "cifar100", "svhn",
            "imagenet" (from disk) or "imagenet-streamed" (over the network).
        size: height and width of the digit scenes and of ImageNet's photographs; the others stay as they
            are stored, and `batches` resizes them.
        workers: processes that decode ImageNet's photographs.
        test_scenes: of the digit scenes.

    Raises:
        TypeError, ValueError, OSError, NotFetchedError, DamagedFileError: see `digit_scenes`, `load_paper`.
    """
    if name not in DATA:
        raise unknown("data", name, DATA)
    if name == "folder":
        raise ValueError("data 'folder' is loaded by image_folder(root, size)")
    if DATA[name].sizes is not None:
        return digit_scenes(size, name=name, test_scenes=test_scenes)
    plain = name.removesuffix("-streamed")
    return load_paper(plain, size, workers=workers, streamed=plain != name)


def fetch(name: str, size: int = 32) -> dict[str, Any]:
    """Make sure that a data set is here and whole; downloads show their progress. See `load`.

    Returns:
        What there is: the number of images of each split, the number of classes, the folder.
    """
    plain = name.removesuffix("-streamed")
    if plain in paper.HUB and paper.local_files(plain):
        paper.verify(plain)  # `load` does not, where that would take minutes
    dataset = load(name, size)
    return {
        "name": name,
        "images": {split: len(getattr(dataset, split)) for split in ("train", "validation", "test")},
        "classes": len(dataset.classes),
        "folder": str(cache_folder()),
    }
