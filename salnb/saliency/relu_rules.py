"""ReLU (eq. 3) and its three backward rules (eq. 4), switched on for one gradient only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from salnb.double_backward.recomputation import RecomputedMode

__all__ = ["ReLURule", "Rectifier"]

_RELU = (F.relu, torch.relu, Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_)
_PARAMETERS = dict.fromkeys((*_RELU, *_RELU_IN_PLACE, F.relu6), ("input", "inplace")) | {
    F.hardtanh: ("input", "min_val", "max_val", "inplace")
}


class ReLURule(RecomputedMode):
    """Swaps every ReLU that a model calls for one whose backward pass can follow another rule.

    A ReLU is caught at the call, so modules, `F.relu`, `torch.relu`, in-place variants and ReLU6 are all
    alike, and the model needs no hooks. The rule acts inside `active()`: for the gradient that makes the
    map. At any other time, the second backward pass of a loss on the map included, the true derivative is
    used; the same rule there would give a wrong gradient for the parameters.

    Args:
        rule: "deconvnet" or "guided_backprop".

    Attributes:
        rule_active: whether the rule acts.
        relu_count: the number of ReLUs that were swapped.
    """

    def __init__(self, rule: str):
        super().__init__()
        self.rule = rule
        self.rule_active = False
        self.relu_count = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the rule acts."""
        self.rule_active = True
        try:
            yield
        finally:
            self.rule_active = False

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _as_rectifier(func, *args, **kwargs)
        if call is None:
            return func(*args, **kwargs)
        self.relu_count += 1
        return Rectifier.apply(*call, self)


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


class Rectifier(torch.autograd.Function):
    """min(max(x, 0), upper), whose backward pass asks its `ReLURule` what to let through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upper: float | None, in_place: bool, relu_rule: ReLURule) -> Tensor:
        """The rectified input; where there is no upper bound, that of ReLU."""
        if in_place:
            ctx.mark_dirty(x)
        out = (x.clamp_ if in_place else x.clamp)(0, upper)  # eq. 3
        ctx.save_for_backward(out)
        ctx.upper, ctx.relu_rule = upper, relu_rule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient where the rule of the moment lets it pass."""
        (grad,) = grads
        if not ctx.relu_rule.rule_active:
            grad = _pass_where(ctx.saved_tensors[0], grad, ctx.upper)  # eq. 4, gradient: input positive
        elif ctx.relu_rule.rule == "deconvnet":
            grad = _pass_where(grad.detach(), grad)  # eq. 4, DeconvNet: gradient positive
        else:
            grad = _pass_where(ctx.saved_tensors[0], grad, ctx.upper)
            grad = _pass_where(grad.detach(), grad)  # eq. 4, guided: both positive
        return grad, None, None, None


def _pass_where(positive: Tensor, grad: Tensor, upper: float | None = None) -> Tensor:
    """`grad` where 0 < `positive` < `upper`, else 0, by the kernels of PyTorch's own backward pass."""
    if upper is None:
        return torch.ops.aten.threshold_backward(grad, positive, 0)
    return torch.ops.aten.hardtanh_backward(grad, positive, 0, upper)
