"""The ReLU rules of DeconvNet and guided backpropagation (eq. 3 and 4), switched on for one gradient only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RELU = (F.relu, torch.relu, Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_)


class ReLURule(TorchFunctionMode):
    """Swaps every ReLU that a model calls for one whose backward pass can follow another rule.

    A ReLU is caught at the call, so modules, `F.relu`, `torch.relu`, in-place variants and ReLU6 are all
    alike, and the model needs no hooks. The rule acts while `open` is true: for the gradient that makes
    the map. At any other time, the second backward pass of a loss on the map included, the true
    derivative is used; the same rule there would give a wrong gradient for the parameters.

    Args:
        rule: "deconvnet" or "guided_backprop".

    Attributes:
        open: whether the rule acts.
        met: the number of ReLUs that were swapped.
    """

    def __init__(self, rule: str):
        super().__init__()
        self.guided = rule == "guided_backprop"
        self.open = False
        self.met = 0

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _as_rectifier(func, *args, **kwargs)
        if call is None:
            return func(*args, **kwargs)
        self.met += 1
        return _Rectifier.apply(*call, self)


def _as_rectifier(func: Callable, *args: Any, **kwargs: Any) -> tuple[Tensor, float | None, bool] | None:
    """The input, the upper bound and whether it is in place, if this call is a ReLU or a ReLU6."""
    if func in _RELU or func in _RELU_IN_PLACE:
        x, *rest = args or (kwargs["input"],)
        in_place = func in _RELU_IN_PLACE or bool(rest and rest[0]) or kwargs.get("inplace", False)
        return x, None, in_place
    if func is F.relu6:
        x, *rest = args or (kwargs["input"],)
        return x, 6.0, bool(rest and rest[0]) or kwargs.get("inplace", False)
    if func is F.hardtanh:  # nn.ReLU6 calls it, with the bounds 0 and 6
        x, lower, upper, in_place = _arguments_of_hardtanh(*args, **kwargs)
        return (x, upper, in_place) if lower == 0 else None
    return None


def _arguments_of_hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Tensor, float, float, bool]:
    return input, min_val, max_val, inplace


class _Rectifier(torch.autograd.Function):
    """min(max(x, 0), upper), whose backward pass asks its rule what to let through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upper: float | None, in_place: bool, rule: ReLURule) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
            out = x.clamp_(0, upper)
        else:
            out = x.clamp(0, upper)
        ctx.save_for_backward(out)
        ctx.upper, ctx.rule = upper, rule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (out,) = ctx.saved_tensors
        if not ctx.rule.open:
            passes = _was_active(out, ctx.upper)
        elif ctx.rule.guided:
            passes = _was_active(out, ctx.upper) & (grad > 0)  # eq. 4
        else:
            passes = grad > 0  # eq. 3
        return grad * passes, None, None, None


def _was_active(out: Tensor, upper: float | None) -> Tensor:
    return out > 0 if upper is None else (out > 0) & (out < upper)
