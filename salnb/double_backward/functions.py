"""Functions with a hand-written first and second derivative; `salnb.double_backward` puts them in place.

Names: `y = f(x, w, b)` is the forward pass; the first backward takes `gy` to `gx`, `gw` and `gb`.
The second receives `vx`, `vw` and `vb`, the cotangents of these three, and returns `ggy`, `ggx` and
`ggw`, what they amount to for `gy`, `x` and `w`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from salnb._common.checks import is_channels_last
from salnb.double_backward import batch_norm, fused
from salnb.double_backward.bookkeeping import Maybe, last, save, saved, wanted

__all__ = [
    "Affine",
    "AvgPool2d",
    "BatchNorm",
    "Cat",
    "Convolution",
    "MatrixProduct",
    "MaxPool2d",
    "ReLU",
]

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------------------
# Convolution and linear layer


class Convolution:
    """The arithmetic of a convolution with a given `(stride, padding, dilation, False, [0, 0], groups)`."""

    def __init__(self, *geometry: Any) -> None:
        self.geometry = geometry

    def value(self, x: Tensor, w: Tensor, b: Maybe) -> Tensor:
        return aten.convolution(x, w, b, *self.geometry)

    def gradients(self, gy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple:
        return aten.convolution_backward(gy, x, w, [w.shape[0]], *self.geometry, mask)


class MatrixProduct:
    """The arithmetic of a linear layer."""

    def value(self, x: Tensor, w: Tensor, b: Maybe) -> Tensor:
        return F.linear(x, w, b)

    def gradients(self, gy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple:
        return gy @ w if mask[0] else None, gy.t() @ x if mask[1] else None, gy.sum(0) if mask[2] else None


class Affine(Function):
    """`y = x * w + b`, where `*` is linear in both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Maybe, rule: Convolution | MatrixProduct) -> Tensor:
        save(ctx, x, w)
        ctx.rule = rule
        return rule.value(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        mask = [wanted(ctx, i) for i in range(3)]
        return *_AffineBackward.apply(gy, *saved(ctx), ctx.rule, mask), None


class _AffineBackward(Function):
    """The gradients `gx`, `gw`, `gb`, those of them that `mask` asks for.

    Each is linear in `gy`; `gx` is linear in `w` and `gw` in `x` as well. So every second
    derivative is again the product or one of its gradients, with one argument replaced by a cotangent.
    """

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, rule: Convolution | MatrixProduct, mask: list[bool]
    ) -> tuple:
        ctx.save_for_backward(gy, x, w)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        return rule.gradients(gy, x, w, mask)

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, vx: Maybe, vw: Maybe, vb: Maybe) -> tuple:
        gy, x, w = kept
        rule = ctx.rule
        ggy = ggx = ggw = None
        if ctx.needs_input_grad[0]:
            if vx is not None:
                ggy, vb = rule.value(vx, w, vb), None
            if vw is not None or vb is not None:
                ggy = _add(ggy, rule.value(x, torch.zeros_like(w) if vw is None else vw, vb))
        if vw is not None and wanted(ctx, 1):
            ggx = rule.gradients(gy, x, vw, [True, False, False])[0]
        if vx is not None and wanted(ctx, 2):
            ggw = rule.gradients(gy, vx, w, [False, True, False])[1]
        return ggy, ggx, ggw, None, None


def _add(a: Maybe, b: Tensor) -> Tensor:
    return b if a is None else a + b


# ---------------------------------------------------------------------------------------------------------
# Batch norm


