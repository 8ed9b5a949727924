"""Augmentations that cut and mix: without an inverse, so the originals' maps go forward (Section 4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from salnb._common.checks import check_labels, check_labels_to_mix
from salnb._common.limits import check_number
from salnb.augment.base import Augmentation, Draw, Params
from salnb.augment.pieces import are_large, collect, in_pieces, need_grad

__all__ = ["CutMix", "CutMixParams", "CutOut", "CutOutParams", "MixUp", "MixUpParams"]


@dataclass(frozen=True)
class CutOutParams(Params):
    """The box blanked in each image: `(N, 4)` integers, top, left, bottom, right (both excluded)."""

    box: Tensor


@dataclass(frozen=True)
class MixUpParams(Params):
    """Whom each image is mixed with, and how much of itself it keeps.

    Attributes:
        partner: `(N,)` indices into the batch.
        weight: `(N,)` in [0, 1], of the image itself.
    """

    partner: Tensor
    weight: Tensor

    @property
    def mixed(self) -> bool:
        """See `Params.mixed`."""
        return True


@dataclass(frozen=True)
class CutMixParams(MixUpParams):
    """What each image gets from its partner; `weight` is the fraction of the pixels that remain its own.

    Attributes:
        box: `(N, 4)` integers, top, left, bottom and right of the part taken from the partner.
    """

    box: Tensor


M = TypeVar("M", bound=MixUpParams)
# Beta and Dirichlet are drawn through numbers that a smaller alpha would round to zero
ALPHAS = (0.01, 1e6)


def clipped_box(centre: Tensor, sides: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes of given sides about given centres, `(N, 2)` integers each, as far as they lie in the frame.

    Returns:
        `(N, 4)`: top, left, bottom and right, the last two excluded.
    """
    start = centre - sides // 2
    edges = torch.cat([start, start + sides], -1)
    return torch.stack(
        [edge.clamp(0, limit) for edge, limit in zip(edges.unbind(-1), tuple(size) * 2, strict=True)], -1
    )


def inside(box: Tensor, size: Sequence[int]) -> Tensor:
    """A mask `(N, 1, H, W)` that is true inside each box `(N, 4)`."""
    top, left, bottom, right = box[:, :, None].unbind(1)
    row, col = (torch.arange(length, device=box.device) for length in size)
    rows = (row >= top) & (row < bottom)
    columns = (col >= left) & (col < right)
    return (rows[:, :, None] & columns[:, None])[:, None]


def parts(images: Iterable[Tensor], box: Tensor) -> list[Tensor]:
    """What is inside each box `(N, 4)` of N images `(C, H, W)`, as views."""
    boxes = zip(images, box.tolist(), strict=True)
    return [image[:, top:bottom, left:right] for image, (top, left, bottom, right) in boxes]


def mix(own: Tensor, others: Tensor, weight: Tensor) -> Tensor:
    """`weight * own + (1 - weight) * others` for each sample of tensors `(N, ...)`."""
    weight = weight.to(own.dtype).reshape(-1, *[1] * (own.ndim - 1))
    return torch.lerp(others, own, weight)


def class_weights(target: Tensor, num_classes: int | None, dtype: torch.dtype) -> Tensor:
    """Class weights `(N, K)`: the target itself if it has them, else one-hot rows of its labels `(N,)`.

    Labels that are no classes are an error; that of a GPU is its own.
    """
    num_classes = check_labels_to_mix(target, num_classes)
    if target.ndim == 2:
        return target if target.is_floating_point() else target.to(dtype)
    nothing = torch.zeros(len(target), num_classes, dtype=dtype, device=target.device)
    return nothing.scatter(1, target.long()[:, None], 1.0)


def both_targets(target: Tensor, new_target: Tensor, num_classes: int, *, check: bool = True) -> Tensor:
    """The targets of originals and augmented images: (2N,) labels, or (2N, K) weights if any are mixed.

    Without `check`, labels may be no classes, and weights no distributions.
    """
    if check:
        check_labels(target, num_classes)
    if target.ndim < new_target.ndim:
        target = class_weights(target, num_classes, new_target.dtype)
    return torch.cat([target, new_target])


