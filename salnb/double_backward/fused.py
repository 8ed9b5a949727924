"""Batch norm's derivatives in fused kernels: experimental, and off unless it is asked for.

A saliency step runs PyTorch's batch norm backward three times and some twenty operators besides, and most of
the time of a network with batch norm on a GPU goes there. The kernels of `salnb.double_backward.kernels` read
each tensor twice and write each result once: two launches for a first derivative, two for a second. Each is
one operator to PyTorch, `salnb::batch_norm_gradients` and `salnb::batch_norm_second_gradients`.

They are tested on a CPU, by Triton's interpreter. No GPU has run them yet, which is why they are off.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from salnb.double_backward import batch_norm, kernels
from salnb.double_backward.batch_norm import Forward, Maybe

__all__ = ["applies", "first_gradients", "is_enabled", "second_gradients", "use_fused_batch_norm"]

_enabled = False

_library = torch.library.Library("salnb", "FRAGMENT")
_library.define(
    "batch_norm_gradients(Tensor gy, Tensor x, Tensor? w, Tensor mean, Tensor spread, bool training, "
    "float eps, Tensor? more_x, Tensor? more_w) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "batch_norm_second_gradients(Tensor vx, Tensor gy, Tensor x, Tensor? w, Tensor mean, Tensor spread, "
    "Tensor gw, Tensor gb, bool training, float eps) -> (Tensor, Tensor, Tensor)"
)


def use_fused_batch_norm(enabled: bool = True) -> None:
    """Switch the fused kernels of batch norm's derivatives on or off: experimental, off by default.

    They are for NVIDIA GPUs and need Triton, which PyTorch brings along on Linux. A forward pass of
    `Objective` (or inside `fast_double_backward`) that begins with the switch on takes its derivatives by
    them, in train and eval mode, contiguous or channels_last, in any floating-point dtype; sums are in
    float32 at least. On other devices, in graphs of `Objective.compile`, and where a map is a gradient with
    respect to something else than the images, nothing changes. Results agree with those of the default up
    to rounding.

    Args:
        enabled: whether they are used from now on, in all threads.

    Raises:
        RuntimeError: Triton is not installed.
    """
    global _enabled
    if enabled and importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "use_fused_batch_norm() needs Triton, which PyTorch brings along on Linux: pip install triton"
        )
    _enabled = enabled


def is_enabled() -> bool:
    """Whether `use_fused_batch_norm` is on."""
    return _enabled


def applies(x: Tensor) -> bool:
    """Whether the derivatives of a batch norm of `x` are to be taken by the kernels."""
    # what is traced is fused by the compiler
    return _enabled and x.is_cuda and not isinstance(x, FakeTensor)


def first_gradients(
    gy: Tensor, at: Forward, more_x: Maybe = None, more_w: Maybe = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gx + more_x`, `gw + more_w` and `gb`; see `batch_norm.first_gradients`."""
    return torch.ops.salnb.batch_norm_gradients(gy, *at, more_x, more_w)


def second_gradients(
    cotangents: tuple[Maybe, Maybe, Maybe], gy: Tensor, at: Forward, gw: Tensor, gb: Tensor, x_wanted: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """As `batch_norm.second_gradients`, for a cotangent of `gx` only."""
    vx = cotangents[0]
    if vx is None:
        return None, None, None
    ggy, ggx, ggw = torch.ops.salnb.batch_norm_second_gradients(vx, gy, *at[:4], gw, gb, *at[4:])
    return ggy, ggx if at.training else None, None if at.w is None else ggw


def _written_out(
    gy: Tensor,
    x: Tensor,
    w: Maybe,
    mean: Tensor,
    spread: Tensor,
    training: bool,
    eps: float,
    more_x: Maybe,
    more_w: Maybe,
) -> tuple[Tensor, Tensor, Tensor]:
    at = Forward(x, w, mean, spread, training, eps)
    gx, gw, gb = batch_norm.first_gradients(gy, at, [True] * 3, more_x)
    return gx, gw if more_w is None else gw + more_w, gb


def _written_out_second(
    vx: Tensor,
    gy: Tensor,
    x: Tensor,
    w: Maybe,
    mean: Tensor,
    spread: Tensor,
    gw: Tensor,
    gb: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    at = Forward(x, w, mean, spread, training, eps)
    found: Any = batch_norm.second_gradients((vx, None, None), gy, at, gw, gb, True)
    # an operator cannot return None
    ggy, ggx, ggw = (x.new_empty(0) if tensor is None else tensor for tensor in found)
    return ggy, ggx, ggw


for _name, _kernel, _reference in (
    ("batch_norm_gradients", kernels.first_gradients, _written_out),
    ("batch_norm_second_gradients", kernels.second_gradients, _written_out_second),
):
    _library.impl(_name, _kernel, "CUDA")
    _library.impl(_name, _reference, "CPU")
