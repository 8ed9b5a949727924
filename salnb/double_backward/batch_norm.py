"""The first and second derivatives of batch norm, written in operators of PyTorch.

Write `x' = (x - mean) / std` and `<u>` for the mean of u over a channel's n pixels. In training

    P(u) = u - <u> - x' <u x'>,    gx = w / std * P(gy),    gw = n <gy x'>,    gb = n <gy>.

P is symmetric, so that the cotangent v of gx reaches gy as `w / std * P(v)`, which is what the first
backward's kernel computes. The derivatives through std and x' in gx add up to

    -w / std^2 * ( x' <v P(gy)> + <gy x'> P(v) + <v x'> P(gy) ),

a sum of `gy`, `x`, `w / std * P(v)` and a constant, with one factor each per channel. In evaluation std is a
constant and P the identity.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Forward", "first_gradients", "second_gradients"]

aten = torch.ops.aten
Maybe = Tensor | None


class Forward(NamedTuple):
    """What the forward pass leaves for its derivatives.

    Attributes:
        x: input, (N, C) or (N, C, H, W).
        w: weight (C,), or None for ones.
        mean: (C,), of the batch in training, else the running one.
        spread: (C,), 1/std of the batch in training, else the running variance, as PyTorch's kernel wants it.
        training: whether the statistics are those of this batch.
        eps: what is added to the variance.
    """

    x: Tensor
    w: Maybe
    mean: Tensor
    spread: Tensor
    training: bool
    eps: float


def first_gradients(
    gy: Tensor, at: Forward, mask: list[bool], more_x: Maybe = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gx`, `gw`, `gb`, those of them that `mask` asks for, by PyTorch's kernel.

    Args:
        gy: gradient of the output, like x.
        at: the forward pass.
        mask: which of the three are wanted.
        more_x: what is added to `gx`, like x.
    """
    x, w, mean, spread, training, eps = at
    batch: tuple[Maybe, Maybe]
    running: tuple[Maybe, Maybe]
    if training:
        batch, running = (mean, spread), (None, None)
    else:
        # as the forward pass of evaluation leaves them: the kernel for CUDA wants to see them
        batch, running = (mean.new_empty(0),) * 2, (mean, spread)
    if w is None and any(mask[1:]):
        w = torch.ones_like(mean)  # without one the kernel for CUDA makes no sums
    gx, gw, gb = aten.native_batch_norm_backward(gy, x, w, *running, *batch, training, eps, mask)
    if more_x is not None and mask[0]:
        gx = gx.add_(more_x)
    return gx, gw, gb


def second_gradients(
    cotangents: tuple[Maybe, Maybe, Maybe], gy: Tensor, at: Forward, gw: Any, gb: Any, x_wanted: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """`ggy`, `ggx`, `ggw`: what the cotangents of `gx`, `gw` and `gb` amount to for `gy`, `x` and `w`.

    Args:
        cotangents: `vx`, like x, `vw` and `vb`, (C,); None for zero.
        gy: what the first backward was given, like x.
        at: the forward pass.
        gw: what the first backward found; None in evaluation, where it is not used.
        gb: the same.
        x_wanted: whether `ggx` is.
    """
    vx, vw, vb = cotangents
    x, w, mean, spread, training, eps = at
    n = x.numel() // x.shape[1]
    r = spread if training else (spread + eps).rsqrt()  # 1/std

    def wide(u: Tensor) -> Tensor:
        return u.view(1, -1, *[1] * (x.ndim - 2))

    ggy = ggx = ggw = None
    c_y: Any = None
    c_x: Any = None
    # ggx = c_y * (gy - <gy>) + c_x * (x - mean) - gw * r / n * first in training, c_y * gy otherwise,
    # where first is w / std * P(vx)
    if vx is None:
        c_y = c_x = torch.zeros_like(r)
    else:
        first, v_x, v_1 = first_gradients(vx, at, [True, training, training])
        ggy = first
        v_gy = (vx * gy.to(r.dtype)).sum([0, *range(2, x.ndim)])
        if training:
            # from the sum of v * gy to that of v * P(gy)
            v_gy = v_gy.addcmul_(v_1, gb, value=-1 / n).addcmul_(v_x, gw, value=-1 / n)
            factor = (r * r if w is None else r * r * w) / -n
            c_y = factor * v_x
            c_x = torch.addcmul(v_gy, v_x, gw, value=-1 / n) * r * factor
        ggw = None if w is None else r * v_gy
    if vw is not None:
        more = (x - wide(mean)) * wide(r * vw)
        ggy = more if ggy is None else ggy + more
        c_y = r * vw if c_y is None else c_y + r * vw
        if training:
            c_x = torch.addcmul(c_x, r * r * vw, gw, value=-1 / n)
    if vb is not None:
        more = wide(vb).expand_as(gy)
        ggy = more if ggy is None else ggy + more

    if training and x_wanted and (vx is not None or vw is not None):
        ggx = (x * wide(c_x)).addcmul_(gy, wide(c_y))
        if vx is not None:
            ggx.addcmul_(first, wide(r * gw), value=-1 / n)
        ggx.sub_(wide(torch.addcmul(c_x * mean, c_y, gb, value=1 / n)))
    elif vw is not None and x_wanted:
        ggx = gy * wide(c_y)
    return ggy, ggx, ggw
