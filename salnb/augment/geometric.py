"""Augmentations that move pixels and the saliency map with them: flips, affine ones, crops (Sec. 3.1, 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from salnb._common.checks import at_least_float32_dtype
from salnb._common.limits import check_number, check_pair, check_range
from salnb.augment.base import Augmentation, Draw, P, Params, everywhere
from salnb.augment.pieces import apply_where, are_large, in_pieces
from salnb.augment.warp import Warp, affine_warp, matrix, merge, pull_maps, push_maps, resample, resize_boxes

__all__ = ["Affine", "Geometric", "HorizontalFlip", "Rescale", "ResizedCrop", "Rotation", "VerticalFlip"]
__all__ += ["AffineParams", "CropParams", "FlipParams"]

# beyond these a factor leaves nothing to be seen, and in half precision overflows soon
FACTORS = (1e-3, 1e3)


@dataclass(frozen=True)
class FlipParams(Params):
    """Which images are flipped: `(N,)` booleans."""

    flipped: Tensor


@dataclass(frozen=True)
class AffineParams(Params):
    """An affine movement of each image about its centre.

    Attributes:
        angle: `(N,)` degrees, positive counter-clockwise.
        scale: `(N,)`, above 1 enlarges.
        translate: `(N, 2)`, to the right and down, as fractions of width and height.
        shear: `(N, 2)` degrees along x and y.
    """

    angle: Tensor
    scale: Tensor
    translate: Tensor
    shear: Tensor


@dataclass(frozen=True)
class CropParams(Params):
    """The box cut out of each image: `(N, 4)` integers, top, left, height and width in pixels."""

    box: Tensor


class Geometric(Augmentation[P]):
    """An augmentation that moves pixels and can be undone wherever they stayed in the frame."""

    invertible = True
    piecewise = True

    def warp(self, params: P, size: Sequence[int], dtype: torch.dtype) -> Warp:
        """The movement as a warp of a frame of that height and width, computed in the given dtype."""
        raise NotImplementedError

    def _transform(self, images: Tensor, params: P) -> Tensor:
        return move(images, [(self, params)])

    def _carry(self, maps: Tensor, params: P, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return push_forward(maps, [(self, params)], valid)

    def _invert(self, new_maps: Tensor, params: P) -> tuple[Tensor, Tensor]:
        return in_pieces(lambda some, drawn: pull_back(some, [[(self, drawn)]]), new_maps, params)


Step = tuple[Geometric, Params]


def move(images: Tensor, steps: Sequence[Step]) -> Tensor:
    """Take images through steps in a row: flips alone exactly, all else with one resampling.

    Args:
        images: `(N, C, H, W)`.
        steps: first to last, each with its params.
    """
    if _all_flips(steps):
        return _flip_all(images, steps)
    return resample(images, _merged(steps, images))


def push_forward(maps: Tensor, steps: Sequence[Step], valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Take maps through steps in a row as `move` does; and where they hold (None: everywhere)."""
    if _all_flips(steps):
        moved = valid if valid is None else _flip_all(valid, steps)
        return _flip_all(maps, steps), moved
    return push_maps(maps, _merged(steps, maps), valid)


def pull_back(new_maps: Tensor, groups: Sequence[Sequence[Step]]) -> tuple[Tensor, Tensor]:
    """Undo steps with one resampling, or none where all are flips.

    Args:
        new_maps: `(N, 1, H, W)`.
        groups: the steps as the images went through them, one group for each resampling.

    Returns:
        The maps in the first frame, and where they hold.
    """
    steps = [step for group in groups for step in group]
    if _all_flips(steps):  # which undo themselves, in any order
        return _flip_all(new_maps, steps), everywhere(new_maps)
    return pull_maps(new_maps, [_merged(group, new_maps) for group in groups])


def _all_flips(steps: Sequence[Step]) -> bool:
    return all(isinstance(step, _Flip) for step, _ in steps)


def _flip_all(images: Tensor, steps: Sequence[Step]) -> Tensor:
    for step, params in steps:
        mirror = partial(torch.flip, dims=(step.dim,))  # type: ignore[arg-type]
        images = apply_where(params.flipped, mirror, images)  # type: ignore[attr-defined]
    return images


def _merged(steps: Sequence[Step], images: Tensor) -> Warp:
    dtype = at_least_float32_dtype(images.dtype)
    return reduce(merge, [step.warp(params, images.shape[-2:], dtype) for step, params in steps])


class _Flip(Geometric[FlipParams]):
    params_class = FlipParams
    division = 0
    dim: int

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = check_number("p", p, 0, 1)

    def _draw(self, draw: Draw) -> FlipParams:
        return FlipParams(draw.chance(self.p))

    def warp(self, params: FlipParams, size: Sequence[int], dtype: torch.dtype) -> Warp:
        """See `Geometric.warp`."""
        sign = 1 - 2 * params.flipped.to(dtype)
        one, zero = torch.ones_like(sign), torch.zeros_like(sign)
        across, down = (sign, one) if self.dim == -1 else (one, sign)
        return Warp(matrix(across, zero, zero, zero, down, zero))


