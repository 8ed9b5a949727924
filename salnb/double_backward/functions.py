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

from salnb.double_backward.bookkeeping import Maybe, last, save, saved, wanted

__all__ = [
    "Affine",
    "BatchNorm",
    "Cat",
    "Convolution",
    "MatrixProduct",
    "MaxPool2d",
    "ReLU",
    "check_second_derivative",
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
    """`y = (x - mean) / std * w + b` per channel; in training, with the mean and std of this batch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Maybe, b: Maybe, running: tuple, training: bool, *options: float
    ) -> Tensor:
        given = () if running[0] is None else running
        y, mean, spread = aten._native_batch_norm_legit(x, w, b, *given, training, *options)
        # spread is 1/std in training and the running variance otherwise, as the backward kernel wants it
        save(ctx, x, w, *((mean, spread) if training else running))
        ctx.training, ctx.eps = training, options[1]
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        mask = [wanted(ctx, i) for i in range(3)]
        return *_BatchNormBackward.apply(gy, *saved(ctx), ctx.training, ctx.eps, mask), *[None] * 4


class _BatchNormBackward(Function):
    """The gradients `gx`, `gw`, `gb` of batch norm, those of them that `mask` asks for.

    Write `x' = (x - mean) / std` and `<u>` for the mean of u over a channel's n pixels. In training

        P(u) = u - <u> - x' <u x'>,    gx = w / std * P(gy),    gw = n <gy x'>,    gb = n <gy>.

    P is symmetric, so that the cotangent v of gx reaches gy as `w / std * P(v)`, which is what the first
    backward's kernel computes. The derivatives through std and x' in gx add up to

        -w / std^2 * ( x' <v P(gy)> + <gy x'> P(v) + <v x'> P(gy) ),

    a sum of `gy`, `x`, `w / std * P(v)` and a constant, with one factor each per channel. In evaluation
    std is a constant and P the identity.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Maybe,
        mean: Tensor,
        spread: Tensor,
        training: bool,
        eps: float,
        mask: list,
    ) -> tuple:
        ctx.training, ctx.eps = training, eps
        # in training the sums gw and gb come for free with gx, and its derivatives need them
        sums = [training or wanted for wanted in mask[1:]]
        gx, gw, gb = _batch_norm_kernel(ctx, gy, x, w, mean, spread, [mask[0], *sums])
        ctx.save_for_backward(gy, x, w, mean, spread, gw, gb)
        ctx.set_materialize_grads(False)
        return gx, gw if mask[1] else None, gb if mask[2] else None

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, vx: Maybe, vw: Maybe, vb: Maybe) -> tuple:
        gy, x, w, mean, spread, gw, gb = kept
        training = ctx.training
        n = x.numel() // x.shape[1]
        r = spread if training else (spread + ctx.eps).rsqrt()  # 1/std
        wr = r if w is None else r * w

        def wide(u: Tensor) -> Tensor:
            return u.view(1, -1, *[1] * (x.ndim - 2))

        ggy = ggv = ggw = None
        # ggx = c_y * (gy - <gy>) + c_x * (x - mean) + c_v * ggv in training, c_y * gy otherwise
        c_y = c_x = torch.zeros_like(r)
        if vx is not None:
            ggv, v_x, v_1 = _batch_norm_kernel(ctx, vx, x, w, mean, spread, [True, training, training])
            ggy = ggv
            v_gy = (vx * gy.to(r.dtype)).sum([0, *range(2, x.ndim)])
            if training:
                v_gy = v_gy - (v_1 * gb + v_x * gw) / n  # from the sum of v * gy to that of v * P(gy)
                c_y = -wr * r * v_x / n
                c_x = -wr * r * r * (v_gy - v_x * gw / n) / n
            ggw = None if w is None else r * v_gy
        if vw is not None:
            ggy = _add(ggy, (x - wide(mean)) * wide(r * vw))
            c_y = c_y + r * vw
            if training:
                c_x = c_x - r * r * vw * gw / n
        if vb is not None:
            ggy = _add(ggy, wide(vb).expand_as(gy))

        ggx = None
        if training and ctx.needs_input_grad[1] and (vx is not None or vw is not None):
            ggx = (x * wide(c_x)).addcmul_(gy, wide(c_y))
            if ggv is not None:
                ggx.addcmul_(ggv, wide(-r * gw / n))
            ggx.sub_(wide(c_x * mean + c_y * gb / n))
        elif vw is not None:
            ggx = gy * wide(c_y)
        return ggy, ggx, ggw, *[None] * 5


def _batch_norm_kernel(
    ctx: Any, gy: Tensor, x: Tensor, w: Maybe, mean: Tensor, spread: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's first backward of batch norm: `gx`, `gw`, `gb`."""
    batch, running = ((mean, spread), (None, None)) if ctx.training else ((None, None), (mean, spread))
    return aten.native_batch_norm_backward(gy, x, w, *running, *batch, ctx.training, ctx.eps, mask)


# ---------------------------------------------------------------------------------------------------------
# ReLU, max pooling, concatenation: linear in their gradient, so that the cotangent simply goes forwards


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
        ggy = vx.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)
        return ggy, None, None, None


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
        return tuple(part.clone() for part in gy.split(sizes, dim))

    @staticmethod
    @last
    def backward(ctx: Any, kept: tuple, *parts: Tensor) -> tuple:
        return torch.cat(parts, ctx.dim), None, None


# ---------------------------------------------------------------------------------------------------------
# What has no second derivative


def check_second_derivative(
    maps: Tensor, what: str = "the saliency term", way_out: str = "use gamma=0"
) -> None:
    """Raise a RuntimeError if an operation that `maps` were computed with cannot be differentiated again.

    The error says `what` asks for that, and names a `way_out`.

    PyTorch would say so in the backward pass, in words that do not tell why; asked for the gradients of given
    tensors only, it may leave the operation's share out without a word.
    """
    seen, ahead = set(), [maps.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        if node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            try:
                node(*[None] * len(node._input_metadata))  # type: ignore[operator]
            except RuntimeError as error:
                raise RuntimeError(
                    f"{what} differentiates the model twice, and one of its operations has no "
                    f"second derivative ({error}): replace the operation, or {way_out}"
                ) from None
