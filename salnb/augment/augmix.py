"""AugMix (arXiv 1912.02781): chains of operations, mixed with one another and with the original."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salnb._common.checks import at_least_float32, at_least_float32_dtype
from salnb._common.limits import check_integer, check_number
from salnb.augment.base import Augmentation, Draw, Params, column
from salnb.augment.mixing import ALPHAS
from salnb.augment.photometric import check_channels
from salnb.augment.pieces import apply_where, on_cpu
from salnb.augment.warp import Warp, affine_warp, compose, fully_valid, resample

__all__ = ["AugMix", "AugMixParams"]

COLOURS = ("autocontrast", "equalize", "posterize", "solarize")
OPERATIONS = (*COLOURS, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")
FIRST_GEOMETRIC = len(COLOURS)
NONE = -1


@dataclass(frozen=True)
class AugMixParams(Params):
    """The chains of each image.

    Attributes:
        operation: `(N, width, depth)` indices into `OPERATIONS`, -1 where a chain has ended.
        level: `(N, width, depth)`, the strength, on a scale to 10; its sign is the direction of movements.
        chain_weight: `(N, width)`, sums to 1.
        mixed_weight: `(N,)` in [0, 1]: of the mixed chains; the original has the rest.
    """

    operation: Tensor
    level: Tensor
    chain_weight: Tensor
    mixed_weight: Tensor


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to the range from 0 to 1; a constant channel stays as it is."""
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    constant = low == high
    return ((images - low.where(~constant, 0)) / (high - low).where(~constant, 1)).clamp(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Spread the 256 grey levels of each channel of each image evenly, as Pillow does. It has no gradient."""
    exact = at_least_float32(images.detach())
    levels = (exact * 255.999).long().flatten(-2)
    histogram = torch.zeros(*images.shape[:2], 256, dtype=torch.long, device=images.device)
    histogram = histogram.scatter_add(-1, levels, torch.ones_like(levels[..., :1]).expand_as(levels))
    below = histogram.cumsum(-1) - histogram
    brightest = histogram.gather(-1, levels.amax(-1, keepdim=True))
    step = (levels.shape[-1] - brightest) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return (table.to(images.dtype) / 255).gather(-1, levels).view_as(images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep `bits` `(N,)` bits of each value. It has no gradient."""
    levels = column(2**bits, images)
    return (images * levels).floor().clamp(min=0).minimum(levels - 1) / levels


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from a threshold `(N,)` upwards."""
    return torch.where(images >= column(threshold, images), 1 - images, images)


def step_matrix(operation: Tensor, level: Tensor, size: Sequence[int]) -> Tensor:
    """The movement of one step, `(N, 2, 3)` from the new frame to the old; none for what is not geometric.

    At level 10 an image is turned by 30 degrees, sheared by 0.3 or shifted by a third of its side, all
    about its centre. The level is signed.
    """
    height, width = size

    def amount(name: str, at_ten: float) -> Tensor:
        return (at_ten / 10 * level).where(operation == OPERATIONS.index(name), 0)

    shear = torch.stack([amount("shear_x", 0.3), amount("shear_y", 0.3)], -1).atan().rad2deg()
    shift = torch.stack([amount("translate_x", width / 3), amount("translate_y", height / 3)], -1)
    return affine_warp(amount("rotate", 30), torch.ones_like(level), shift, shear).backward


def recolour(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Apply the photometric operation of one step to each image that has one.

    At level 10 no bits are left of four, and everything is inverted.
    """
    bits = 4 - (0.4 * level.abs()).long()
    threshold = (256 - (25.6 * level.abs()).floor()) / 255
    images = apply_where(operation == OPERATIONS.index("autocontrast"), autocontrast, images)
    images = apply_where(operation == OPERATIONS.index("equalize"), equalize, images)
    images = apply_where(operation == OPERATIONS.index("posterize"), posterize, images, bits)
    return apply_where(operation == OPERATIONS.index("solarize"), solarize, images, threshold)


def run_chain(images: Tensor, operation: Tensor, level: Tensor, movement: Tensor, *, colours: bool) -> Tensor:
    """Take each image through its chain; movements in a row are one resampling.

    Args:
        images: `(N, C, H, W)`, or maps, which only move.
        operation: `(N, depth)`.
        level: `(N, depth)`.
        movement: `(N, depth, 2, 3)`, the `step_matrix` of each step.
        colours: whether photometric operations act; they do not on maps.
    """
    coloured = (operation > NONE) & (operation < FIRST_GEOMETRIC)
    still = torch.eye(2, 3, dtype=movement.dtype, device=movement.device)
    matrix, moved = still.expand_as(movement[:, 0]), torch.zeros_like(coloured[:, 0])

    def settle(images: Tensor, chosen: Tensor) -> Tensor:
        return apply_where(chosen, lambda some, back: resample(some, Warp(back)), images, matrix)

    for step in range(operation.shape[1]):
        kind, recoloured = operation[:, step], coloured[:, step]
        if _any(recoloured):
            images = settle(images, recoloured & moved)
            if colours:
                images = recolour(images, kind, level[:, step])
            matrix = still.where(recoloured[:, None, None], matrix)
        matrix = compose(matrix, movement[:, step])
        moved = (moved & ~recoloured) | (kind >= FIRST_GEOMETRIC)
    return settle(images, moved)


def _any(chosen: Tensor) -> bool:
    """Whether any sample may be chosen; where that is not known, yes."""
    return not on_cpu(chosen) or bool(chosen.any())


class AugMix(Augmentation[AugMixParams]):
    """Mix each image with `width` chains of random operations applied to it (arXiv 1912.02781).

    Movements of a chain move the map of the chain, photometric operations do not; the maps of the chains are
    mixed with the original's by the weights that mix the images. A pixel that any chain filled in is not
    valid.

    Args:
        severity: strength of the operations, from 0.1 to 10.
        width: number of chains.
        depth: operations in a chain; -1 draws 1, 2 or 3 for each chain.
        alpha: from 0.01 to 1e6; of the Dirichlet distribution of the chains' weights and of the Beta
            distribution of their share against the original.
    """

    params_class = AugMixParams
    unit_range = True
    piecewise = True
    division = 8

    def __init__(self, severity: float = 3.0, width: int = 3, depth: int = -1, alpha: float = 1.0) -> None:
        super().__init__()
        self.severity = check_number("severity", severity, 0.1, 10)
        self.width = check_integer("width", width, 1, 100)
        self.depth = check_integer("depth", depth, -1, 100)
        if self.depth != -1:
            check_integer("depth", depth, 1, 100)
        self.alpha = check_number("alpha", alpha, *ALPHAS)

    def _draw(self, draw: Draw) -> AugMixParams:
        depth = 3 if self.depth == -1 else self.depth
        shape = (self.width, depth)
        operation = draw.integers(len(OPERATIONS), *shape)
        if self.depth == -1:
            last = draw.integers(3, self.width, 1)
            operation = operation.where(torch.arange(depth, device=draw.device) <= last, NONE)
        sign = 2 * draw.integers(2, *shape) - 1
        return AugMixParams(
            operation,
            draw.uniform(0.1, self.severity, *shape) * sign,
            draw.dirichlet(self.alpha, self.width),
            draw.beta(self.alpha),
        )

    def _transform(self, images: Tensor, params: AugMixParams) -> Tensor:
        check_channels(images)
        return self._mix(images, params, colours=True).clamp(0, 1)  # the weights' sum may round to above 1

    def _carry(self, maps: Tensor, params: AugMixParams, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        # in the maps' own half precision the mask could not tell a part filled in from none
        known = at_least_float32(maps)
        real = torch.ones_like(known[:, :1])
        if valid is not None:
            known, real = known.where(valid, 0), real.where(valid, 0)
        moved = self._mix(torch.cat([known, real], 1), params, colours=False)
        return moved[:, :-1].to(maps.dtype), fully_valid(moved[:, -1:])

    def _mix(self, images: Tensor, params: AugMixParams, *, colours: bool) -> Tensor:
        mixed = images * column(1 - params.mixed_weight, images)
        weights = params.chain_weight * params.mixed_weight[:, None]
        operation, level = params.operation, params.level.to(at_least_float32_dtype(images.dtype))
        movement = step_matrix(operation.flatten(), level.flatten(), images.shape[-2:])
        movement = movement.unflatten(0, operation.shape)
        for i, weight in enumerate(weights.unbind(1)):
            chain = run_chain(images, operation[:, i], level[:, i], movement[:, i], colours=colours)
            mixed = torch.addcmul(mixed, chain, column(weight, images))
        return mixed
