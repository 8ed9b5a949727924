"""The three losses of Sections 3.2 and 4 (eq. 5, 6 and 7) as plain functions of tensors.

Nothing here knows about models, augmentations or batches of originals and transformed images;
`salnb.Objective` prepares the arguments and adds the three up (eq. 8).

Every function has finite gradients wherever its arguments are finite, and consists of tensor operations only
(no `.item()`, no branch on values), so that `make_fx` and `torch.compile` see all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from salnb._common.checks import (
    at_least_float32,
    check_alike,
    check_device,
    check_labels,
    check_samples,
    check_several_classes,
    check_target_of_logits,
    check_tensors,
    did_you_mean,
)
from salnb._common.limits import check_integer, check_number

T = TypeVar("T")

__all__ = [
    "DISTANCES",
    "FEATURE_DISTANCES",
    "NORMALIZATIONS",
    "class_loss",
    "invariance_loss",
    "normalize_maps",
    "outside_loss",
    "pool_maps",
    "saliency_loss",
    "with_other_images",
]

NORMALIZATIONS = frozenset({"max", "sum", "l2", "zscore", "none"})
"""How `normalize_maps` can put each map on a scale of its own."""

DISTANCES = frozenset({"mse", "l1", "cosine"})
"""How `saliency_loss` can compare two normalised maps."""

FEATURE_DISTANCES = frozenset({"l1", "l2"})
"""How `invariance_loss` can compare the activations of a layer."""

# The smallest standard deviation that "zscore" divides by, as a share of the map's largest absolute value.
# What is flatter is noise: a map constant up to rounding, divided by its deviation, has gradients of 1e8.
_FLAT = 1e-3
_SAME_IMAGE = 1e-6  # images nearer than this, as a share of their features' size, are the same up to rounding


def class_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the class strategy (eq. 5).

    The paper adds the losses of original and transformed image: call this once on both, one behind the other.

    Args:
        logits: class scores (N, K).
        target: labels (N,) of an integer type, or weights of the classes (N, K) for mixed images, at least
            zero and with rows that sum to one. Values are looked at on a CPU only: a GPU would be waited for.

    Returns:
        A scalar.

    Raises:
        TypeError: not tensors.
        ValueError: the shapes do not belong together, there is only one class, weights do not sum to one, or
            a label is no class, as -100 is none.

    >>> class_loss(torch.zeros(4, 10), torch.tensor([0, 1, 2, 3]))
    tensor(2.3026)
    """
    check_tensors({"logits": logits, "target": target})
    if logits.ndim != 2:
        raise ValueError(f"logits must be (N, K), got {tuple(logits.shape)}")
    check_several_classes(logits, name="class_loss needs")
    check_target_of_logits(target, logits)
    check_labels(target, logits.shape[1])
    logits = at_least_float32(logits)
    target = target.long() if target.ndim == 1 else target.to(logits.dtype)
    return F.cross_entropy(logits, target)  # eq. 5


