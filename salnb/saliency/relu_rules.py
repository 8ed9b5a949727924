"""ReLU (eq. 3) and its three backward rules (eq. 4), switched on for one gradient only."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from salnb.double_backward.recomputation import RecomputedMode
from salnb.saliency.relu_masks import PICKS, SIGNS, note_picks, note_sign
from salnb.saliency.relu_spellings import EACH, SPELLINGS, ReLUCall
from salnb.saliency.relu_unreached import STACKS, note_stack

__all__ = ["ReLURule", "Rectifier"]


class ReLURule(RecomputedMode):
    """Swaps every ReLU that a model calls for one whose backward pass can follow another rule.

    A ReLU is caught at the call, so modules, functions, methods, in-place variants, `clamp(min=0)`, ReLU6 and
    the other spellings of `relu_spellings` are all alike, and the model needs no hooks. A product with a mask
    that is the sign of the input in each of many places is one, however the mask was made. The rule acts
    inside `active()`: for the gradient that makes the map. At any other time, the second backward pass of a
    loss on the map included, the true derivative is used; the same rule there would give a wrong gradient for
    the parameters.

    Args:
        rule: "deconvnet" or "guided_backprop".

    Attributes:
        rule_active: whether the rule acts.
        relu_count: the number of ReLUs that were swapped.
        unreached: the ReLUs that were met and could not be swapped, and that no graph tells.
    """

    def __init__(self, rule: str):
        super().__init__()
        self.rule = rule
        self.rule_active = False
        self.relu_count = 0
        self.unreached: Counter[str] = Counter()

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
        if func in EACH:
            return self._each(func, args, kwargs)
        read = SPELLINGS.get(func)
        call = read(*args, **kwargs) if read else None
        if call is not None and torch._C._are_functorch_transforms_active():  # which refuse our Function
            if call.by_mask:  # of the others the graph tells
                where = "torch.func" if call.input.requires_grad else "torch.vmap"
                self.unreached[f"{func.__name__} in {where}"] += 1
            call = None
        result = (
            func(*args, **kwargs) if call is None else self._swapped(call, partial(func, *args, **kwargs))
        )
        if func in SIGNS:
            note_sign(SIGNS[func], result, args, kwargs)
        if func in PICKS:
            note_picks(result, args)
        if func in STACKS:
            note_stack(result, *args, **kwargs)
        return result

    def _swapped(self, call: ReLUCall, run: Callable[[], Any]) -> Tensor:
        """The result of a rectifier, whose backward pass follows the rule; `run` is the call itself."""
        self.relu_count += 1
        x, written = call.input, call.input if call.into is None else call.into
        # the rest of a view's base has a history to be kept
        apart = call.cap is not None or written is not x or (call.in_place and x._is_view())
        if not apart:
            return Rectifier.apply(x, run, call, call.in_place, self)
        out = Rectifier.apply(x, partial(call.out_of_place, x), call, False, self)
        if call.cap is not None:
            out = out.clamp(max=call.cap)
        return written.copy_(out) if call.in_place else out

    def _each(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a call on lists of tensors gives, with those of its parts swapped that are rectifiers."""
        run, read = EACH[func]
        columns = [arg if isinstance(arg, list | tuple) else repeat(arg) for arg in args]
        rows = list(zip(*columns, strict=False)) if args and columns[0] is args[0] else []
        calls = [read(*row, **kwargs) for row in rows]
        if not any(calls):
            return func(*args, **kwargs)

        def alone(others: list, x: Tensor) -> Tensor:
            others = [[other] if isinstance(other, Tensor) else other for other in others]
            return run([x], *others, **kwargs)[0]

        results = []
        for (x, *others), call in zip(rows, calls, strict=True):
            if call is not None and call.input is x:
                call = call._replace(plain=partial(alone, others))
            result = self._swapped(call, partial(alone, others, x)) if call else alone(others, x)
            results.append(result if func is run else x.copy_(result))
        return tuple(results) if func is run else results


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
