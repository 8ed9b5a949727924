"""Measures of whether a saliency map can be trusted: five ways to put a map to the test.

* Does it depend on what the network has learnt? `rank_correlation` compares two maps, such as those of a
  trained and of a random network (Adebayo et al., 2018); `correlation` compares them where both are valid.
* Does the network need the pixels that it marks? `deletion_curve` and `insertion_curve` take them away, or
  give them back, in the map's order (Petsiuk et al., 2018).
* Does it mark anything in particular, or is it empty but for a few pixels? `half_area`.
* Does it mark the object, where that is known? `share_on_object`, and `pointing_hit` for its maximum
  (Zhang et al., 2016).

All take maps (N, 1, H, W) without negative values, as `salnb.saliency` makes them, and give one result per
map. A constant map prefers no pixel: it gets what a random one would get on average.
"""

import torch
from torch import Tensor, nn

from salnb._common.checks import (
    as_target,
    at_least_float32,
    check_alike,
    check_device,
    check_finite,
    check_generator,
    check_images,
    check_no_transform,
    check_several_classes,
    check_target,
)
from salnb._common.limits import check_integer
from salnb.saliency.isolation import left_as_found
from salnb.saliency.recording import class_scores, logits_of

__all__ = [
    "correlation",
    "deletion_curve",
    "half_area",
    "insertion_curve",
    "pointing_hit",
    "rank_correlation",
    "share_on_object",
]


def share_on_object(maps: Tensor, masks: Tensor) -> Tensor:
    """The part of a map's total that lies on the object.

    To be held against the part that the object takes of the image, `masks.float().mean((1, 2, 3))`.

    Args:
        maps: (N, 1, H, W), not negative.
        masks: (N, 1, H, W), bool: the pixels of the object.

    Returns:
        (N,), in [0, 1] and in float32 at least; the object's part of the image where a map is zero
        everywhere, and NaN where it holds one.

    Raises:
        TypeError, ValueError: `maps` or `masks` are not as described.

    >>> maps = torch.tensor([[[[3.0, 1.0]]], [[[0.0, 0.0]]]])
    >>> share_on_object(maps, torch.tensor([[[[True, False]]], [[[True, False]]]]))
    tensor([0.7500, 0.5000])
    """
    maps = _check_maps("maps", maps)
    _check_masks(masks, maps)
    maps = maps / _highest(maps)
    whole = maps.sum((1, 2, 3))
    nowhere = whole == 0
    share = (maps * masks).sum((1, 2, 3)) / whole.where(~nowhere, 1)
    return share.where(~nowhere, masks.to(maps.dtype).mean((1, 2, 3)))