def invariance_loss(
    features: Mapping[str, Tensor] | Sequence[Tensor],
    new_features: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    distance: str = "l2",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    relative: bool = False,
) -> Tensor:
    """Distance between the activations of original and transformed images (eq. 6).

    The distance of a layer is the **mean** over its elements, of absolute differences ("l1") or squared
    ones ("l2"). The paper leaves the scale open; a sum would let the layer with the most units outweigh
    the others by orders of magnitude. The layers are summed, as in the paper.

    `relative` puts each layer on a scale of its own: its distance is divided by that between *different*
    images of the batch, each original and the transformed image of the one before it.
    It is one where a layer tells transformations apart as well as images, and zero where it tells images only
    (after Hernández-García et al., 2019, who compare all pairs).

    Args:
        features: activations of the originals, one tensor (N, ...) per layer, by name or in order.
        new_features: those of the transformed images, under the same names or in the same order.
        distance: "l1" or "l2".
        weights: factor of each layer, by name or in order; None counts every layer once.
        relative: divide each layer's distance by that between different images; takes two images at least.

    Returns:
        A scalar.

    Raises:
        ValueError: there is no layer, layers or shapes do not correspond, `distance` is unknown, or there is
            but one image to be `relative` to.

    >>> old, new = {"conv": torch.zeros(2, 3, 4, 4)}, {"conv": torch.full((2, 3, 4, 4), 2.0)}
    >>> invariance_loss(old, new), invariance_loss(old, new, distance="l1")
    (tensor(4.), tensor(2.))
    """
    _check_known("distance", distance, FEATURE_DISTANCES)
    layers = _by_name("features", features)
    new_layers = _by_name("new_features", new_features)
    factors = dict.fromkeys(layers, 1.0) if weights is None else _by_name("weights", weights)
    if not layers:
        raise ValueError("features must hold at least one layer, got none")
    for argument, given in (("new_features", new_layers), ("weights", factors)):
        if given.keys() != layers.keys():
            raise ValueError(f"{argument} must have the layers {list(layers)} of features, got {list(given)}")
    for name, factor in factors.items() if weights is not None else ():
        if not isinstance(factor, Tensor):  # one may be learnt
            check_number(f"weights[{name!r}]", factor, -sys.float_info.max, sys.float_info.max)
    compare = F.l1_loss if distance == "l1" else F.mse_loss
    terms = []
    for name, old in layers.items():
        new = new_layers[name]
        check_tensors({f"features[{name!r}]": old, f"new_features[{name!r}]": new})
        check_alike(f"new_features[{name!r}]", new, f"features[{name!r}]", old)
        new, old = at_least_float32(new), at_least_float32(old)
        apart = compare(new, old)
        if relative:
            apart = apart / _between_images(name, compare, new, old)
        terms.append(factors[name] * apart)
    return torch.stack(terms).sum()  # eq. 6


def _between_images(
    name: str, compare: Callable[[Tensor, Tensor], Tensor], new: Tensor, old: Tensor
) -> Tensor:
    """The distance of different images in a layer, above zero also where the layer tells none apart."""
    if len(old) < 2:
        raise ValueError(
            f"relative compares different images, of which features[{name!r}] must hold two at least, "
            f"got {tuple(old.shape)}"
        )
    size = compare(old, torch.zeros_like(old)).detach()
    return compare(new.roll(1, 0), old) + _SAME_IMAGE * size + torch.finfo(old.dtype).tiny


def normalize_maps(maps: Tensor, valid: Tensor | None = None, how: str | None = "max") -> Tensor:
    """Put every map on a scale of its own, so that only *where* it is high matters (Section 4).

    "max" divides by the largest absolute value, "sum" by the sum of the absolute values, "l2" by the root of
    the sum of squares; "zscore" takes away the mean and divides by the (population) standard deviation;
    "none" or None changes nothing. The statistics are those of the valid pixels.

    A constant factor on a map changes nothing, however small or large. The gradient is finite for every map:
    a zero map stays zero, and "zscore" divides by no less than a thousandth of the map's largest absolute
    value, so that a constant map becomes zero.

    Args:
        maps: (N, C, H, W); the channels of a sample share one scale.
        valid: where to look, (N, 1, H, W) or (N, C, H, W) of `bool`; None is everywhere.
        how: one of `NORMALIZATIONS`, or None.

    Returns:
        The normalised maps, (N, C, H, W), zero where not valid; half precision comes back as float32.

    Raises:
        ValueError: `how` is unknown, or a shape or type is wrong.

    >>> normalize_maps(torch.tensor([[[[1.0, 2.0, 4.0]]]]))
    tensor([[[[0.2500, 0.5000, 1.0000]]]])
    """
    how = "none" if how is None else how
    _check_known("how", how, NORMALIZATIONS)
    _check_maps(maps, valid)
    maps = at_least_float32(maps)
    valid = torch.ones_like(maps, dtype=torch.bool) if valid is None else valid.expand_as(maps)
    # where() rather than a product: what is not valid may be infinite or not a number
    maps = torch.where(valid, maps, 0)
    if how == "none":
        return maps
    pixels = (1, 2, 3)
    peak = maps.abs().amax(pixels, keepdim=True)
    # a peak whose inverse overflows is no scale to divide by: take such a map as zero
    limits = torch.finfo(maps.dtype)
    zero = peak <= limits.tiny / limits.eps
    # whatever the scale of the map was, from here on its largest absolute value is 1
    maps = maps / torch.where(zero, 1, peak)
    if how == "max":
        return maps
    if how == "zscore":
        count = valid.sum(pixels, keepdim=True).clamp(min=1)
        centred = torch.where(valid, maps - maps.sum(pixels, keepdim=True) / count, 0)
        variance = centred.square().sum(pixels, keepdim=True) / count
        return centred / variance.clamp(min=_FLAT**2).sqrt()
    if how == "sum":
        return maps / torch.where(zero, 1, maps.abs().sum(pixels, keepdim=True))
    return maps / torch.where(zero, 1, maps.square().sum(pixels, keepdim=True)).sqrt()


