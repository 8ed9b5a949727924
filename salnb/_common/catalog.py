"""The names that a run may use, with their limits; free of torch, so that a mistake is answered at once.

The modules that own the things behind the names are loaded only when a run is sound; tests compare the two.
"""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from salnb._common.packages import package_folder


class Network(NamedTuple):
    """What a network asks of its images.

    Attributes:
        smallest: least height and width.
        smallest_for_cam: least height and width at which the last convolution keeps more than one pixel.
        layers: names of the layers that eq. 6 compares unless others are asked for.
        largest: greatest height and width; None: any.
    """

    smallest: int
    smallest_for_cam: int
    layers: tuple[str, ...]
    largest: int | None = None


class Source(NamedTuple):
    """What is known of a data set before it is loaded.

    Attributes:
        num_classes: K.
        sizes: heights and widths that it is made in; None: any, the images are rescaled.
        training_images: how many there are for training; None where that depends on the files.
    """

    num_classes: int
    sizes: tuple[int, ...] | None
    training_images: int | None


class MethodSpec(NamedTuple):
    """What a saliency method is. All that treats methods by their names reads it here.

    Attributes:
        title: its name in headings and figures.
        pixels: its map is made of the gradient with respect to the pixels, alone or beside a layer's.
        layer: it looks at the output of a layer, which must keep more than one pixel.
        rule: how ReLU passes a gradient back while the map is taken (eq. 4); None: as it always does.
        options: its keyword arguments, apart from those that all methods have.
        repeats: the one of them that says how many passes through the network it takes; None: one.
        map_passes: what its maps add to a training step, for each of these passes, in forward passes.
    """

    title: str
    pixels: bool
    layer: bool
    rule: str | None = None
    options: tuple[str, ...] = ()
    repeats: str | None = None
    map_passes: int = 3  # the gradient, and the way back through both passes


_STAGES = tuple(f"network.layer{i}" for i in range(1, 5))
_BLOCKS = tuple(f"network.features.denseblock{i}" for i in range(1, 5))
_VGG = Network(32, 32, ("network.features",))
_RESNET = Network(32, 33, _STAGES)
_DENSENET = Network(32, 61, _BLOCKS)
_CONVNEXT = Network(32, 64, tuple(f"network.features.{i}" for i in (1, 3, 5, 7)))
# a position has a number of its own
_VIT = Network(224, 224, tuple(f"network.encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11)), 224)
_SMALL = Network(8, 9, ("network.stage1", "network.stage2", "network.stage3"))
_TIMM = Network(1, 1, ())

NETWORKS = {
    "small": _SMALL,
    "small_groupnorm": _SMALL,
    "resnet18": _RESNET,
    "resnet50": _RESNET,
    "vgg16": _VGG,
    "vgg16_bn": _VGG,
    "vgg19": _VGG,
    "vgg19_bn": _VGG,
    "densenet121": _DENSENET,
    "densenet169": _DENSENET,
    "convnext_tiny": _CONVNEXT,
    "vit_b_16": _VIT,
}

_SCENE_SIZES = (32, 64, 96, 224)
DATA = {
    "digit-scenes": Source(10, _SCENE_SIZES, 6000),
    "digit-scenes-shifted": Source(10, _SCENE_SIZES, 6000),
    "cifar10": Source(10, None, None),
    "cifar100": Source(100, None, None),
    "svhn": Source(10, None, None),
    "imagenet": Source(1000, None, None),
    "imagenet-streamed": Source(1000, None, None),
}

# augmentations, with the least number of images that each takes
AUGMENTATIONS = {
    "identity": 1,
    "horizontal_flip": 1,
    "vertical_flip": 1,
    "rescale": 1,
    "rotation": 1,
    "affine": 1,
    "contrast": 1,
    "combined": 1,
    "color_jitter": 1,
    "resized_crop": 1,
    "simclr": 1,
    "cutout": 1,
    "mixup": 2,
    "cutmix": 2,
    "augmix": 1,
}

METHODS = {
    "vanilla_gradient": MethodSpec("vanilla gradient", pixels=True, layer=False),
    "deconvnet": MethodSpec("DeconvNet", pixels=True, layer=False, rule="deconvnet"),
    "guided_backprop": MethodSpec("guided backprop", pixels=True, layer=False, rule="guided_backprop"),
    "smoothgrad": MethodSpec(
        "SmoothGrad",
        pixels=True,
        layer=False,
        options=("n_samples", "noise_level"),
        repeats="n_samples",
        map_passes=6,  # each noisy copy has a forward pass of its own
    ),
    # the layer that Grad-CAM looks at is next to the scores
    "grad_cam": MethodSpec("Grad-CAM", pixels=False, layer=True, options=("layer",), map_passes=0),
    "guided_grad_cam": MethodSpec(
        "Guided Grad-CAM", pixels=True, layer=True, rule="guided_backprop", options=("layer",)
    ),
}
NORMALIZATIONS = ("l2", "max", "none", "sum", "zscore")
DISTANCES = ("cosine", "l1", "mse")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine", "onecycle")
PRECISIONS = {"32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def unknown(what: str, given: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among the `known` ones, with the nearest of them suggested."""
    names = list(known)
    listed = ", ".join(names) if len(names) <= 100 else f"{len(names)} names"
    return ValueError(f"{what} {given!r} is unknown{did_you_mean(given, names)}; known: {listed}")


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """The nearest of the names as the end of an error message; nothing where none is near."""
    near = difflib.get_close_matches(str(given), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def network(name: str) -> Network:
    """What is known of a network: one of `NETWORKS`, or "timm:" and a name of the package timm.

    Raises:
        ValueError: there is no such network.
        ModuleNotFoundError: timm is asked for and is not installed.
    """
    if not name.startswith("timm:"):
        if name not in NETWORKS:
            raise unknown("model", name, [*NETWORKS, "timm:NAME"])
        return NETWORKS[name]
    # loading timm takes seconds; the names stand in its files, each below the mark of a registered model
    files = sorted((package_folder("timm", what="model 'timm:…'") / "models").glob("*.py"))
    found = {
        f"timm:{entry}"
        for file in files
        for entry in re.findall(
            r"^@register_model\s+def (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    # an ending after a dot names a set of weights
    if name.split(".")[0] not in found:
        raise unknown("model", name, sorted(found))
    return _TIMM


def check_size(name: str, size: int) -> None:
    """Raise a ValueError unless the network can take images of this height and width."""
    known = network(name)
    if size < known.smallest and known.largest is None:
        raise ValueError(
            f"size must be at least {known.smallest} for {name}, got {size}: its feature maps would vanish"
        )
    if known.largest is not None and not known.smallest <= size <= known.largest:
        raise ValueError(f"size must be {known.largest} for {name}, got {size}: it has so many positions")