def pointing_hit(maps: Tensor, masks: Tensor) -> Tensor:
    """The pointing game: whether a map's maximum lies on the object (Zhang et al., 2016).

    Args:
        maps: (N, 1, H, W), not negative.
        masks: (N, 1, H, W), bool: the pixels of the object.

    Returns:
        (N,), in float32 at least: 1 for a hit, 0 for a miss; where several pixels share the maximum, the part
        of them that lies on the object.

    Raises:
        TypeError, ValueError: `maps` or `masks` are not as described, or a map is not finite.

    >>> maps = torch.tensor([[[[3.0, 1.0]]], [[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    >>> pointing_hit(maps, torch.tensor([[[[True, False]]]]).expand(3, 1, 1, 2))
    tensor([1.0000, 0.0000, 0.5000])
    """
    maps = _check_maps("maps", maps)
    _check_masks(masks, maps)
    check_finite(maps, name="maps")
    highest = maps == maps.amax((1, 2, 3), keepdim=True)
    return (highest & masks).sum((1, 2, 3)).to(maps.dtype) / highest.sum((1, 2, 3))


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation of two maps: do they put the pixels in the same order?

    Only the order counts, so no scale has to be chosen, and a few very bright pixels do not decide. Pixels of
    equal value share the mean of their ranks.

    Args:
        maps: (N, 1, H, W), not negative.
        others: maps of the same shape.

    Returns:
        (N,), from -1 (the opposite order) to 1 (the same order), in float64; 0 where one of the maps is
        constant.

    Raises:
        TypeError, ValueError: the maps are not as described or not finite, or the shapes differ.

    >>> maps = torch.tensor([[[[0.1, 0.2, 0.4]]]])
    >>> round(rank_correlation(maps, maps.square()).item(), 6)
    1.0
    >>> round(rank_correlation(maps, 1 - maps).item(), 6)
    -1.0
    """
    maps, others = _check_maps("maps", maps), _check_maps("others", others)
    check_alike("others", others, "maps", maps)
    return _cosine(_centred_ranks("maps", maps), _centred_ranks("others", others))


def correlation(maps: Tensor, others: Tensor, valid: Tensor | None = None) -> Tensor:
    """Pearson's correlation of two maps, on the pixels where they may be compared.

    Args:
        maps: (N, 1, H, W), of either sign.
        others: maps of the same shape.
        valid: (N, 1, H, W), bool: the pixels that count, such as `Augmentation.align` gives them; None: all.

    Returns:
        (N,), from -1 to 1, in float64; 0 where a map is constant on the pixels that count, or none counts.

    Raises:
        TypeError, ValueError: the maps or `valid` are not as described.

    >>> maps, others = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[2.0, 4.0, 0.0]]]])
    >>> round(correlation(maps, others, torch.tensor([[[[True, True, False]]]])).item(), 6)
    1.0
    """
    check_images(maps, name="maps")
    check_images(others, name="others")
    check_alike("others", others, "maps", maps)
    if valid is None:
        valid = torch.ones_like(maps, dtype=torch.bool)
    _check_masks(valid, maps, name="valid")
    return _cosine(_centred(maps, valid), _centred(others, valid))


def half_area(maps: Tensor) -> Tensor:
    """The smallest share of the pixels that holds half of a map's total: small where a map is empty.

    Args:
        maps: (N, 1, H, W), not negative.

    Returns:
        (N,), from 0 to 0.5 and in float32 at least; 0.5 (rounded to whole pixels) for a constant map, a zero
        map among them, and NaN where a map is not finite.

    Raises:
        TypeError, ValueError: the maps are not as described.

    >>> half_area(torch.tensor([[[[3.0, 1.0, 1.0, 0.0]]], [[[1.0, 1.0, 1.0, 1.0]]]]))
    tensor([0.2500, 0.5000])
    """
    flat = _check_maps("maps", maps).flatten(1).double()
    flat = flat / _highest(flat)
    flat = flat.where(flat.sum(1, keepdim=True) != 0, 1)
    held = flat.sort(1, descending=True).values.cumsum(1)
    # a pixel less than the first sum that reaches half, and that pixel; rounding must not ask for one more
    pixels = (held < held[:, -1:] * (0.5 - 1e-9)).sum(1) + 1
    share = (pixels / flat.shape[1]).to(at_least_float32(maps).dtype)
    return share.where(held[:, -1].isfinite(), torch.nan)


def deletion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Tensor | int | None = None,
    *,
    replacement: Tensor,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The probability of a class while pixels are taken away, the most salient first (Petsiuk et al., 2018).

    The earlier it falls, the better the map knew what the network needs. The area under it,
    `torch.trapezoid(curve, dx=1 / steps)`, says it in one number.

    Args:
        model: maps images to logits (N, K).
        images: (N, C, H, W), floating point.
        maps: (N, 1, H, W), not negative; only the order of the pixels counts.
        target: whose probability is followed. None: the predicted class of each image; an int: this class for
            all; (N,) integers: one class per image; (N, K) floats: a weighted sum of probabilities.
        replacement: (N, C, H, W), or what can be expanded to it: what stands in the place of pixels that are
            gone, such as blurred images or a grey.
        steps: number of forward passes after the first; in each, the same number of pixels goes.
        generator: draws the order of pixels of equal value; None uses the global one.

    Returns:
        (N, `steps` + 1): from nothing replaced to everything replaced.

    Raises:
        TypeError, ValueError: an argument is not as described, images or maps are not finite, or the model
            returns one logit only.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    >>> images, maps = torch.rand(2, 3, 2, 2), torch.rand(2, 1, 2, 2)
    >>> deletion_curve(model, images, maps, replacement=torch.tensor(0.5), steps=4).shape
    torch.Size([2, 5])
    """
    return _curve(model, images, maps, target, replacement, steps, generator, insert=False)