def pool_maps(maps: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """The mean of each block of pixels, so that a coarser question is asked: which part, not which pixel.

    Args:
        maps: (N, C, H, W).
        valid: where to look, (N, 1, H, W) or (N, C, H, W) of `bool`; None is everywhere.
        size: side of a block in pixels; blocks at the right and lower rim may be smaller.

    Returns:
        The mean of each block's valid pixels, (N, C, h, w), zero where it has none, and which blocks have
        one, of the shape of `valid` but for height and width, which are divided by `size` and rounded up.

    Raises:
        TypeError: `maps` or `valid` is no tensor, or `size` no whole number.
        ValueError: a shape or type is wrong, or `size` is not between 1 and the shorter side.

    >>> pool_maps(torch.tensor([[[[1.0, 3.0, 7.0], [1.0, 3.0, 5.0]]]]), None, 2)[0]
    tensor([[[[2., 6.]]]])
    """
    _check_maps(maps, valid)
    shorter = min(maps.shape[2:])
    size = check_integer("pool", size, -(2**62), 2**62)
    if not 1 <= size <= shorter:
        raise ValueError(f"pool must be between 1 and the shorter side of the maps, {shorter}, got {size}")
    maps = at_least_float32(maps)
    valid = torch.ones_like(maps[:, :1], dtype=torch.bool) if valid is None else valid
    # smaller blocks at the rim are averaged over what they have, in both, so that the quotient is right
    share = F.avg_pool2d(valid.to(maps.dtype), size, ceil_mode=True)
    mean = F.avg_pool2d(torch.where(valid, maps, 0), size, ceil_mode=True)
    found = share > 0
    return mean / torch.where(found, share, 1), found


def saliency_loss(
    maps: Tensor,
    new_maps: Tensor,
    valid: Tensor | None = None,
    *,
    normalize: str | None = "max",
    distance: str = "mse",
    pool: int = 1,
) -> Tensor:
    """Distance between the saliency maps of original and transformed images (eq. 7).

    Both maps have to be in one frame already (`aug.align`). Each is pooled where that is asked for
    (`pool_maps`), normalised on its own (`normalize_maps`), and the two are compared where they are valid:
    by the mean over these pixels of the squared ("mse", the paper's) or absolute ("l1") difference, or by one
    minus their cosine ("cosine"). The result is the mean over the samples that have a valid pixel, zero if
    none has one.

    The cosine distance is computed as half the squared distance between unit vectors. So it is exactly zero
    for equal maps, two zero maps are no distance apart, and a zero map is 0.5 away from any other.

    Args:
        maps: maps of the originals, (N, 1, H, W) or (N, C, H, W).
        new_maps: maps of the transformed images, of the same shape.
        valid: where to compare, (N, 1, H, W) or (N, C, H, W) of `bool`; None is everywhere.
        normalize: one of `NORMALIZATIONS`; None is "none".
        distance: one of `DISTANCES`.
        pool: side of the blocks whose means are compared, in pixels; 1 compares pixels, as the paper does.

    Returns:
        A scalar.

    Raises:
        ValueError: `normalize` or `distance` is unknown, or `pool`, a shape or a type is wrong.

    >>> maps = torch.tensor([[[[1.0, 2.0], [0.0, 4.0]]]])
    >>> saliency_loss(maps, 10 * maps), saliency_loss(maps, maps.flip(-1))
    (tensor(0.), tensor(0.5312))
    """
    _check_known("normalize", "none" if normalize is None else normalize, NORMALIZATIONS)
    _check_known("distance", distance, DISTANCES)
    check_tensors({"maps": maps, "new_maps": new_maps})
    check_alike("new_maps", new_maps, "maps", maps)
    if pool != 1:
        new_maps, _ = pool_maps(new_maps, valid, pool)
        maps, valid = pool_maps(maps, valid, pool)
    a, b = normalize_maps(maps, valid, normalize), normalize_maps(new_maps, valid, normalize)
    pixels = (1, 2, 3)
    if valid is None:
        count = torch.full_like(a[:, 0, 0, 0], a[0].numel())
    else:
        count = valid.expand_as(a).sum(pixels).to(a.dtype)
    if distance == "cosine" and normalize != "zscore":
        each = (normalize_maps(a, valid, "l2") - normalize_maps(b, valid, "l2")).square().sum(pixels) / 2
    else:
        difference = (a - b).abs() if distance == "l1" else (a - b).square()
        each = difference.sum(pixels) / count.clamp(min=1)  # eq. 7
        if distance == "cosine":  # z-scores have the length of sqrt(count), or less where it would be noise
            each = each / 2
    # a sample without a valid pixel has a distance of zero already
    return each.sum() / (count > 0).sum().clamp(min=1)


def outside_loss(maps: Tensor, masks: Tensor, known: Tensor | None = None) -> Tensor:
    """The square of the saliency maps outside the object: "right for the right reasons" (Ross et al., 2017).

    Theirs are maps of the sum of all classes' log-probabilities, which do not vanish where a network is sure.

    Args:
        maps: (N, 1, H, W) or (N, C, H, W).
        masks: (N, 1, H, W), bool: the pixels of the object.
        known: (N,), bool: which samples count; None: all.

    Returns:
        A scalar, the sum over the pixels, and the mean over the samples that count; zero if there is none.

    Raises:
        ValueError: a shape or type is wrong.

    >>> outside_loss(torch.tensor([[[[3.0, 2.0]]]]), torch.tensor([[[[True, False]]]]))
    tensor(4.)
    """
    _check_maps(maps, masks, "masks")
    check_samples("known", known, maps)
    each = at_least_float32(maps).masked_fill(masks, 0).square().sum((1, 2, 3))
    return each.mean() if known is None else (each * known).sum() / known.sum().clamp(min=1)


def with_other_images(maps: Tensor, new_maps: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair each map with the one before it in the batch, the first with the last: the control of eq. 7.

    A loss that falls with such pairs as well does not fall because the maps of an image agree.

    Args:
        maps: maps of the originals, (N, C, H, W), as `Augmentation.align` gives them.
        new_maps: maps of the transformed images, of the same shape.
        valid: where each pair may be compared, (N, 1, H, W), bool.

    Returns:
        The originals' maps, those of the image before, and where both are valid.

    Raises:
        ValueError: there is no other image in the batch.

    >>> maps = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    >>> with_other_images(maps, maps, maps > 0)[1].flatten()
    tensor([3., 1., 2.])
    """
    if len(maps) < 2:
        raise ValueError(f"maps to shuffle must be of two images at least, got {len(maps)}")
    return maps, new_maps.roll(1, 0), valid & valid.roll(1, 0)


def _check_maps(maps: Tensor, valid: Tensor | None, name: str = "valid") -> None:
    check_tensors({"maps": maps} if valid is None and name == "valid" else {"maps": maps, name: valid})
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ValueError(f"maps must be floating-point (N, C, H, W), got {tuple(maps.shape)} of {maps.dtype}")
    if valid is None:
        return
    n, _, *size = maps.shape
    if valid.dtype is not torch.bool or valid.shape not in (maps.shape, (n, 1, *size)):
        raise ValueError(
            f"{name} must be bool of {(n, 1, *size)} or of the shape of maps {tuple(maps.shape)}, "
            f"got {tuple(valid.shape)} of {valid.dtype}"
        )
    check_device(name, valid, "maps", maps)


def _check_known(argument: str, given: str, allowed: frozenset[str]) -> None:
    if not isinstance(given, str) or given not in allowed:
        names = sorted(allowed)
        raise ValueError(f"{argument} must be one of {names}, got {given!r}{did_you_mean(given, names)}")


def _by_name(argument: str, given: Mapping[str, T] | Sequence[T]) -> dict[str, T]:
    """A mapping as it is, a sequence by position."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, Sequence):
        return {str(i): item for i, item in enumerate(given)}
    raise ValueError(f"{argument} must be a dict or a sequence, got {type(given).__name__}")
