"""Kernels of the geometric augmentations: affine matrices, one resampling, and where its result is real.

Coordinates are pixels from the image's centre, x to the right and y down, pixel centres at whole or half
numbers: `align_corners=False` in PyTorch's words. A matrix `(N, 2, 3)` takes `(x, y)` to
`matrix[:, :, :2] @ (x, y) + matrix[:, :, 2]`. They are multiplied out by hand because `matmul` would run
in half precision under autocast, and a coordinate of half precision is off by a tenth of a pixel at 224.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from salnb.augment.pieces import collect

__all__ = ["Warp", "affine_warp", "compose", "invert", "matrix", "merge", "resample", "valid_mask"]


@dataclass(frozen=True)
class Warp:
    """Where each pixel of the new image is read in the old one.

    Attributes:
        backward: `(N, 2, 3)`, from the new frame to the old one.
        box: `(N, 2, 2)`, lowest and highest x (first row) and y that are read, the outer pixels standing
            for what lies beyond them; None reads zeros beyond the frame.
    """

    backward: Tensor
    box: Tensor | None = None


def matrix(*entries: Tensor) -> Tensor:
    """The matrices `(N, 2, 3)` of six entries `(N,)`, row by row."""
    return torch.stack(entries, -1).unflatten(-1, (2, 3))


def affine_warp(angle: Tensor, scale: Tensor, shift: Tensor, shear: Tensor) -> Warp:
    """The movement that shears, scales and turns about the centre, then shifts.

    As torchvision's `affine`, but positive angles turn counter-clockwise as seen on the displayed image.

    Args:
        angle: `(N,)` degrees.
        scale: `(N,)`, above 1 enlarges.
        shift: `(N, 2)` pixels to the right and down.
        shear: `(N, 2)` degrees along x and y.
    """
    turn = angle.deg2rad()
    cos, sin = turn.cos() / scale, turn.sin() / scale
    along_x, along_y = shear.deg2rad().tan().unbind(-1)
    # of the way back: shear, whose determinant is one, behind turn and scale
    c, d = torch.addcmul(sin, along_y, cos), torch.addcmul(cos, along_y, sin, value=-1)
    a, b = torch.addcmul(cos, along_x, c), torch.addcmul(-sin, along_x, d)
    linear = torch.stack([a, b, c, d], -1).unflatten(-1, (2, 2))
    return Warp(torch.cat([linear, -(linear * shift[:, None]).sum(-1, keepdim=True)], -1))


def invert(affine: Tensor) -> Tensor:
    """The inverse of each affine matrix `(N, 2, 3)`."""
    a, b, x, c, d, y = affine.flatten(1).unbind(-1)
    determinant = torch.addcmul(a * d, b, c, value=-1)
    right, down = torch.addcmul(b * y, d, x, value=-1), torch.addcmul(c * x, a, y, value=-1)
    return matrix(d, -b, right, -c, a, down) / determinant[:, None, None]


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The matrix of `outer(inner(point))`, all of shape `(N, 2, 3)`."""
    product = (outer[:, :, :2, None] * inner[:, None]).sum(2)
    return torch.cat([product[..., :2], product[..., 2:] + outer[..., 2:]], -1)


def merge(first: Warp, second: Warp) -> Warp:
    """One warp that does what the first does and then the second, without resampling in between."""
    box = first.box
    if second.box is not None:
        centre, reach = second.box.mean(-1), second.box.diff(dim=-1)[..., 0] / 2
        centre = (first.backward[..., :2] * centre[:, None]).sum(-1) + first.backward[..., 2]
        reach = (first.backward[..., :2].abs() * reach[:, None]).sum(-1)
        inner = torch.stack([centre - reach, centre + reach], -1)
        box = inner if box is None else torch.minimum(torch.maximum(inner, box[..., :1]), box[..., 1:])
    return Warp(compose(first.backward, second.backward), box)


def coordinates(affine: Tensor, height: int, width: int) -> Tensor:
    """Where a matrix `(N, 2, 3)` takes each pixel of a frame: `(N, 2, H, W)`, x first."""
    # counted from the middle, in whole or half numbers, which are exact
    x, y = (
        torch.arange(-(n - 1) / 2, n / 2, dtype=affine.dtype, device=affine.device) for n in (width, height)
    )
    along = torch.addcmul(affine[:, :, 2:], affine[:, :, :1], x)
    down = affine[:, :, 1:2] * y
    return along[:, :, None] + down[..., None]


