# ruff: noqa: N803 (constants of a kernel)
# mypy: disable-error-code="no-untyped-def"
"""Batch norm's derivatives as Triton kernels: one that makes the sums of each channel, one that writes.

All take tensors in one dense layout, either (N, C, H, W) or channels_last, as the pixels of C channels: pixel
`m` of channel `c` lies at `m // inner * image + m % inner * pixel + c * channel`. A program has a block of
channels and one of `parts` stretches of their pixels; the second kernel adds up what the parts of the first
found, so that results are the same each time. Sums are in float32 (float64 where the input is) whatever the
input is in. For the notation see `salnb.double_backward.batch_norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_gradients", "second_gradients"]

tl: Any = None  # triton.language, once a kernel is wanted: Triton is not everywhere


def _sums(
    u_ptr, gy_ptr, x_ptr, mean_ptr, spread_ptr, out_ptr,
    channels, pixels, inner, image, pixel, channel, stretch, eps,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WITH_GY: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each channel the sums of u, u * x' and, where asked for, u * gy: (3, parts, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    mean = tl.load(mean_ptr + c, mask=c < channels, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=c < channels, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    sum_1 = tl.zeros([CHANNELS], ACC)
    sum_x = tl.zeros([CHANNELS], ACC)
    sum_gy = tl.zeros([CHANNELS], ACC)
    end = tl.minimum((part + 1) * stretch, pixels)
    for start in range(part * stretch, end, PIXELS):
        m = start + tl.arange(0, PIXELS)
        place = (m // inner).to(tl.int64) * image + m % inner * pixel
        at = place[:, None] + c[None, :] * channel
        inside = (m < end)[:, None] & (c < channels)[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
        sum_1 += tl.sum(u, 0)
        sum_x += tl.sum(u * (x - mean[None, :]) * r[None, :], 0)
        if WITH_GY:
            gy = tl.load(gy_ptr + at, mask=inside, other=0).to(ACC)
            sum_gy += tl.sum(u * gy, 0)
    out = out_ptr + part * channels + c
    tl.store(out, sum_1, mask=c < channels)
    tl.store(out + parts * channels, sum_x, mask=c < channels)
    if WITH_GY:
        tl.store(out + 2 * parts * channels, sum_gy, mask=c < channels)


def _write_first(
    u_ptr, x_ptr, w_ptr, mean_ptr, spread_ptr, sums_ptr, more_ptr, more_w_ptr, out_ptr, gw_out, gb_out,
    channels, pixels, inner, image, pixel, channel, stretch, eps, parts,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WEIGHT: tl.constexpr, MORE: tl.constexpr, MORE_W: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of u = gy: gx, gw and gb, each plus what is added to it."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    here = c < channels
    mean = tl.load(mean_ptr + c, mask=here, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=here, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    wr = r * tl.load(w_ptr + c, mask=here, other=0).to(ACC) if WEIGHT else r
    p = tl.arange(0, PARTS)
    known = (p < parts)[:, None] & here[None, :]
    sums = sums_ptr + p[:, None] * channels + c[None, :]
    sum_1 = tl.sum(tl.load(sums, mask=known, other=0), 0)
    sum_x = tl.sum(tl.load(sums + parts * channels, mask=known, other=0), 0)
    if part == 0:
        gw = sum_x
        if MORE_W:
            gw += tl.load(more_w_ptr + c, mask=here, other=0).to(ACC)
        tl.store(gw_out + c, gw, mask=here)
        tl.store(gb_out + c, sum_1, mask=here)
    end = tl.minimum((part + 1) * stretch, pixels)
    for start in range(part * stretch, end, PIXELS):
        m = start + tl.arange(0, PIXELS)
        place = (m // inner).to(tl.int64) * image + m % inner * pixel
        at = place[:, None] + c[None, :] * channel
        inside = (m < end)[:, None] & here[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        if TRAINING:
            x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
            x = (x - mean[None, :]) * r[None, :]
            u -= (sum_1 / pixels)[None, :] + x * (sum_x / pixels)[None, :]
        u *= wr[None, :]
        if MORE:
            u += tl.load(more_ptr + at, mask=inside, other=0).to(ACC)
        tl.store(out_ptr + at, u, mask=inside)


def _write_second(
    u_ptr, gy_ptr, x_ptr, w_ptr, mean_ptr, spread_ptr, sums_ptr, gw_ptr, gb_ptr, ggy_ptr, ggx_ptr, ggw_out,
    channels, pixels, inner, image, pixel, channel, stretch, eps, parts,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WEIGHT: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of u = vx: ggy, ggw and, in training, ggx."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    here = c < channels
    mean = tl.load(mean_ptr + c, mask=here, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=here, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    wr = r * tl.load(w_ptr + c, mask=here, other=0).to(ACC) if WEIGHT else r
    p = tl.arange(0, PARTS)
    known = (p < parts)[:, None] & here[None, :]
    sums = sums_ptr + p[:, None] * channels + c[None, :]
    v_1 = tl.sum(tl.load(sums, mask=known, other=0), 0) / pixels
    v_x = tl.sum(tl.load(sums + parts * channels, mask=known, other=0), 0) / pixels
    v_gy = tl.sum(tl.load(sums + 2 * parts * channels, mask=known, other=0), 0)
    gw = tl.load(gw_ptr + c, mask=here, other=0).to(ACC)
    gb = tl.load(gb_ptr + c, mask=here, other=0).to(ACC)
    if TRAINING:
        v_gy -= v_1 * gb + v_x * gw
    if part == 0:
        tl.store(ggw_out + c, r * v_gy, mask=here)
    c_x = (v_gy - v_x * gw) / pixels
    end = tl.minimum((part + 1) * stretch, pixels)
    for start in range(part * stretch, end, PIXELS):
        m = start + tl.arange(0, PIXELS)
        place = (m // inner).to(tl.int64) * image + m % inner * pixel
        at = place[:, None] + c[None, :] * channel
        inside = (m < end)[:, None] & here[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        if TRAINING:
            x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
            x = (x - mean[None, :]) * r[None, :]
            u -= v_1[None, :] + x * v_x[None, :]
            gy = tl.load(gy_ptr + at, mask=inside, other=0).to(ACC) - (gb / pixels)[None, :]
            ggx = v_x[None, :] * gy + c_x[None, :] * x + (gw / pixels)[None, :] * u
            tl.store(ggx_ptr + at, -(wr * r)[None, :] * ggx, mask=inside)
        tl.store(ggy_ptr + at, u * wr[None, :], mask=inside)


@functools.cache
def _compiled(kernel: Callable) -> Any:
    """The kernel as Triton has it."""
    global tl
    import triton
    import triton.language

    tl = triton.language  # where the kernels look for it
    return triton.jit(kernel)


def first_gradients(
    gy: Tensor,
    x: Tensor,
    w: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    training: bool,
    eps: float,
    more_x: Tensor | None = None,
    more_w: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gx + more_x`, `gw + more_w` and `gb`; arguments as in `salnb.double_backward.batch_norm`."""
    run = _Run(x, mean, spread, training, eps)
    gy, more_x = run.laid_out(gy), None if more_x is None else run.laid_out(more_x)
    gx, gw, gb = torch.empty_like(run.x), run.vector(), run.vector()
    tensors = gy, run.x, w, mean, spread, run.sums(gy, None), more_x, more_w, gx, gw, gb
    run.start(_write_first, tensors, WEIGHT=w is not None, MORE=more_x is not None, MORE_W=more_w is not None)
    return gx, gw, gb


