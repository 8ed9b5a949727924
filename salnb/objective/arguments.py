"""The arguments of `Objective`, each checked under its name."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from salnb._common.checks import check_mask
from salnb._common.limits import check_integer, check_number

__all__ = [
    "as_options",
    "check_pairs",
    "check_scalars",
    "check_state",
    "layer_weights",
    "whole_number",
]

_WEIGHTS = ("alpha", "beta", "gamma", "consistency", "confidence", "balance")
_FLAGS = ("layer_relative", "detach_original", "shuffle_pairs", "originals_only")


def check_scalars(given: Mapping[str, Any]) -> None:
    """Raise a TypeError or a ValueError that names the first wrong weight or flag of an `Objective`."""
    for name in _WEIGHTS:
        _check_weight(name, given[name])
    for name in _FLAGS:
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be True or False, got {given[name]!r}")


def _check_weight(name: str, value: Any) -> None:
    """Raise a TypeError or a ValueError unless this is a finite number of at least 0."""
    allowed = f"{name} must be a finite number of at least 0"
    scalar: Any = Real | Tensor
    if isinstance(value, bool) or not isinstance(value, scalar) or getattr(value, "ndim", False):
        raise TypeError(f"{allowed}, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{allowed}, got {value}")


def as_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a saliency method, whatever their names; a TypeError if they have none."""
    if not (given is None or isinstance(given, Mapping)):
        raise TypeError(f"method_options must be a mapping from names to values, got {given!r}")
    return dict(given or {})


def whole_number(name: str, value: int, least: int) -> int:
    """The value as an int, if it is a whole number of at least so much."""
    number = check_integer(name, value, -(2**62), 2**62)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def layer_weights(layers: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The weight of each layer by its name; whether the model has it is not looked at.

    Raises:
        TypeError, ValueError: neither a sequence of names nor a mapping from them to weights.
    """
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a sequence of names, or a mapping to weights, got {layers!r}")
    names = list(layers)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers must hold names of modules, got {name!r}")
    given = layers if isinstance(layers, Mapping) else dict.fromkeys(names, 1.0)
    highest = sys.float_info.max
    return {name: check_number(f"layers[{name!r}]", given[name], 0, highest) for name in names}


def check_state(state: Tensor) -> None:
    """Raise a ValueError unless this is what `Objective.get_extra_state` gives, or an average of such."""
    if state.shape not in ((), (3,)) or not state.isfinite().all() or (state < 0).any():
        raise ValueError(
            "_extra_state must hold the number of steps done, alone or with the two lengths of balance, "
            f"finite and at least 0, got {state.tolist()}"
        )


def check_pairs(images: Tensor, partners: Tensor | None, masks: Tensor | None) -> None:
    """Raise unless `partners` are like images (N, C, H, W), and `masks` are (N, 1, H, W) booleans.

    Raises:
        TypeError: not a tensor, or partners of another dtype.
        ValueError: another shape, or masks of another dtype.
    """
    if partners is not None:
        if not isinstance(partners, Tensor):
            raise TypeError(f"partners must be a tensor like images, got {type(partners).__name__}")
        if partners.shape != images.shape:
            raise ValueError(
                f"partners must have the shape of images, {tuple(images.shape)}, got {tuple(partners.shape)}"
            )
        if partners.dtype is not images.dtype:
            raise TypeError(f"partners must have the dtype of images, {images.dtype}, got {partners.dtype}")
    if masks is not None:
        check_mask("masks", masks, images)
