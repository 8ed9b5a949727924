# ruff: noqa: N803 (constants of a kernel)
# mypy: disable-error-code="no-untyped-def"
"""Batch norm's derivatives as Triton kernels: one that makes the sums of each channel, one that writes.

All take tensors in one dense layout, either (N, C, H, W) or channels_last, which counts as one large image:
pixel `p` of channel `c` of image `i` lies at `i * image + p * pixel + c * channel`. A program has a block of
channels and one of `parts` stretches of their tiles; the second kernel adds up what the parts of the first
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
    channels, images, inner, image, pixel, channel, stretch, eps,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WITH_GY: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each channel the sums of u, u * x' and, where asked for, u * gy: (3, parts, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    mean = tl.load(mean_ptr + c, mask=c < channels, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=c < channels, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    # of each place in a tile, and of all in the end: threads need not wait for one another in each tile
    sum_1 = tl.zeros([IMAGES, PIXELS, CHANNELS], ACC)
    sum_x = tl.zeros([IMAGES, PIXELS, CHANNELS], ACC)
    sum_gy = tl.zeros([IMAGES, PIXELS, CHANNELS], ACC)
    across = tl.cdiv(inner, PIXELS)
    for tile in range(part * stretch, tl.minimum((part + 1) * stretch, tl.cdiv(images, IMAGES) * across)):
        i = tile // across * IMAGES + tl.arange(0, IMAGES)[:, None, None]
        p = tile % across * PIXELS + tl.arange(0, PIXELS)[None, :, None]
        at = i.to(tl.int64) * image + p.to(tl.int64) * pixel + c * channel
        inside = (i < images) & (p < inner) & (c < channels)
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
        sum_1 += u
        sum_x += u * (x - mean) * r
        if WITH_GY:
            gy = tl.load(gy_ptr + at, mask=inside, other=0).to(ACC)
            sum_gy += u * gy
    out = out_ptr + part * channels + c
    tl.store(out, tl.sum(tl.sum(sum_1, 0, True), 1, True), mask=c < channels)
    tl.store(out + parts * channels, tl.sum(tl.sum(sum_x, 0, True), 1, True), mask=c < channels)
    if WITH_GY:
        tl.store(out + 2 * parts * channels, tl.sum(tl.sum(sum_gy, 0, True), 1, True), mask=c < channels)


def _write_first(
    u_ptr, x_ptr, w_ptr, mean_ptr, spread_ptr, sums_ptr, more_ptr, more_w_ptr, out_ptr, gw_out, gb_out,
    channels, images, inner, image, pixel, channel, stretch, eps, parts,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WEIGHT: tl.constexpr, MORE: tl.constexpr, MORE_W: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of u = gy: gx, gw and gb, each plus what is added to it."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    part = tl.program_id(1)
    here = c < channels
    mean = tl.load(mean_ptr + c, mask=here, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=here, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    wr = r * tl.load(w_ptr + c, mask=here, other=0).to(ACC) if WEIGHT else r
    sum_1 = tl.zeros([1, ROWS, CHANNELS], ACC)
    sum_x = tl.zeros([1, ROWS, CHANNELS], ACC)
    for row in range(0, parts, ROWS):
        p = row + tl.arange(0, ROWS)[None, :, None]
        sum_1 += tl.load(sums_ptr + p * channels + c, mask=(p < parts) & here, other=0)
        sum_x += tl.load(sums_ptr + (parts + p) * channels + c, mask=(p < parts) & here, other=0)
    sum_1, sum_x = tl.sum(sum_1, 1, True), tl.sum(sum_x, 1, True)
    pixels = images * inner
    if part == 0:
        gw = sum_x
        if MORE_W:
            gw += tl.load(more_w_ptr + c, mask=here, other=0).to(ACC)
        tl.store(gw_out + c, gw, mask=here)
        tl.store(gb_out + c, sum_1, mask=here)
    mean_1, mean_x = sum_1 / pixels, sum_x / pixels
    across = tl.cdiv(inner, PIXELS)
    for tile in range(part * stretch, tl.minimum((part + 1) * stretch, tl.cdiv(images, IMAGES) * across)):
        i = tile // across * IMAGES + tl.arange(0, IMAGES)[:, None, None]
        p = tile % across * PIXELS + tl.arange(0, PIXELS)[None, :, None]
        at = i.to(tl.int64) * image + p.to(tl.int64) * pixel + c * channel
        inside = (i < images) & (p < inner) & here
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        if TRAINING:
            x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
            x = (x - mean) * r
            u -= mean_1 + x * mean_x
        u *= wr
        if MORE:
            u += tl.load(more_ptr + at, mask=inside, other=0).to(ACC)
        tl.store(out_ptr + at, u, mask=inside)


def _write_second(
    u_ptr, gy_ptr, x_ptr, w_ptr, mean_ptr, spread_ptr, sums_ptr, gw_ptr, gb_ptr, ggy_ptr, ggx_ptr, ggw_out,
    channels, images, inner, image, pixel, channel, stretch, eps, parts,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WEIGHT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of u = vx: ggy, ggw and, in training, ggx."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    part = tl.program_id(1)
    here = c < channels
    mean = tl.load(mean_ptr + c, mask=here, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=here, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    wr = r * tl.load(w_ptr + c, mask=here, other=0).to(ACC) if WEIGHT else r
    v_1 = tl.zeros([1, ROWS, CHANNELS], ACC)
    v_x = tl.zeros([1, ROWS, CHANNELS], ACC)
    v_gy = tl.zeros([1, ROWS, CHANNELS], ACC)
    for row in range(0, parts, ROWS):
        p = row + tl.arange(0, ROWS)[None, :, None]
        v_1 += tl.load(sums_ptr + p * channels + c, mask=(p < parts) & here, other=0)
        v_x += tl.load(sums_ptr + (parts + p) * channels + c, mask=(p < parts) & here, other=0)
        v_gy += tl.load(sums_ptr + (2 * parts + p) * channels + c, mask=(p < parts) & here, other=0)
    pixels = images * inner
    v_1, v_x, v_gy = tl.sum(v_1, 1, True) / pixels, tl.sum(v_x, 1, True) / pixels, tl.sum(v_gy, 1, True)
    gw = tl.load(gw_ptr + c, mask=here, other=0).to(ACC)
    gb = tl.load(gb_ptr + c, mask=here, other=0).to(ACC)
    if TRAINING:
        v_gy -= v_1 * gb + v_x * gw
    if part == 0:
        tl.store(ggw_out + c, r * v_gy, mask=here)
    c_x, gw, gb = (v_gy - v_x * gw) / pixels, gw / pixels, gb / pixels
    across = tl.cdiv(inner, PIXELS)
    for tile in range(part * stretch, tl.minimum((part + 1) * stretch, tl.cdiv(images, IMAGES) * across)):
        i = tile // across * IMAGES + tl.arange(0, IMAGES)[:, None, None]
        p = tile % across * PIXELS + tl.arange(0, PIXELS)[None, :, None]
        at = i.to(tl.int64) * image + p.to(tl.int64) * pixel + c * channel
        inside = (i < images) & (p < inner) & here
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        if TRAINING:
            x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
            x = (x - mean) * r
            u -= v_1 + x * v_x
            gy = tl.load(gy_ptr + at, mask=inside, other=0).to(ACC) - gb
            ggx = v_x * gy + c_x * x + gw * u
            tl.store(ggx_ptr + at, -(wr * r) * ggx, mask=inside)
        tl.store(ggy_ptr + at, u * wr, mask=inside)


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
        images, inner = (1, len(x) * inner) if last else (len(x), inner)
        # of a tile: neighbours in memory, few enough to stay in registers
        pixels = 32 if last else min(1024, 1 << (inner - 1).bit_length())
        blocks = {"IMAGES": 1 if last else 1024 // pixels, "PIXELS": pixels, "CHANNELS": 32 if last else 1}
        across = -(-self.channels // blocks["CHANNELS"])
        tiles = -(-images // blocks["IMAGES"]) * -(-inner // pixels)
        stretch = -(-tiles // max(1, _PROGRAMS // across))
        self.grid = across, -(-tiles // stretch)
        strides = (0, self.channels, 1) if last else (self.channels * inner, 1, inner)
        self.extent = self.channels, images, inner, *strides, stretch, eps
        self.types = {"ACC": _triton_dtype(self.accumulator), "TRAINING": training, **blocks}

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
        _compiled(kernel)[self.grid](*given, *self.extent, self.grid[1], **self.types, **switches, ROWS=32)


# enough to keep the largest devices busy several times over
_PROGRAMS = 1024


def _triton_dtype(dtype: torch.dtype) -> Any:
    _compiled(_sums)
    return tl.float64 if dtype is torch.float64 else tl.float32
