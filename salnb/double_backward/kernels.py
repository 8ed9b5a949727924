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


def _statistics(mean_ptr, spread_ptr, c, here, eps, ACC: tl.constexpr, TRAINING: tl.constexpr):
    """Mean and 1/std of the channels."""
    mean = tl.load(mean_ptr + c, mask=here, other=0).to(ACC)
    r = tl.load(spread_ptr + c, mask=here, other=1).to(ACC)
    if not TRAINING:
        r = 1 / tl.sqrt(r + eps)
    return mean, r


def _place(
    tile, c, here, images, inner, image, pixel, channel, IMAGES: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Where the values of a tile lie, and which of them there are."""
    across = tl.cdiv(inner, PIXELS)
    i = tile // across * IMAGES + tl.arange(0, IMAGES)[:, None, None]
    p = tile % across * PIXELS + tl.arange(0, PIXELS)[None, :, None]
    at = i.to(tl.int64) * image + p.to(tl.int64) * pixel + c * channel
    return at, (i < images) & (p < inner) & here


def _sums(
    u_ptr, gy_ptr, x_ptr, mean_ptr, spread_ptr, out_ptr,
    channels, images, inner, image, pixel, channel, stretch, eps,
    ACC: tl.constexpr, TRAINING: tl.constexpr, WITH_GY: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each channel the sums of u, u * x' and, where asked for, u * gy: (3, parts, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    here = c < channels
    mean, r = _statistics(mean_ptr, spread_ptr, c, here, eps, ACC, TRAINING)
    # of each place in a tile, and of all in the end: threads need not wait for one another in each tile
    sum_1 = tl.zeros([IMAGES, PIXELS, CHANNELS], ACC)
    sum_x = tl.zeros([IMAGES, PIXELS, CHANNELS], ACC)
    sum_gy = tl.zeros([IMAGES, PIXELS, CHANNELS], ACC)
    tiles = tl.cdiv(images, IMAGES) * tl.cdiv(inner, PIXELS)
    for tile in range(part * stretch, tl.minimum((part + 1) * stretch, tiles)):
        at, inside = _place(tile, c, here, images, inner, image, pixel, channel, IMAGES, PIXELS)
        u = tl.load(u_ptr + at, mask=inside, other=0).to(ACC)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(ACC)
        sum_1 += u
        sum_x += u * (x - mean) * r
        if WITH_GY:
            gy = tl.load(gy_ptr + at, mask=inside, other=0).to(ACC)
            sum_gy += u * gy
    out = out_ptr + part * channels + c
    tl.store(out, tl.sum(tl.sum(sum_1, 0, True), 1, True), mask=here)
    tl.store(out + parts * channels, tl.sum(tl.sum(sum_x, 0, True), 1, True), mask=here)
    if WITH_GY:
        tl.store(out + 2 * parts * channels, tl.sum(tl.sum(sum_gy, 0, True), 1, True), mask=here)


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
    mean, r = _statistics(mean_ptr, spread_ptr, c, here, eps, ACC, TRAINING)
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
    tiles = tl.cdiv(images, IMAGES) * tl.cdiv(inner, PIXELS)
    for tile in range(part * stretch, tl.minimum((part + 1) * stretch, tiles)):
        at, inside = _place(tile, c, here, images, inner, image, pixel, channel, IMAGES, PIXELS)
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
    mean, r = _statistics(mean_ptr, spread_ptr, c, here, eps, ACC, TRAINING)
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
    tiles = tl.cdiv(images, IMAGES) * tl.cdiv(inner, PIXELS)
    for tile in range(part * stretch, tl.minimum((part + 1) * stretch, tiles)):
        at, inside = _place(tile, c, here, images, inner, image, pixel, channel, IMAGES, PIXELS)
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
    global tl, _statistics, _place
    import triton
    import triton.language

    if tl is None:  # where the kernels look for them
        tl, _statistics, _place = triton.language, triton.jit(_statistics), triton.jit(_place)
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
    plan = _plan_for(x, training, eps)
    gy, x, more_x = plan.laid_out(gy), plan.laid_out(x), None if more_x is None else plan.laid_out(more_x)
    gx, gw, gb = torch.empty_like(x), plan.vector(), plan.vector()
    sums = plan.sums(gy, None, x, mean, spread)
    tensors = gy, x, w, mean, spread, sums, more_x, more_w, gx, gw, gb
    plan.start(_write_first, tensors, (w is not None, more_x is not None, more_w is not None))
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
    plan = _plan_for(x, training, eps)
    vx, gy, x = plan.laid_out(vx), plan.laid_out(gy), plan.laid_out(x)
    ggy, ggw = torch.empty_like(x), plan.vector()
    ggx = torch.empty_like(x) if training else x.new_empty(0)
    sums = plan.sums(vx, gy, x, mean, spread)
    tensors = vx, gy, x, w, mean, spread, sums, gw, gb, ggy, ggx, ggw
    plan.start(_write_second, tensors, (w is not None,))
    return ggy, ggx, ggw


def _plan_for(x: Tensor, training: bool, eps: float) -> _Plan:
    last = x.ndim == 2 or (not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))
    return _plan(x.shape, last, x.dtype, x.device, training, eps)


class _Plan:
    """How the kernels go through tensors of one kind."""

    def __init__(
        self,
        shape: torch.Size,
        last: bool,
        dtype: torch.dtype,
        device: torch.device,
        training: bool,
        eps: float,
    ) -> None:
        self.format = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        images, self.channels, inner = shape[0], shape[1], shape[2:].numel()
        if last:
            images, inner = 1, images * inner
        # of a tile: neighbours in memory, few enough to stay in registers
        pixels = 32 if last else min(1024, 1 << (inner - 1).bit_length())
        block = (1, pixels, 32) if last else (1024 // pixels, pixels, 1)  # images, pixels, channels
        across = -(-self.channels // block[2])
        tiles = -(-images // block[0]) * -(-inner // pixels)
        stretch = -(-tiles // max(1, _PROGRAMS // across))
        self.grid = across, -(-tiles // stretch), 1
        strides = (0, self.channels, 1) if last else (self.channels * inner, 1, inner)
        self.extent = self.channels, images, inner, *strides, stretch, eps
        accumulator = torch.promote_types(dtype, torch.float32)
        self.vector = functools.partial(torch.empty, self.channels, dtype=accumulator, device=device)
        parts = 3, self.grid[1], self.channels
        self.parts = functools.partial(torch.empty, parts, dtype=accumulator, device=device)
        self.training, self.block, self.accumulator = training, block, _triton_dtype(accumulator)
        self.launchers: dict[tuple, Callable] = {}

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor in the layout of x."""
        return tensor.contiguous(memory_format=self.format)

    def sums(self, u: Tensor, gy: Tensor | None, x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        """What the parts found for each channel."""
        out = self.parts()
        self._launch(_sums, (u, gy, x, mean, spread, out), self.extent, (gy is not None,), self.block)
        return out

    def start(self, kernel: Callable, tensors: tuple[Any, ...], switches: tuple[bool, ...]) -> None:
        """Run one of the kernels that write."""
        self._launch(kernel, tensors, (*self.extent, self.grid[1]), switches, (*self.block, _ROWS))

    def _launch(
        self,
        kernel: Callable,
        tensors: tuple[Any, ...],
        extent: tuple[float, ...],
        switches: tuple[bool, ...],
        block: tuple[int, ...],
    ) -> None:
        """Start a kernel; from the second time on without a look at each argument, which takes Triton long.

        It compiles a kernel for types, and for integers that are one or multiples of 16, all of which a plan
        fixes, and for pointers that are such multiples.
        """
        first = tensors[0]
        given = [first if tensor is None else tensor for tensor in tensors]  # those are not read
        arguments = *given, *extent, self.accumulator, self.training, *switches, *block
        types = [tensor.dtype for tensor in given if tensor.data_ptr() % 16 == 0]
        key = (kernel, switches, *types)
        if (launcher := self.launchers.get(key)) is not None:
            launcher(*arguments)
            return
        compiled = _compiled(kernel)[self.grid](*arguments)
        if len(types) == len(given) and _can_be_started_again():
            self.launchers[key] = compiled[self.grid]


_plan = functools.lru_cache(maxsize=1024)(_Plan)
# of a grid: enough to keep the largest devices busy several times over
_PROGRAMS = 1024
_ROWS = 32  # of sums that are read at a time


@functools.cache
def _can_be_started_again() -> bool:
    """Whether Triton starts what it compiled with the arguments of its function; the interpreter does not."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return version >= (3, 6) and not triton.knobs.runtime.interpret


def _triton_dtype(dtype: torch.dtype) -> Any:
    _compiled(_sums)
    return tl.float64 if dtype is torch.float64 else tl.float32
