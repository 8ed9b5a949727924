"""The names that a run may use, with their limits; free of torch, so that a mistake is answered at once.

The modules that own the things behind the names are loaded only when a run is sound; tests compare the two.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from salnb._common.limits import check_integer, check_number
from salnb._common.packages import package_folder


class Network(NamedTuple):
    """What a network asks of its images."""

    smallest: int  # least height and width
    smallest_for_cam: int  # ... at which the last convolution keeps more than one pixel
    layers: tuple[str, ...]  # that eq. 6 compares unless others are asked for
    largest: int | None = None  # greatest height and width; None: any


class Source(NamedTuple):
    """What is known of a data set before it is loaded."""

    num_classes: int  # 0 where that depends on the files
    sizes: tuple[int, ...] | None = None  # that it is made in; None: any, the images are rescaled
    training_images: int | None = None  # None where that depends on the files


class MethodSpec(NamedTuple):
    """What a saliency method is. All that treats methods by their names reads it here."""

    title: str  # in headings and figures
    pixels: bool = (
        True  # its map is made of the gradient with respect to the pixels, alone or beside a layer's
    )
    layer: bool = False  # it looks at the output of a layer, which must keep more than one pixel
    rule: str | None = None  # how ReLU passes a gradient back for the map (eq. 4); None: as it always does
    options: tuple[str, ...] = ()  # its keyword arguments, apart from those that all methods have
    repeats: str | None = None  # the one that says how many passes through the network it takes; None: one
    map_passes: int = 3  # what a map adds to a step, for each pass, in forward passes: gradient, and way back


_STAGES = tuple(f"network.layer{i}" for i in range(1, 5))
_BLOCKS = tuple(f"network.features.denseblock{i}" for i in range(1, 5))
# a position has a number of its own
_VIT = Network(224, 224, tuple(f"network.encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11)), 224)
_SMALL = Network(8, 9, ("network.stage1", "network.stage2", "network.stage3"))
_TIMM = Network(1, 1, ())

NETWORKS = {
    "small": _SMALL,
    "small_groupnorm": _SMALL,
    "small_silu": _SMALL,
    "resnet18": Network(32, 33, _STAGES),
    "resnet50": Network(32, 33, _STAGES),
    **dict.fromkeys(("vgg16", "vgg16_bn", "vgg19", "vgg19_bn"), Network(32, 32, ("network.features",))),
    "densenet121": Network(32, 61, _BLOCKS),
    "densenet169": Network(32, 61, _BLOCKS),
    "convnext_tiny": Network(32, 64, tuple(f"network.features.{i}" for i in (1, 3, 5, 7))),
    "vit_b_16": _VIT,
}

_SCENES = Source(10, (32, 64, 96, 224), 6000)
DATA = {
    "digit-scenes": _SCENES,
    "digit-scenes-shifted": _SCENES,
    "digit-scenes-shortcut": _SCENES,
    "cifar10": Source(10),
    "cifar100": Source(100),
    "svhn": Source(10),
    "imagenet": Source(1000),
    "imagenet-streamed": Source(1000),
    "folder": Source(0),
}

_ALONE = ["identity", "horizontal_flip", "vertical_flip", "rescale", "rotation", "affine", "contrast"]
_ALONE += ["combined", "color_jitter", "resized_crop", "simclr", "cutout"]
# augmentations, with the least number of images that each takes
AUGMENTATIONS = dict.fromkeys(_ALONE, 1) | {"mixup": 2, "cutmix": 2, "augmix": 1}

METHODS = {
    "vanilla_gradient": MethodSpec("vanilla gradient"),
    "deconvnet": MethodSpec("DeconvNet", rule="deconvnet"),
    "guided_backprop": MethodSpec("guided backprop", rule="guided_backprop"),
    # each noisy copy has a forward pass of its own
    "smoothgrad": MethodSpec(
        "SmoothGrad", options=("n_samples", "noise_level"), repeats="n_samples", map_passes=6
    ),
    # the layer that Grad-CAM looks at is next to the scores
    "grad_cam": MethodSpec("Grad-CAM", pixels=False, layer=True, options=("layer", "reshape"), map_passes=0),
    "guided_grad_cam": MethodSpec(
        "Guided Grad-CAM", layer=True, rule="guided_backprop", options=("layer", "reshape")
    ),
}
NORMALIZATIONS = ("l2", "max", "none", "sum", "zscore")
DISTANCES = ("cosine", "l1", "mse")
# whose gradient a map is: a logit's (eq. 1), or that of the class's log-probability
SCORES = ("logit", "log_prob")
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


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise unless a method has options of these names, and allows their values; a layer is not looked at."""
    allowed = METHODS[method].options
    for name in options:
        if name not in allowed:
            raise unknown(f"method_options of {method}", name, sorted(allowed))
    for name, check, least in (("n_samples", check_integer, 1), ("noise_level", check_number, 0)):
        if name in options:
            check(name, options[name], least, 10**9)


