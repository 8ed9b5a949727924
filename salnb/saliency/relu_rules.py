"""ReLU (eq. 3) and its three backward rules (eq. 4), switched on for one gradient only."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from salnb._common.autograd import nodes_of
from salnb.double_backward.recomputation import RecomputedMode
from salnb.saliency.relu_spellings import SIGNS, SPELLINGS, ReLUCall, is_zero, note_sign

__all__ = ["ReLURule", "Rectifier", "relus_unreached"]


class ReLURule(RecomputedMode):
    """Swaps every ReLU that a model calls for one whose backward pass can follow another rule.

    A ReLU is caught at the call, so modules, functions, methods, in-place variants, `clamp(min=0)`, ReLU6 and
    the other spellings of `relu_spellings` are all alike, and the model needs no hooks. The rule acts inside
    `active()`: for the gradient that makes the map. At any other time, the second backward pass of a loss on
    the map included, the true derivative is used; the same rule there would give a wrong gradient for the
    parameters.

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
        read = SPELLINGS.get(func)
        call = read(*args, **kwargs) if read else None
        if call is None:
            result = func(*args, **kwargs)
            if func in SIGNS:
                note_sign(SIGNS[func], result, *args, *kwargs.values())
            return result
        self.relu_count += 1
        x, written = call.input, call.input if call.into is None else call.into
        # the rest of a view's base has a history to be kept
        apart = call.cap is not None or written is not x or (call.in_place and x._is_view())
        if not apart:
            return Rectifier.apply(x, partial(func, *args, **kwargs), call, call.in_place, self)
        out = Rectifier.apply(x, partial(call.out_of_place, x), call, False, self)
        if call.cap is not None:
            out = out.clamp(max=call.cap)
        return written.copy_(out) if call.in_place else out


class Rectifier(torch.autograd.Function):
    """min(max(x, 0), upper), whose backward pass asks its `ReLURule` what to let through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[], Any], call: ReLUCall, in_place: bool, relu_rule: ReLURule
    ) -> Tensor:
        """The rectified input, as `run` computes it."""
        slope = _slope(call.plain, x) if call.plain else None
        out = run()  # eq. 3
        if in_place:
            ctx.mark_dirty(x)
            out = x  # the assignment to items returns nothing
        ctx.save_for_backward(out, slope)
        ctx.upper, ctx.relu_rule = call.upper, relu_rule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient where the rule of the moment lets it pass."""
        (grad,), (out, slope) = grads, ctx.saved_tensors
        rule = ctx.relu_rule.rule if ctx.relu_rule.rule_active else None
        if rule != "deconvnet" and slope is None:
            grad = _pass_where(out, grad, ctx.upper)  # eq. 4, gradient: input positive
        elif rule != "deconvnet":
            # where PyTorch has a derivative of a half or one at zero, eq. 4 has none
            positive = slope > 0 if rule is None else (slope > 0) & (out > 0)
            grad = (grad * slope).where(positive, 0)
        if rule == "deconvnet":
            grad = _pass_where(grad.detach(), grad)  # eq. 4, DeconvNet: gradient positive
        elif rule == "guided_backprop":
            grad = _pass_where(grad.detach(), grad)  # eq. 4, guided: both positive
        return grad, None, None, None, None


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]


def _pass_where(positive: Tensor, grad: Tensor, upper: float | None = None) -> Tensor:
    """`grad` where 0 < `positive` < `upper`, else 0, by the kernels of PyTorch's own backward pass."""
    if upper is None:
        return torch.ops.aten.threshold_backward(grad, positive, 0)
    return torch.ops.aten.hardtanh_backward(grad, positive, 0, upper)


#: what ReLUs, or what is taken away to make one, leave in a graph, and the attribute that is zero in these
_NODES = {
    "Relu": None,
    "Threshold": "_saved_threshold",
    "Clamp": "_saved_min",
    "ClampMin": "_saved_min",
    "ClampMax": "_saved_max",
    "Minimum": "_saved_other",
    "Hardtanh": "_saved_min_val",
    "LeakyRelu": "_saved_negative_slope",
    "Elu": "_saved_alpha",
    "Maximum": "_saved_other",
    "Fmax": "_saved_other",
}


def relus_unreached(scores: Tensor) -> list[str]:
    """The ReLUs of a graph that no rule has swapped, as words for a warning.

    These run where no mode sees them: in scripted modules, in threads of the model, in an
    `autograd.Function` of the user's, which is known by its name only.
    """
    found: Counter[str] = Counter()
    for node in nodes_of(scores):
        if words := _is_unreached(node):
            found[words] += 1
    return [f"{words} ({count}×)" for words, count in found.items()]


def _is_unreached(node: Any) -> str | None:
    """What to call a node that is, or may hide, a ReLU; None for others."""
    name = type(node).__name__  # quicker to get at than `node.name()`
    if name == "CppFunction":
        name = node.name()
    if "DifferentiableGraph" in name:
        return "scripted code (torch.jit)"
    kind = name.rstrip("0123456789").removesuffix("Backward")
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        function = type(node)._forward_cls  # type: ignore[attr-defined]
        ours = function.__module__.startswith("salnb.")
        return f"the Function {kind}" if not ours and _sounds_like_relu(kind) else None
    if kind not in _NODES:
        return None
    bound = getattr(node, attribute) if (attribute := _NODES[kind]) else 0
    if bound is None:  # of a clamp from above
        bound = node._saved_max
    return name if is_zero(bound) else None


def _sounds_like_relu(name: str) -> bool:
    return any(part in name.lower() for part in ("relu", "rectif")) and not any(
        part in name.lower() for part in ("leaky", "prelu")
    )
