"""Batch norm's derivatives in fused kernels: where a step is captured, or where they are asked for.

A saliency step runs PyTorch's batch norm backward three times and some twenty operators besides, and most of
the time of a network with batch norm on a GPU goes there. The kernels of `salnb.double_backward.kernels` read
each tensor twice and write each result once: two launches for a first derivative, two for a second. Each is
one operator to PyTorch, `salnb::batch_norm_gradients` and `salnb::batch_norm_second_gradients`.

They are tested on a CPU, by Triton's interpreter, and on an H100. The host needs about as long to start them
as to start the operators that they replace, so that eager steps, for which the GPU often waits, gain little.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from salnb._common.warning import warn_caller
from salnb.double_backward import batch_norm, kernels
from salnb.double_backward.batch_norm import Forward, Maybe

__all__ = ["applies", "first_gradients", "preferred", "second_gradients", "setting", "use_fused_batch_norm"]

_enabled: bool | None = None
_preferred = ContextVar("_preferred", default=False)

_library = torch.library.Library("salnb", "FRAGMENT")
_library.define(
    "batch_norm_gradients(Tensor gy, Tensor x, Tensor? w, Tensor mean, Tensor spread, bool training, "
    "float eps, Tensor? more_x, Tensor? more_w) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "batch_norm_second_gradients(Tensor vx, Tensor gy, Tensor x, Tensor? w, Tensor mean, Tensor spread, "
    "Tensor gw, Tensor gb, bool training, float eps) -> (Tensor, Tensor, Tensor)"
)


def use_fused_batch_norm(enabled: bool | None = True) -> None:
    """Switch the fused kernels of batch norm's derivatives on or off: experimental.

    By default, captured steps (`Objective.compile(mode="cuda-graphs")`) use them where they can, and no
    others. They are for NVIDIA GPUs, by default of compute capability 8.0 or more, and need Triton, which
    PyTorch brings along on Linux. A forward pass of `Objective` (or inside `fast_double_backward`) that
    begins with the switch on takes its derivatives by them, in train and eval mode, contiguous or
    channels_last, in any floating-point dtype; sums are in float32 at least. On other devices, in graphs of
    Inductor, and where a map is a gradient with respect to something else than the images, nothing changes.
    Results agree with those of PyTorch's operators up to rounding.

    Args:
        enabled: whether they are used from now on, in all threads; None is the default.

    Raises:
        RuntimeError: Triton is not installed.
    """
    global _enabled
    if enabled and importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "use_fused_batch_norm() needs Triton, which PyTorch brings along on Linux: pip install triton"
        )
    _enabled = enabled


def setting() -> bool | None:
    """What `use_fused_batch_norm` was told last."""
    return _enabled


@contextmanager
def preferred(device: torch.device) -> Iterator[bool]:
    """The kernels are used inside, and this tells so, unless they are off or the device cannot run them."""
    token = _preferred.set(_enabled is None and device.type == "cuda" and _runs_on(device))
    try:
        yield _wanted()
    finally:
        _preferred.reset(token)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether a kernel can be compiled and started there: that takes Triton, and Triton a C compiler.

    Triton promises GPUs from compute capability 8.0 on; older ones lack bfloat16.
    """
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.cuda.device(device):  # where Triton starts what it is given
            x, ones = torch.ones(2, 1, 2, 2, device=device), torch.ones(1, device=device)
            kernels.first_gradients(x, x, None, ones, ones, True, 0.0)
    except Exception as error:
        warn_caller(
            f"batch norm's fused kernels cannot be used ({type(error).__name__}: {error}); steps take "
            "PyTorch's operators, which is slower: use_fused_batch_norm(False) does without this warning"
        )
        return False
    return True


def applies(x: Tensor) -> bool:
    """Whether the derivatives of a batch norm of `x` are to be taken by the kernels."""
    # what is traced is fused by the compiler
    return _wanted() and x.is_cuda and not isinstance(x, FakeTensor)


def _wanted() -> bool:
    return _preferred.get() if _enabled is None else _enabled


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