class BatchNorm(Function):
    """`y = (x - mean) / std * w + b` per channel; in training, with the mean and std of this batch.

    Behind y stand x and w once more. The first backward reads these, so that its own gradients with respect
    to them come back here, where they are added to those of y by what computes these, or in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Maybe, b: Maybe, running: tuple, training: bool, *options: float
    ) -> tuple[Tensor, Tensor, Maybe]:
        given = () if running[0] is None else running
        y, mean, spread = aten._native_batch_norm_legit(x, w, b, *given, training, *options)
        again = x.view_as(x), None if w is None else w.view_as(w)
        fixed = [
            t for t, wanted in zip(again, ctx.needs_input_grad, strict=False) if t is not None and not wanted
        ]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        # spread is 1/std in training and the running variance otherwise, as the backward kernel wants it
        save(ctx, *again, *((mean, spread) if training else running))
        ctx.settings = training, options[1]
        ctx.is_fused = fused.applies(x)
        return y, *again

    @staticmethod
    def backward(ctx: Any, gy: Maybe, more_x: Maybe, more_w: Maybe) -> tuple:
        if gy is None:
            return more_x, more_w, *[None] * 5
        mask = [wanted(ctx, i) for i in range(3)]
        given = gy, *saved(ctx), more_x, more_w
        return *_BatchNormBackward.apply(*given, ctx.settings, mask, ctx.is_fused), *[None] * 4


class _BatchNormBackward(Function):
    """The gradients `gx + more_x`, `gw + more_w`, `gb` of batch norm, those of them that `mask` asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Maybe,
        mean: Tensor,
        spread: Tensor,
        more_x: Maybe,
        more_w: Maybe,
        settings: tuple[bool, float],
        mask: list[bool],
        is_fused: bool,
    ) -> tuple:
        ctx.settings, ctx.is_fused = settings, is_fused
        # in training the sums gw and gb come for free with gx, and its derivatives need them
        sums = [settings[0] or wanted for wanted in mask[1:]]
        at = batch_norm.Forward(x, w, mean, spread, *settings)
        ctx.set_materialize_grads(False)
        if is_fused and not any(ctx.needs_input_grad[5:7]):
            gx, gw, gb = fused.first_gradients(gy, at, more_x, more_w)
            ctx.save_for_backward(gy, x, w, mean, spread, gw, gb)
        else:
            gx, gw, gb = batch_norm.first_gradients(gy, at, [mask[0], *sums], more_x)
            ctx.save_for_backward(gy, x, w, mean, spread, gw, gb)
            gw = gw + more_w if mask[1] and more_w is not None else gw
        return gx if mask[0] else None, gw if mask[1] else None, gb if mask[2] else None

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, *cotangents: Maybe) -> tuple:
        gy, x, w, mean, spread, gw, gb = kept
        at = batch_norm.Forward(x, w, mean, spread, *ctx.settings)
        # of maps with respect to the images, whose cotangent is the first alone
        kernels = fused if ctx.is_fused and cotangents[1:] == (None, None) else batch_norm
        found = kernels.second_gradients(cotangents, gy, at, gw, gb, ctx.needs_input_grad[1])
        more = (
            v if needed else None for v, needed in zip(cotangents, ctx.needs_input_grad[5:7], strict=False)
        )
        return *found, None, None, *more, *[None] * 3


# ---------------------------------------------------------------------------------------------------------
# ReLU, pooling, concatenation: linear in their gradient, so that the cotangent simply goes forwards


class ReLU(Function):
    """`y = max(x, 0)` (eq. 3), in place or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        save(ctx, y)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        return _ReLUBackward.apply(gy, saved(ctx)[0].detach()), None


class _ReLUBackward(Function):
    """`gx = gy` where `y > 0` (eq. 4, gradient)."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return aten.threshold_backward(gy, y, 0)

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, vx: Tensor) -> tuple:
        return aten.threshold_backward(vx, *kept, 0), None


class MaxPool2d(Function):
    """`y`, the largest `x` of each window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple) -> Tensor:
        y, indices = aten.max_pool2d_with_indices(x, *window)
        save(ctx, x, indices)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        x, indices = saved(ctx)
        return _MaxPool2dBackward.apply(gy, x.detach(), indices, ctx.window), None


class _MaxPool2dBackward(Function):
    """`gx`, the sum of `gy` over the windows whose maximum a pixel is."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, indices: Tensor, window: tuple) -> Tensor:
        ctx.save_for_backward(indices)
        return aten.max_pool2d_with_indices_backward(gy, x, *window, indices)

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, vx: Tensor) -> tuple:
        (indices,) = kept
        if is_channels_last(indices):  # which the derivative then is as well
            places = indices.permute(0, 2, 3, 1)
            pixels = vx.permute(0, 2, 3, 1).flatten(1, 2).gather(1, places.flatten(1, 2))
            return pixels.view_as(places).permute(0, 3, 1, 2), None, None, None
        ggy = vx.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)
        return ggy, None, None, None


class AvgPool2d(Function):
    """`y`, the mean of each window of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple) -> Tensor:
        save(ctx, x)
        ctx.window = window
        return aten.avg_pool2d(x, *window)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        return _AvgPool2dBackward.apply(gy, saved(ctx)[0].detach(), ctx.window), None


class _AvgPool2dBackward(Function):
    """`gx`, to which each window hands out its `gy` in equal parts."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, window: tuple) -> Tensor:
        ctx.window = window
        return aten.avg_pool2d_backward(gy, x, *window)

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, vx: Tensor) -> tuple:
        return aten.avg_pool2d(vx, *ctx.window), None, None


class Cat(Function):
    """The tensors one behind the other."""

    @staticmethod
    def forward(ctx: Any, dim: int, *tensors: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [t.shape[dim] for t in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        return None, *_Split.apply(gy, ctx.sizes, ctx.dim)


class _Split(Function):
    """The parts of a concatenated gradient."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, sizes: list[int], dim: int) -> tuple:
        ctx.dim = dim
        # parts of one memory, as in PyTorch, which hooks may nevertheless change in place
        return tuple(torch.unsafe_split_with_sizes(gy, sizes, dim))

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, *parts: Tensor) -> tuple:
        return torch.cat(parts, ctx.dim), None, None
