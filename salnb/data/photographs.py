"""Real photographs that come in a registry package, so that no network is needed."""

from typing import NamedTuple

import torch
from torch import Tensor

from salnb._common.catalog import unknown
from salnb._common.limits import check_integer
from salnb._common.packages import package_folder
from salnb.data.base import centre, read_image

__all__ = ["CIFAR10_CLASSES", "Photos", "imagenet_classes", "photos"]


class Photos(NamedTuple):
    """Labelled photographs.

    Attributes:
        images: (N, 3, H, W), float32 in [0, 1].
        labels: (N,), int64.
        names: the class name of each photograph.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_SIZES = {"imagenet": 224, "cifar10": 32, "cifar100": 32}


def photos(name: str = "imagenet", *, size: int | None = None) -> Photos:
    """Twenty real photographs with their labels, from the package `foolbox`.

    Args:
        name: "imagenet" (20 photographs, labels of the 1,000 classes), "cifar10" or "cifar100".
        size: height and width in pixels. The short side is resized with antialiasing to 8/7 of it (to
            the size itself for the CIFARs) and the centre is cut out. None: 224, or 32 for the CIFARs.

    Returns:
        Images, labels and class names, in a fixed order.

    Raises:
        TypeError, ValueError: `name` is unknown, or `size` is no number of pixels from 1 to 10,000.
        ModuleNotFoundError: the extra `chapters`, which brings the photographs, is not installed.
    """
    if name not in _SIZES:
        raise unknown("name", name, _SIZES)
    size = _SIZES[name] if size is None else check_integer("size", size, 1, 10_000)
    files = sorted((package_folder("foolbox", "chapters") / "data").glob(f"{name}_*"))
    enlarged = size * 8 // 7 if name == "imagenet" else size
    images = [centre(read_image(path), enlarged, size) for path in files]
    labels = [int(path.stem.rsplit("_", 1)[1]) for path in files]
    words = {
        "imagenet": imagenet_classes(),
        "cifar10": CIFAR10_CLASSES,
        "cifar100": [f"class {i}" for i in range(100)],  # the package does not name them
    }[name]
    stacked = torch.stack(images).float().div(255)
    return Photos(stacked, torch.tensor(labels, device="cpu"), [words[label] for label in labels])


def imagenet_classes() -> list[str]:
    """The names of the 1,000 ImageNet classes, in the order of their indices."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])