def check_balance(balance: float, alpha: float, gamma: float) -> None:
    """Raise a ValueError unless `balance` has two gradients to compare, and alone chooses gamma."""
    if balance and not alpha:
        raise ValueError(f"balance is a share of the class loss, got balance={balance} with alpha={alpha}")
    if balance and gamma != 1:
        raise ValueError(
            f"balance chooses gamma, which must be left at 1, got balance={balance} with gamma={gamma}"
            f"{': for no saliency term, take balance=0' if not gamma else ''}"
        )


def check_confidence(confidence: float, consistency: float, originals_only: bool) -> None:
    """Raise a ValueError unless `confidence` is a probability, which `consistency` needs."""
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence must be a probability, from 0 to 1, got {confidence}")
    if confidence and originals_only:
        raise ValueError(f"originals_only and confidence do not go together, got confidence={confidence}")
    if consistency and not confidence:
        raise ValueError(
            f"consistency is for images without labels, which confidence > 0 allows, got {consistency} "
            "with confidence=0"
        )


def network(name: str) -> Network:
    """What is known of a network: one of `NETWORKS`, or "timm:" and a name of the package timm.

    Raises:
        TypeError: it is no name.
        ValueError: there is no such network.
        ModuleNotFoundError: timm is asked for and is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a network must be a string, got {name!r}")
    if not name.startswith("timm:"):
        if name not in NETWORKS:
            raise unknown("model", name, [*NETWORKS, "timm:NAME"])
        return NETWORKS[name]
    # loading timm takes seconds; the names stand in its files, each below the mark of a registered model
    files = (package_folder("timm", what="model 'timm:…'") / "models").glob("*.py")
    marked = re.compile(r"^@register_model\s+def (\w+)", re.MULTILINE)
    found = {f"timm:{entry}" for file in files for entry in marked.findall(file.read_text(encoding="utf-8"))}
    # an ending after a dot names a set of weights
    if name.split(".")[0] not in found:
        raise unknown("model", name, sorted(found))
    return _TIMM


def check_size(name: str, size: int) -> None:
    """Raise a ValueError unless the network can take images of this height and width."""
    known = network(name)
    smallest, largest = known.smallest, known.largest
    if size < smallest and largest is None:
        raise ValueError(
            f"size must be at least {smallest} for {name}, got {size}: its feature maps would vanish"
        )
    if largest is not None and not smallest <= size <= largest:
        raise ValueError(f"size must be {largest} for {name}, got {size}: it has so many positions")


def check_made_in(name: str, size: int) -> None:
    """Raise a ValueError unless a data set is made in this height and width, or in any."""
    sizes = DATA[name].sizes
    if sizes is not None and size not in sizes:
        raise ValueError(f"size of {name} must be one of {', '.join(map(str, sizes))}, got {size}")


def check_trained(source: str) -> None:
    """Raise a ValueError unless this may be a trained network: a finished run, or a name of `salnb.load`."""
    kind, _, name = source.partition(":")
    if kind == "timm" and name:
        network(source)
    elif not (kind == "torchvision" and name) and source != "efficientnet_lite0" and not _has_model(source):
        known = "a finished run, torchvision:NAME, timm:NAME or efficientnet_lite0"
        raise ValueError(f"model must be {known}, got {source}")


def _has_model(folder: str) -> bool:
    return Path(folder, "model.json").exists()
