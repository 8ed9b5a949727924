"""A batch on a CPU, where it is known which samples are chosen, and worth while to keep in the cache."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from salnb._common.checks import is_channels_last, is_traced

__all__ = ["PIECE", "SMALL_IMAGE", "apply_where", "are_large", "collect", "in_pieces", "need_grad", "on_cpu"]


def on_cpu(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: the host would wait for a GPU, and a trace has none."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def apply_where(chosen: Tensor, kernel: Callable[..., Tensor], images: Tensor, *per_sample: Tensor) -> Tensor:
    """Apply a kernel to the chosen samples and leave the others as they are.

    Only the chosen samples are computed where it is known which they are, else all. Where none is chosen,
    the images themselves may come back.

    Args:
        chosen: `(N,)` booleans.
        kernel: a function of images `(M, C, H, W)` and of the per-sample tensors that keeps the shape.
        images: `(N, C, H, W)`.
        *per_sample: tensors of first dimension N.
    """
    if not on_cpu(images):
        return torch.where(chosen[:, None, None, None], kernel(images, *per_sample), images)
    index = chosen.nonzero()[:, 0]
    if not len(index):
        return images
    if len(index) == len(images):
        return kernel(images, *per_sample)
    if are_large(images):
        parts = zip(chosen.tolist(), *(values.split(1) for values in (images, *per_sample)), strict=True)
        results = (kernel(image, *values) if act else image for act, image, *values in parts)
        return collect(results, images, *per_sample)
    result = images.clone()
    result[index] = kernel(images[index], *(values[index] for values in per_sample))
    return result


# below this many pixels a loop over the samples costs more than it saves
SMALL_IMAGE = 64 * 64


def are_large(images: Tensor) -> bool:
    """Whether images `(N, C, H, W)` are best treated one by one: large ones on a CPU."""
    return images.shape[-2] * images.shape[-1] >= SMALL_IMAGE and on_cpu(images)


def need_grad(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def collect(results: Iterable[Tensor], images: Tensor, *inputs: Tensor) -> Tensor:
    """One tensor like `images` of results `(1, C, H, W)`, each put in its place as soon as it is there.

    Args:
        results: one for each image.
        images: `(N, C, H, W)`, which they were made from.
        *inputs: whatever else they were made from.
    """
    if need_grad(images, *inputs):
        return torch.cat(list(results))
    whole = torch.empty_like(images)
    for room, result in zip(whole.split(1), results, strict=True):
        room.copy_(result)
    return whole


# numbers that a core's cache holds along with the intermediate results of a few steps
PIECE = 2**20


def in_pieces(function: Callable[..., Any], samples: Tensor, params: Any, division: int = 1) -> Any:
    """Call a function that treats each sample on its own with one piece of the batch after another.

    On a CPU a large batch takes several times as long as its arithmetic where there are many steps: every
    intermediate result goes through memory that the system first has to hand out page by page. Pieces that
    stay in the cache avoid that.

    Args:
        function: of samples and their params, to a tensor or a tuple of tensors of as many samples.
        samples: `(N, ...)`.
        params: of N samples.
        division: how many times smaller than usual a piece is; 0: the whole batch.
    """
    length = max(1, PIECE // max(division, 1) * len(samples) // samples.numel())
    if length >= len(samples) or not division or not on_cpu(samples):
        return function(samples, params)
    pieces = [slice(start, start + length) for start in range(0, len(samples), length)]
    results = (function(samples[piece], params.piece(piece)) for piece in pieces)
    first = next(results)
    if any(part.requires_grad for part in pytree.tree_leaves(first)):
        return pytree.tree_map(lambda *parts: torch.cat(parts), first, *results)
    whole = pytree.tree_map(lambda part: _room(part, len(samples)), first)
    for piece, result in zip(pieces, itertools.chain([first], results), strict=True):
        pytree.tree_map(lambda room, part, piece=piece: room[piece].copy_(part), whole, result)
    return whole


def _room(part: Tensor, samples: int) -> Tensor:
    """An empty tensor like a piece, in its memory format, for so many samples."""
    memory_format = torch.channels_last if is_channels_last(part) else torch.contiguous_format
    return torch.empty(
        samples, *part.shape[1:], dtype=part.dtype, device=part.device, memory_format=memory_format
    )