def resample(images: Tensor, warp: Warp) -> Tensor:
    """Read images `(N, C, H, W)` bilinearly at the warp's coordinates; beyond the frame they are zero.

    Half precision is computed in float32, for the sake of the coordinates.
    """
    height, width = images.shape[-2:]
    grid = coordinates(_normalised(warp.backward, height, width), height, width)
    if warp.box is not None:
        low, high = _normalised(warp.box, height, width)[..., None, None].unbind(2)
        grid = grid.clamp_(low, high)  # in place: a grid is as large as two images
    sampled = F.grid_sample(images.to(grid.dtype), grid.permute(0, 2, 3, 1), align_corners=False)
    return sampled.to(images.dtype)


def _normalised(values: Tensor, height: int, width: int) -> Tensor:
    """Values `(N, 2, ...)` in pixels along x and y, in the units of `grid_sample`: a frame is -1 to 1."""
    return torch.stack([values[:, 0] * (2 / width), values[:, 1] * (2 / height)], 1)


def slack(size: Sequence[int], dtype: torch.dtype) -> float:
    """How far, in pixels, rounding may move a coordinate, and so the weight it may give a pixel."""
    return 8 * torch.finfo(dtype).eps * max(size)


def valid_mask(warp: Warp, size: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Where all that bilinear interpolation reads is inside the old frame and real: `(N, 1, H, W)` booleans.

    Args:
        warp: of N samples.
        size: height and width of the frame, in pixels.
        valid: `(N, 1, H, W)` booleans, where the old image is real; None is everywhere.
    """
    height, width = size
    edges, more = [(length - 1) / 2 for length in (width, height)], slack(size, warp.backward.dtype)
    # counted from the middle of the box in units of its reach, inside is one comparison for both axes
    if warp.box is None:
        scaled = torch.stack([warp.backward[:, i] / (edge + more) for i, edge in enumerate(edges)], 1)
    else:
        box = torch.stack([warp.box[:, i].clamp(-edge, edge) for i, edge in enumerate(edges)], 1)
        middle = torch.cat([warp.backward[..., :2], warp.backward[..., 2:] - box.mean(-1, keepdim=True)], -1)
        scaled = middle / (box.diff(dim=-1) / 2 + more)
    x, y = coordinates(scaled, height, width).abs_().split(1, 1)
    inside = torch.maximum(x, y) <= 1
    if valid is None:
        return inside
    return inside & fully_valid(resample(valid.to(warp.backward.dtype), warp))


def fully_valid(weight: Tensor) -> Tensor:
    """Where a resampled mask of ones and zeros read ones only."""
    return weight > 1 - slack(weight.shape[-2:], weight.dtype)


def push_maps(maps: Tensor, warp: Warp, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maps `(N, 1, H, W)` moved as the images were, and where only what is inside and valid was read."""
    real = maps if valid is None else maps.where(valid, 0)
    return resample(real, warp), valid_mask(warp, maps.shape[-2:], valid)


def pull_maps(new_maps: Tensor, warps: Sequence[Warp]) -> tuple[Tensor, Tensor]:
    """Bring maps `(N, 1, H, W)` of images after some warps, each a resampling, back with one resampling.

    Returns:
        The maps in the first frame and `valid`, `(N, 1, H, W)`: where all four pixels read in the new
        frame lie in it and show what was in every frame before.
    """
    size = new_maps.shape[-2:]
    real = valid_mask(warps[0], size)
    for warp in warps[1:]:
        real = valid_mask(warp, size, real)
    back = Warp(invert(reduce(compose, [warp.backward for warp in warps])))
    # what was filled in is set to zero before it is read: zero times NaN would be NaN
    known = torch.cat([new_maps.where(real, 0), real.to(new_maps.dtype)], 1)
    maps, weight = resample(known.to(back.backward.dtype), back).split([new_maps.shape[1], 1], 1)
    return maps.to(new_maps.dtype), fully_valid(weight)


def resize_boxes(images: Tensor, box: Tensor) -> Tensor:
    """Cut a box `(N, 4)` (top, left, height, width) out of each image and enlarge it to the image's size.

    The same as `resample` of a warp with that box; faster on a CPU for large images, as it needs no grid.
    """
    size = images.shape[-2:]
    cuts = (
        F.interpolate(image[None, :, top : top + height, left : left + width], size, mode="bilinear")
        for image, (top, left, height, width) in zip(images, box.tolist(), strict=True)
    )
    return collect(cuts, images)