def insertion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Tensor | int | None = None,
    *,
    replacement: Tensor,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The probability of a class while pixels are given back, the most salient first (Petsiuk et al., 2018).

    The earlier it rises, the better. Arguments and errors are those of `deletion_curve`.

    Returns:
        (N, `steps` + 1): from everything replaced to nothing replaced.
    """
    return _curve(model, images, maps, target, replacement, steps, generator, insert=True)


def _curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Tensor | int | None,
    replacement: Tensor,
    steps: int,
    generator: torch.Generator | None,
    *,
    insert: bool,
) -> Tensor:
    check_no_transform()
    check_images(images)
    check_finite(images, name="images")
    if _check_maps("maps", maps).shape != (expected := (len(images), 1, *images.shape[-2:])):
        raise ValueError(f"maps must have shape {expected} for these images, got {tuple(maps.shape)}")
    check_device("maps", maps, "images", images)
    check_finite(maps, name="maps")
    steps = check_integer("steps", steps, 1, 2**31)
    check_generator(generator)
    replacement = _like_images(replacement, images)
    target = as_target(target, len(images))
    with torch.no_grad():
        if target is None:
            target = _logits(model, images).argmax(1)
        place = _place_in_order(maps, generator)
        start, end = (replacement, images) if insert else (images, replacement)
        curve = []
        for step in range(steps + 1):
            mixed = torch.where(place * steps < step * place[0].numel(), end, start)
            logits = _logits(model, mixed)
            check_target(target, logits)
            curve.append(class_scores(at_least_float32(logits).softmax(1), target))
    return torch.stack(curve, dim=1)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of two classes or more, from a model that is left as it was found."""
    with left_as_found(model):
        logits = logits_of(model, images)
    check_several_classes(logits, name="model must return")
    return logits


def _place_in_order(maps: Tensor, generator: torch.Generator | None) -> Tensor:
    """The place (N, 1, H, W) of each pixel in the order of falling saliency, from 0; ties are drawn."""
    flat = maps.flatten(1)
    where = maps.device if generator is None else generator.device
    shuffled = torch.rand(flat.shape, generator=generator, device=where).argsort(1).to(maps.device)
    order = shuffled.gather(1, flat.gather(1, shuffled).argsort(stable=True, dim=1, descending=True))
    numbers = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, numbers).view_as(maps)


def _centred_ranks(name: str, maps: Tensor) -> Tensor:
    """The rank of each pixel (N, H·W) less the mean rank, in float64."""
    check_finite(maps, name=name)
    flat = maps.flatten(1).contiguous()
    ordered = flat.sort(1).values
    below = torch.searchsorted(ordered, flat, right=False)
    not_above = torch.searchsorted(ordered, flat, right=True)
    # equal values take the ranks below … not_above - 1, whose mean this is
    return (below + not_above - flat.shape[1]).double() / 2


def _centred(maps: Tensor, valid: Tensor) -> Tensor:
    """The values (N, H·W) of valid pixels less their mean, in float64; 0 at the others."""
    values, valid = maps.double().flatten(1), valid.flatten(1)
    highest = values.where(valid, -torch.inf).amax(1, keepdim=True)
    below = (values - highest).where(valid, 0)  # zero, without rounding, where a map is constant
    below = below / _highest(below.abs())
    return (below - below.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)).where(valid, 0)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of the rows of two matrices; 0 where a row is zero."""
    lengths = first.norm(dim=1) * second.norm(dim=1)
    return (first * second).sum(1) / lengths.where(lengths > 0, 1)


def _highest(values: Tensor) -> Tensor:
    """The largest value of each map, as a constant: the unit in which no sum and no square overflows."""
    highest = values.detach().flatten(1).amax(1).view(-1, *[1] * (values.ndim - 1))
    return highest.where(highest != 0, 1)


def _like_images(replacement: Tensor, images: Tensor) -> Tensor:
    if not isinstance(replacement, Tensor):
        raise TypeError(f"replacement must be a tensor, got {type(replacement).__name__}")
    try:
        expanded = replacement.to(images).expand_as(images)
    except RuntimeError:
        raise ValueError(
            f"replacement must have, or expand to, the shape of images, {tuple(images.shape)}, "
            f"got {tuple(replacement.shape)}"
        ) from None
    check_finite(expanded, name="replacement")
    return expanded


def _check_maps(name: str, maps: Tensor) -> Tensor:
    """The maps in float32 at least."""
    check_no_transform()
    check_images(maps, name=name)
    if maps.shape[1] != 1:
        raise ValueError(f"{name} must have one channel, (N, 1, H, W), got {tuple(maps.shape)}")
    if (maps < 0).any():
        raise ValueError(f"{name} must not be negative, got {maps.min().item():.4g}: take absolute values")
    return at_least_float32(maps)


def _check_masks(masks: Tensor, maps: Tensor, name: str = "masks") -> None:
    if not isinstance(masks, Tensor) or masks.dtype is not torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{name} must be a tensor of booleans, got {got}")
    check_alike(name, masks, "maps", maps)
