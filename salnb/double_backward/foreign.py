"""Functions (`torch.autograd.Function`) of the user's: whether what their backward pass says is true.

The backward pass of a Function computes a gradient from what was saved. Where that is detached on the way,
the gradient has a graph nonetheless, by way of the gradient that it was given, and its derivative lacks a
term. So the backward pass is run again, on copies of what was saved, a little larger and a little smaller:
what the graph says of the difference is compared with the difference.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from salnb._common.autograd import nodes_of

__all__ = ["foreign_nodes", "has_foreign_functions", "misses_a_term"]

_KNOWN = ("salnb", "torch", "torchvision")
_OFTEN = 8  # so often a Function is tried out
_passed: Any = weakref.WeakKeyDictionary()
# relative steps and the precision that they are for: a kernel may have only one
_STEPS = {torch.float64: 1e-4, torch.float32: 1e-2}
_TOLERANCE = 0.05


def foreign_nodes(scores: Tensor) -> list[Any]:
    """The calls of Functions that are not ours in the graph of `scores`."""
    nodes: list[Any] = [node for node in nodes_of(scores) if isinstance(node, BackwardCFunction)]
    return [node for node in nodes if not type(node)._forward_cls.__module__.startswith("salnb.")]


def has_foreign_functions() -> bool:
    """Whether anybody but us, PyTorch and torchvision has defined a Function."""
    ahead = Function.__subclasses__()
    while ahead:
        function = ahead.pop()
        if function.__module__.split(".")[0] not in _KNOWN:
            return True
        ahead += function.__subclasses__()
    return False


def misses_a_term(node: Any, gradients: Sequence[Tensor | None]) -> bool:
    """Whether the backward pass of a Function depends otherwise on what it saved than its graph says.

    Args:
        node: the call, in a graph.
        gradients: those of its outputs.

    A jump, as of a mask, is no derivative; what cannot be run again counts as right.
    """
    function = type(node)._forward_cls
    if _passed.get(function, 0) >= _OFTEN:
        return False
    _passed[function] = _passed.get(function, 0) + 1
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        for dtype in _STEPS:
            try:
                found = _compare(_Trial(node, gradients, dtype))
            except Exception:  # whatever a kernel says of another precision
                continue
            if found:
                del _passed[function]
            return found
    return False


class _Context:
    """Stands in for the context of a call, with other tensors."""

    def __init__(self, node: Any, saved: tuple, held: dict[str, Tensor]):
        self._node, self.saved_tensors = node, saved
        vars(self).update(held)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


class _Trial:
    """The backward pass of a call, as a function of what was saved."""

    def __init__(self, node: Any, gradients: Sequence[Tensor | None], dtype: torch.dtype):
        self.node, self.dtype = node, dtype
        function = type(node)._forward_cls
        own = function.vjp is not Function.vjp
        self.backward = function.vjp if own else function.backward
        shapes = [data.shape for data in node._input_metadata]
        like = next(g for g in gradients if g is not None)
        given = [
            like.new_zeros(s) if g is None and node.materialize_grads else g
            for g, s in zip(gradients, shapes, strict=True)
        ]
        self.gradients = [self._copy(g) for g in given]
        self.saved: dict[Any, Any] = dict(enumerate(node.saved_tensors))
        self.saved |= {name: value for name, value in vars(node).items() if isinstance(value, Tensor)}
        kinds = (Tensor, nn.Parameter)
        if any(isinstance(t, Tensor) and type(t) not in kinds for t in (*self.saved.values(), *gradients)):
            raise TypeError("tensors with rules of their own")
        self.moved: dict[Any, Tensor] = {
            key: self._copy(t).requires_grad_()
            for key, t in self.saved.items()
            if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad
        }
        # each element by another share of itself: what is zero, as behind a ReLU, stays so
        self.shares = {
            key: t.detach() * (1 + torch.arange(t.numel()).to(t).add(i).cos().view(t.shape) / 2)
            for i, (key, t) in enumerate(self.moved.items())
        }

    def _copy(self, tensor: Tensor | None) -> Any:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(self.dtype, copy=True)

    def run(self, step: float | None = None) -> list[Tensor]:
        """The gradients of the inputs, with what was saved moved by a step; None: with a graph."""
        there = {key: self._copy(t) if isinstance(t, Tensor) else t for key, t in self.saved.items()}
        moved = self.moved
        if step is not None:
            moved = {key: t.detach() + step * self.shares[key] for key, t in moved.items()}
        there |= moved
        saved = tuple(value for key, value in there.items() if isinstance(key, int))
        held = {key: value for key, value in there.items() if isinstance(key, str)}
        gradients = [g if g is None else g.clone() for g in self.gradients]
        for gradient in gradients if step is None else ():
            if gradient is not None and gradient.is_floating_point():
                gradient.requires_grad_()
        found = self.backward(_Context(self.node, saved, held), *gradients)
        found = found if isinstance(found, tuple | list) else (found,)
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def _compare(trial: _Trial) -> bool:
    """Whether the derivative in the direction of the shares is not the graph's."""
    step = _STEPS[trial.dtype]
    if not trial.moved or not (results := trial.run()):
        return False
    if any(node.name() == "torch::autograd::Error" for result in results for node in nodes_of(result)):
        return False  # it is marked as `once_differentiable`, and refused for that
    slopes = []
    for size in (step, step / 2):
        up, down = trial.run(size), trial.run(-size)
        slopes.append([(a.detach() - b.detach()) / (2 * size) for a, b in zip(up, down, strict=True)])
    total, numeric, magnitude = results[0].new_zeros(()), 0.0, 0.0
    for result, slope, again in zip(results, *slopes, strict=True):
        smooth = (slope - again).abs() <= 0.02 * slope.abs()
        total = total + (result * slope.sign().where(smooth, 0)).sum()
        numeric += slope.abs().where(smooth, 0).sum().item()
        magnitude += result.detach().abs().sum().item()
    of_graph = 0.0
    if total.requires_grad:
        found = torch.autograd.grad(total, list(trial.moved.values()), allow_unused=True)
        parts = zip(found, trial.shares.values(), strict=True)
        of_graph = sum((g * share).sum().item() for g, share in parts if g is not None)
    return numeric > 1e-3 * magnitude and abs(of_graph - numeric) > _TOLERANCE * numeric
