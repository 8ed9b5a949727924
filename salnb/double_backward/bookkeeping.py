"""What the functions of `salnb.double_backward.functions` ask autograd for, and remind it of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Maybe", "last", "save", "saved", "wanted"]

Maybe = Tensor | None


class _NoThirdDerivative(Function):
    """Hands `result` on, and refuses to be differentiated with respect to the `sources` it comes from."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "third derivatives are not available: a loss of salnb.Objective can be differentiated once, and "
            "a map taken with create_graph=True once (what ran inside fast_double_backward(): twice in all); "
            "for more, as for a model that takes a gradient in its forward pass, go inside "
            "salnb.double_backward.second_derivatives_of_pytorch()"
        )


def last(backward: Callable) -> Callable:
    """Wrap the backward of a backward: its results are exact, and refuse to be differentiated again.

    What was saved is unpacked once, as some hooks ask for, and comes behind `ctx`.

    PyTorch's `once_differentiable` is not enough. Its refusal hangs on a leaf of its own, which
    `autograd.grad` does not visit on its way to the inputs: the missing term would go unnoticed.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Maybe) -> Any:
        with torch.no_grad():
            results = backward(ctx, kept := ctx.saved_tensors, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *kept) if t is not None and t.requires_grad]
        return tuple(None if r is None else _NoThirdDerivative.apply(r, *sources) for r in results)

    return wrapper


# the saved-tensor hooks that are active, where PyTorch tells; else any might be
_active_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: True)


def save(ctx: Any, *tensors: Maybe) -> None:
    """Save tensors of the forward pass; with `saved`, hooks that hand out others are noticed."""
    ctx.save_for_backward(*tensors)
    ctx.kinds = [_kind(t) for t in tensors] if _active_hooks(False) else None


def saved(ctx: Any) -> tuple:
    """What was saved in the forward pass.

    A recomputation that ran other functions hands out what those save: for a square matrix, its transpose.
    """
    tensors = ctx.saved_tensors
    if ctx.kinds is None:
        return tensors
    for kind, tensor in zip(ctx.kinds, tensors, strict=True):
        found = _kind(tensor)
        # a hook that copies may forget a memory format
        if found != kind and (found is None or found[:2] != kind[:2] or not tensor.is_contiguous()):
            raise RuntimeError(
                f"the backward pass of {type(ctx).__name__.removesuffix('Backward')} got a tensor of shape, "
                f"dtype and strides {found} where the forward pass saved {kind}: saved-tensor hooks must "
                "hand out what they were given, and a recomputation must run what the forward pass ran"
            )
    return tensors


def _kind(tensor: Maybe) -> tuple | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.stride())


def wanted(ctx: Any, index: int) -> bool:
    """Whether the backward pass that is running needs the gradient of input number `index`.

    `ctx.needs_input_grad` only knows that the input *could* have a gradient. The gradient with respect to
    the images does not need those of the weights, which would cost as much again, and the engine knows it.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:  # a leaf that autograd.grad was asked for, or an engine that does not plan ahead
        return True