class CutOut(Augmentation[CutOutParams]):
    """Blank a box at a random place of each image, clipped where it leaves the frame (arXiv 1708.04552).

    The maps are blanked likewise, and the box is not valid: nothing of the original is seen there.

    Args:
        size: the box's height and width, as a fraction of the image's.
    """

    params_class = CutOutParams
    piecewise = True
    division = 0

    def __init__(self, size: float = 0.5) -> None:
        super().__init__()
        self.size = check_number("size", size, 0, 1, above=True)

    def _draw(self, draw: Draw) -> CutOutParams:
        centre = torch.stack([draw.integers(length) for length in draw.size], -1)
        sides = [torch.full_like(centre[:, 0], round(self.size * length)) for length in draw.size]
        return CutOutParams(clipped_box(centre, torch.stack(sides, -1), draw.size))

    def _transform(self, images: Tensor, params: CutOutParams) -> Tensor:
        if need_grad(images) or not are_large(images):
            return images.masked_fill(inside(params.box, images.shape[-2:]), 0)
        new = images.clone()
        for hole in parts(new, params.box):
            hole.zero_()
        return new

    def _carry(self, maps: Tensor, params: CutOutParams, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        hole = inside(params.box, maps.shape[-2:])
        return maps.masked_fill(hole, 0), ~hole if valid is None else valid & ~hole


class _Mixing(Augmentation[M]):
    """What mixes each image with a partner from the batch, and labels, as class weights, in the same way."""

    least_samples = 2

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, *ALPHAS)

    def _mixed(self, own: Tensor, others: Tensor, params: M) -> Tensor:
        """Images or maps and those of their partners, put together."""
        raise NotImplementedError

    def _transform(self, images: Tensor, params: M) -> Tensor:
        if not are_large(images):
            return in_pieces(lambda own, some: self._mixed(own, images[some.partner], some), images, params)
        alone, partners = images.split(1), params.partner.tolist()
        mixed = (
            self._mixed(alone[i], alone[partner], params.piece(slice(i, i + 1)))
            for i, partner in enumerate(partners)
        )
        return collect(mixed, images, params.weight)

    def _relabel(self, target: Tensor, params: M, num_classes: int | None) -> Tensor:
        own = class_weights(target, num_classes, params.weight.dtype)
        return mix(own, own[params.partner], params.weight)


class MixUp(_Mixing[MixUpParams]):
    """Mix each image with a partner by a weight from Beta(alpha, alpha) (arXiv 1710.09412).

    The maps of the originals are mixed by the same weight. The larger alpha, from 0.01 to 1e6, the nearer the
    weights are to one half.
    """

    params_class = MixUpParams

    def _draw(self, draw: Draw) -> MixUpParams:
        return MixUpParams(draw.partners(), draw.beta(self.alpha))

    def _mixed(self, own: Tensor, others: Tensor, params: MixUpParams) -> Tensor:
        return mix(own, others, params.weight)

    def _carry(self, maps: Tensor, params: MixUpParams, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        both = None if valid is None else valid & valid[params.partner]
        return self._transform(maps, params), both


class CutMix(_Mixing[CutMixParams]):
    """Replace a box of each image by the same box of a partner (arXiv 1905.04899).

    The box has a share of the area drawn from Beta(alpha, alpha), alpha from 0.01 to 1e6, then clipped; the
    labels are weighted by the real area. The maps of the originals are put together in the same way.
    """

    params_class = CutMixParams

    def _draw(self, draw: Draw) -> CutMixParams:
        side = (1 - draw.beta(self.alpha)).sqrt()
        sides = torch.stack([2 * (side * (length / 2)).long() for length in draw.size], -1)
        centre = torch.stack([draw.integers(length) for length in draw.size], -1)
        box = clipped_box(centre, sides, draw.size)
        taken = (box[:, 2:] - box[:, :2]).prod(-1).to(draw.dtype)
        return CutMixParams(draw.partners(), 1 - taken / (draw.size[0] * draw.size[1]), box)

    def _mixed(self, own: Tensor, others: Tensor, params: CutMixParams) -> Tensor:
        return torch.where(inside(params.box, own.shape[-2:]), others, own)

    def _transform(self, images: Tensor, params: CutMixParams) -> Tensor:
        if need_grad(images) or not are_large(images):
            return super()._transform(images, params)
        new = images.clone()
        others = [images[partner] for partner in params.partner.tolist()]
        for own, other in zip(parts(new, params.box), parts(others, params.box), strict=True):
            own.copy_(other)
        return new

    def _carry(
        self, maps: Tensor, params: CutMixParams, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        both = None if valid is None else self._transform(valid, params)
        return self._transform(maps, params), both