def second_gradients(
    vx: Tensor,
    gy: Tensor,
    x: Tensor,
    w: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    gw: Tensor,
    gb: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ggy`, `ggx` (empty in evaluation) and `ggw`, for a cotangent of `gx` only."""
    run = _Run(x, mean, spread, training, eps)
    vx, gy = run.laid_out(vx), run.laid_out(gy)
    ggy, ggw = torch.empty_like(run.x), run.vector()
    ggx = torch.empty_like(run.x) if training else run.x.new_empty(0)
    tensors = vx, gy, run.x, w, mean, spread, run.sums(vx, gy), gw, gb, ggy, ggx, ggw
    run.start(_write_second, tensors, WEIGHT=w is not None)
    return ggy, ggx, ggw


class _Run:
    """How the kernels go through one tensor."""

    def __init__(self, x: Tensor, mean: Tensor, spread: Tensor, training: bool, eps: float) -> None:
        last = x.ndim == 2 or (not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))
        self.format = torch.channels_last if last and x.ndim == 4 else torch.contiguous_format
        self.x, self.mean, self.spread = self.laid_out(x), mean, spread
        self.channels, inner = x.shape[1], x[0, 0].numel()
        pixels = len(x) * inner
        # of a tile: neighbours in memory, few enough to stay in registers
        self.blocks = {"PIXELS": 32, "CHANNELS": 32} if last else {"PIXELS": 1024, "CHANNELS": 1}
        across = -(-self.channels // self.blocks["CHANNELS"])
        tiles = -(-pixels // self.blocks["PIXELS"])
        wanted = min(tiles, 64, max(1, _PROGRAMS // across))
        stretch = -(-tiles // wanted) * self.blocks["PIXELS"]
        self.grid = across, -(-pixels // stretch)
        strides = (self.channels, 1) if last else (1, inner)  # of a pixel and of a channel
        self.extent = self.channels, pixels, inner, inner * self.channels, *strides, stretch, eps
        self.types = {"ACC": _triton_dtype(self.accumulator), "TRAINING": training, **self.blocks}

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor in the layout of x."""
        return tensor.contiguous(memory_format=self.format)

    def vector(self) -> Tensor:
        return torch.empty(self.channels, dtype=self.accumulator, device=self.x.device)

    def sums(self, u: Tensor, gy: Tensor | None) -> Tensor:
        out = torch.empty(3, self.grid[1], self.channels, dtype=self.accumulator, device=self.x.device)
        tensors = u, u if gy is None else gy, self.x, self.mean, self.spread, out
        _compiled(_sums)[self.grid](*tensors, *self.extent, WITH_GY=gy is not None, **self.types)
        return out

    def start(self, kernel: Callable, tensors: tuple[Tensor | None, ...], **switches: bool) -> None:
        """Run one of the kernels that write."""
        given = (self.x if tensor is None else tensor for tensor in tensors)  # those are not read
        parts = self.grid[1]
        power = 1 << (parts - 1).bit_length()
        _compiled(kernel)[self.grid](*given, *self.extent, parts, **self.types, **switches, PARTS=power)


# enough to keep the largest devices busy several times over
_PROGRAMS = 1024


def _triton_dtype(dtype: torch.dtype) -> Any:
    _compiled(_sums)
    return tl.float64 if dtype is torch.float64 else tl.float32
