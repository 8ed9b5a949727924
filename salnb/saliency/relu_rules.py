"""The ReLU rules of DeconvNet and guided backpropagation (eq. 3 and 4), switched on for one gradient only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RELU = (F.relu, torch.relu, Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_)
_PARAMETERS = dict.fromkeys((*_RELU, *_RELU_IN_PLACE, F.relu6), ("input", "inplace")) | {
    F.hardtanh: ("input", "min_val", "max_val", "inplace")
}


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
    arguments = dict(zip(_PARAMETERS.get(func, ()), args, strict=False)) | kwargs
    if func in _RELU_IN_PLACE:
        return arguments["input"], None, True
    if func in _RELU:
        return arguments["input"], None, arguments.get("inplace", False)
    if func is F.relu6:
        return arguments["input"], 6.0, arguments.get("inplace", False)
    if func is F.hardtanh and arguments.get("min_val") == 0:  # nn.ReLU6 calls it
        return arguments["input"], arguments.get("max_val", 1.0), arguments.get("inplace", False)
    return None


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
        if not ctx.rule.open or ctx.rule.guided:
            (out,) = ctx.saved_tensors
            grad = _where_active(grad, out, ctx.upper)  # the true derivative, and half of eq. 4
        if ctx.rule.open:
            grad = _where_active(grad, grad.detach(), None)  # eq. 3, and the other half of eq. 4
        return grad, None, None, None


def _where_active(grad: Tensor, out: Tensor, upper: float | None) -> Tensor:
    """`grad` where 0 < `out` < `upper`, else 0, by the kernels of PyTorch's own backward pass."""
    if upper is None:
        return torch.ops.aten.threshold_backward(grad, out, 0)
    return torch.ops.aten.hardtanh_backward(grad, out, 0, upper)
