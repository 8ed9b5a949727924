"""How far a network's maps of originals and augmented images agree: whether the saliency loss has taken.

The value of eq. 7 does not tell: where maps are divided by their maximum, it falls as they become empty, too.
Their correlation does, and beside it that with another image's map, which agreement alone does not raise.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salnb import saliency, trust
from salnb.augment import Augmentation
from salnb.augment.mixing import both_targets
from salnb.losses import pool_maps, saliency_loss, with_other_images

__all__ = ["BLOCK", "Agreement", "agreement"]

BLOCK = 4
"""Side of the blocks of pixels whose means are correlated beside the pixels."""


class Agreement(NamedTuple):
    """What `agreement` finds of N images, each (N,) but the distance.

    Attributes:
        correlation: of each original's map with that of its augmented image, where both are valid.
        correlation_4x4: the same of the means of blocks of 4×4 pixels.
        correlation_others: of each original's map with the map of *another* augmented image.
        map_distance: eq. 7, a scalar.
        half_area: the share of the pixels that holds half of a map, the mean of both maps.
    """

    correlation: Tensor
    correlation_4x4: Tensor
    correlation_others: Tensor
    map_distance: Tensor
    half_area: Tensor


def agreement(
    model: nn.Module,
    augmentation: Augmentation,
    images: Tensor,
    target: Tensor,
    generator: torch.Generator | None = None,
    *,
    partners: Tensor | None = None,
    num_classes: int,
    method: str = "vanilla_gradient",
    method_options: Mapping[str, Any] | None = None,
    score: str = "logit",
    **loss: Any,
) -> Agreement:
    """Compare the maps of images with those of the same images augmented.

    In eval mode each map is that of its image alone; the model is left as it was found.

    Args:
        model: maps images (N, C, H, W) to logits (N, K).
        augmentation: one of `salnb.augment`.
        images: (N, C, H, W), in [0, 1]; two at least.
        target: (N,) labels or (N, K) weights, of the originals.
        generator: source of what the augmentation draws; seeded alike, it draws alike.
        partners: (N, C, H, W), images to augment in the place of `images`; see `salnb.Objective`.
        num_classes: K.
        method: a key of `salnb.saliency.METHODS`.
        method_options: its keyword arguments.
        score: "logit" or "log_prob".
        **loss: of `salnb.losses.saliency_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as augmentation, method and `saliency_loss` do.
    """
    with torch.no_grad():
        params = augmentation.make_params(images, generator)
        new_images = augmentation.images(images if partners is None else partners, params)
        targets = both_targets(target, augmentation.targets(target, params, num_classes), num_classes)
    options = {"score": score, **(method_options or {})}
    maps = saliency.METHODS[method](model, torch.cat([images, new_images]), targets, **options)
    with torch.no_grad():
        n = len(images)
        aligned = augmentation.align(maps[:n], maps[n:], params)
        first, second, valid = aligned
        block = min(BLOCK, *maps.shape[-2:])
        (coarse, found), (new_coarse, _) = (pool_maps(m, valid, block) for m in (first, second))
        return Agreement(
            trust.correlation(*aligned),
            trust.correlation(coarse, new_coarse, found),
            trust.correlation(*with_other_images(*aligned)),
            saliency_loss(*aligned, **loss),
            trust.half_area(maps).view(2, n).mean(0),
        )
