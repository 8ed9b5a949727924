"""The arguments of `Objective`, each checked under its name."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from salnb._common.catalog import METHODS, SCORES, check_balance, check_confidence
from salnb._common.checks import check_device, check_mask, check_training_target, unknown
from salnb._common.limits import check_integer, check_number
from salnb._common.outputs import check_output
from salnb.augment import Augmentation
from salnb.losses import DISTANCES, FEATURE_DISTANCES, NORMALIZATIONS

__all__ = ["NO_PARTS", "check_batch", "check_state", "checked_settings", "snapshot"]

_WEIGHTS = ("alpha", "beta", "gamma", "consistency", "confidence", "balance")
# what is kept as it is given, also where it is a parameter or module, which it must not be part of
NO_PARTS = {*_WEIGHTS, "output"} - {"balance"}
# the other arguments, which say of what the terms are
_OTHERS = (
    *("model", "augmentation", "layers", "layer_distance", "layer_relative", "method", "method_options"),
    *("score", "normalize", "distance", "pool", "every", "warmup", "detach_original", "shuffle_pairs"),
    *("originals_only", "num_classes", "class_loss", "output"),
)
_FLAGS = ("layer_relative", "detach_original", "shuffle_pairs", "originals_only")


def checked_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What can be told from the arguments of an `Objective` without running the model.

    Args:
        given: the arguments by name.

    Returns:
        Those that are kept in another form than they may be given in.

    Raises:
        TypeError, ValueError: one is not allowed; the message names it.
    """
    if not isinstance(given["model"], nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(given['model']).__name__}")
    _check_scalars(given)
    kept: dict[str, Any] = {
        name: _whole_number(name, given[name], least)
        for name, least in (("pool", 1), ("every", 1), ("warmup", 0), ("num_classes", 1))
        if given[name] is not None or name != "num_classes"
    }
    kept |= {"layers": _layer_weights(given["layers"]), "method_options": _options(given["method_options"])}
    check_output(given["output"])
    if isinstance(given["output"], nn.Module) and given["output"].state_dict():
        got = type(given["output"]).__name__
        raise TypeError(
            f"output must have no parameters and buffers, which nothing would train, got a {got}: let the "
            "model run it"
        )
    check_confidence(given["confidence"], given["consistency"], given["originals_only"])
    if given["confidence"] and given["class_loss"] is not None:
        raise ValueError(
            "confidence and class_loss do not go together: leave images without a label out of a loss "
            "of your own by its ignore_index, or class_loss out"
        )
    check_balance(given["balance"], given["alpha"], given["gamma"])
    _check_names(given)
    if not isinstance(given["augmentation"], Augmentation):
        got = type(given["augmentation"]).__name__
        raise TypeError(f"augmentation must be one of salnb.augment, got {got}")
    return kept


def snapshot(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """Arguments of an `Objective` in a form that is equal while they are: the weights, and all others.

    Whether there is an invariance and a saliency term is among the latter.
    """
    weights = tuple((type(given[name]), given[name]) for name in _WEIGHTS)  # True and 1 are equal
    others = (given[name] for name in _OTHERS)
    frozen = tuple((type(v), tuple(v.items()) if isinstance(v, Mapping) else v) for v in others)
    return weights, (*frozen, bool(given["beta"]), bool(given["gamma"]))


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first argument whose value is not among those that there are."""
    known: dict[str, Iterable[str]] = {
        "method": METHODS,
        "normalize": sorted(NORMALIZATIONS),
        "distance": sorted(DISTANCES),
        "layer_distance": sorted(FEATURE_DISTANCES),
        "score": SCORES,
    }
    for name, values in known.items():
        value = "none" if name == "normalize" and given[name] is None else given[name]
        if value not in [*values]:
            raise unknown(name, value, [*values])


def _check_scalars(given: Mapping[str, Any]) -> None:
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
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{allowed} that requires no gradient, got one that does: detach() it, or weigh the losses of "
            "the result yourself"
        )
    if not 0 <= value < float("inf"):
        raise ValueError(f"{allowed}, got {value}")


def _options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a saliency method, whatever their names; a TypeError if they have none."""
    if not (given is None or isinstance(given, Mapping)):
        raise TypeError(f"method_options must be a mapping from names to values, got {given!r}")
    return dict(given or {})


def _whole_number(name: str, value: int, least: int) -> int:
    """The value as an int, if it is a whole number of at least so much."""
    number = check_integer(name, value, -(2**62), 2**62)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _layer_weights(layers: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
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


def check_batch(
    model: nn.Module, images: Tensor, target: Tensor, partners: Tensor | None, masks: Tensor | None
) -> None:
    """Raise unless what comes beside the images (N, C, H, W) goes with them.

    These are labels or weights, `partners` like images, and `masks`, (N, 1, H, W) booleans.

    Raises:
        TypeError: not a tensor, labels that are no integers, or partners of another dtype.
        ValueError: another shape or device, or masks of another dtype.
    """
    check_training_target(target, len(images))
    # a model on several devices has its logits, and wants the labels, on any of them
    if target.device != images.device and len({p.device for p in model.parameters()}) < 2:
        check_device("target", target, "images", images)
    if partners is not None:
        if not isinstance(partners, Tensor):
            raise TypeError(f"partners must be a tensor like images, got {type(partners).__name__}")
        if partners.shape != images.shape:
            raise ValueError(
                f"partners must have the shape of images, {tuple(images.shape)}, got {tuple(partners.shape)}"
            )
        if partners.dtype is not images.dtype:
            raise TypeError(f"partners must have the dtype of images, {images.dtype}, got {partners.dtype}")
        check_device("partners", partners, "images", images)
    if masks is not None:
        check_mask("masks", masks, images)