class HorizontalFlip(_Flip):
    """Exchange left and right of each image with probability p. Exact, on images and maps."""

    dim = -1


class VerticalFlip(_Flip):
    """Exchange top and bottom of each image with probability p. Exact, on images and maps."""

    dim = -2


class Affine(Geometric[AffineParams]):
    """Shear, rescale and turn each image about its centre, then shift it.

    Args:
        degrees: range of the angle, positive counter-clockwise; one number d means from -d to d.
        translate: largest shift across and down, as fractions of width and height.
        scale: range of the factor; above 1 enlarges.
        shear: range of the shear angle in degrees, drawn along x and along y; one number s means
            from -s to s.
    """

    params_class = AffineParams

    def __init__(
        self,
        degrees: float | tuple[float, float] = 30.0,
        translate: tuple[float, float] = (0.1, 0.1),
        scale: tuple[float, float] = (0.8, 1.2),
        shear: float | tuple[float, float] = 10.0,
    ) -> None:
        super().__init__()
        self.degrees = check_range("degrees", degrees, -360, 360, about=0)
        self.translate = check_pair("translate", translate, 0, 1, "a pair (across, down)")
        self.scale = check_range("scale", scale, *FACTORS)
        # the inverse of a shear by 45 degrees both ways is rounded by as much as `warp.slack` leaves room for
        self.shear = check_range("shear", shear, -45, 45, about=0)

    def _draw(self, draw: Draw) -> AffineParams:
        across, down = self.translate
        return AffineParams(
            angle=draw.uniform(*self.degrees),
            scale=draw.uniform(*self.scale),
            translate=torch.stack([draw.uniform(-across, across), draw.uniform(-down, down)], -1),
            shear=draw.uniform(*self.shear, 2),
        )

    def warp(self, params: AffineParams, size: Sequence[int], dtype: torch.dtype) -> Warp:
        """See `Geometric.warp`."""
        height, width = size
        shift = torch.stack([params.translate[:, 0] * width, params.translate[:, 1] * height], -1)
        parts = (params.angle, params.scale, shift, params.shear)
        return affine_warp(*(part.to(dtype) for part in parts))


class Rescale(Affine):
    """Enlarge or shrink each image about its centre by a factor from `scale`; the frame keeps its size."""

    def __init__(self, scale: tuple[float, float] = (0.8, 1.2)) -> None:
        super().__init__(0, (0, 0), scale, 0)


class Rotation(Affine):
    """Turn each image about its centre by an angle from `degrees`; see `Affine`."""

    def __init__(self, degrees: float | tuple[float, float] = 30.0) -> None:
        super().__init__(degrees, (0, 0), (1, 1), 0)


class ResizedCrop(Geometric[CropParams]):
    """Cut a random box out of each image and resize it to the image's size, as Inception did.

    The saliency map of the crop is brought back to where the box was; the rest of the frame is not valid.

    Args:
        scale: range of the box's area, as a fraction of the image's.
        ratio: range of its width over its height, drawn evenly in the logarithm.
    """

    params_class = CropParams
    division = 0
    attempts = 10

    def __init__(
        self, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        super().__init__()
        self.scale = check_range("scale", scale, 0, 1, above=True)
        self.ratio = check_range("ratio", ratio, *FACTORS)

    def _draw(self, draw: Draw) -> CropParams:
        high, wide = draw.size
        area = draw.uniform(*self.scale, self.attempts) * (high * wide)
        ratio = draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), self.attempts).exp()
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], -1).round().long()
        fits = (sides > 0).all(-1) & (sides[..., 0] <= high) & (sides[..., 1] <= wide)
        # the first attempt that fits; where none does, the largest central box of an allowed ratio
        first = sides[torch.arange(len(sides), device=sides.device), fits.byte().argmax(-1)]
        limited = min(max(wide / high, self.ratio[0]), self.ratio[1])
        largest = (max(1, min(high, round(wide / limited))), max(1, min(wide, round(high * limited))))
        found = fits.any(-1)
        height, width = (torch.where(found, first[:, axis], largest[axis]) for axis in (0, 1))
        top = torch.where(found, draw.integers(high - height + 1), (high - height) // 2)
        left = torch.where(found, draw.integers(wide - width + 1), (wide - width) // 2)
        return CropParams(torch.stack([top, left, height, width], -1))

    def warp(self, params: CropParams, size: Sequence[int], dtype: torch.dtype) -> Warp:
        """See `Geometric.warp`."""
        height, width = size
        top, left, tall, wide = params.box.to(dtype).unbind(-1)
        middle = torch.stack([left + (wide - width) / 2, top + (tall - height) / 2], -1)
        none = torch.zeros_like(wide)
        backward = matrix(wide / width, none, middle[:, 0], none, tall / height, middle[:, 1])
        reach = (torch.stack([wide, tall], -1) - 1) / 2
        return Warp(backward, torch.stack([middle - reach, middle + reach], -1))

    def _transform(self, images: Tensor, params: CropParams) -> Tensor:
        if are_large(images):
            return resize_boxes(images, params.box)
        return in_pieces(super()._transform, images, params)
