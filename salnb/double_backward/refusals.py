"""What cannot be differentiated twice, or not rightly, is refused where a map keeps its graph."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from salnb._common.autograd import nodes_of
from salnb._common.checks import is_traced
from salnb.double_backward.foreign import foreign_nodes, misses_a_term

__all__ = ["check_second_derivative", "gradients_put_back", "second_derivatives_kept"]

_REFUSED = (
    "{} differentiates the model twice, and one of its operations has no second derivative ({}): "
    "replace the operation, or {}"
)
# first derivatives that raise when they are differentiated: registered from Python, or in C++ as before that
_OF_TORCHVISION = re.compile(r"torchvision__(\w+?)_backward_|vision::ops::.*?(\w+)BackwardFunction")


def check_second_derivative(
    maps: Tensor, what: str = "the saliency term", way_out: str = "use gamma=0"
) -> None:
    """Raise a RuntimeError if an operation that `maps` were computed with cannot be differentiated again.

    The error says `what` asks for that, and names a `way_out`.

    PyTorch would say so in the backward pass, in words that do not tell why; asked for the gradients of given
    tensors only, it may leave the operation's share out without a word.
    """
    for node in nodes_of(maps):
        reason = ""
        if node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            try:
                node(*[None] * len(node._input_metadata))
            except RuntimeError as error:
                reason = str(error)
        elif found := _OF_TORCHVISION.search(node.name()):
            reason = f"the backward pass of {found[1] or found[2]} of torchvision is not differentiable"
        if reason:
            raise RuntimeError(_REFUSED.format(what, reason, way_out))


class _Watch:
    """What the backward passes of Functions did, by the Functions' names."""

    def __init__(self) -> None:
        self.lost: dict[str, None] = {}
        self.seen: list[tuple[BackwardCFunction, list[Tensor | None]]] = []

    def look(self, node: Any, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
        """A hook: the gradients of the Function's inputs and outputs."""
        constant = [x for x in inputs if x is not None and not x.requires_grad]
        if any(y is not None and y.requires_grad for y in outputs) and any(x.any() for x in constant):
            self.lost[_name(node)] = None
        self.seen.append((node, [None if y is None else y.detach() for y in outputs]))


@contextmanager
def second_derivatives_kept(
    scores: Tensor,
    what: str = "the saliency term",
    way_out: str = "use gamma=0",
    parameters: Iterable[Tensor] = (),
) -> Iterator[None]:
    """Context for gradients of `scores` that keep a graph; a RuntimeError names a Function that spoils them.

    * It loses the graph, as by NumPy, by kernels, under `no_grad` or with `detach`, and is not marked as
      `once_differentiable`: the second derivative would lack its share without a word.
    * It detaches what it saved: the gradient changes when that is moved a little, and its graph says it does
      not, or another amount (`salnb.double_backward.foreign`). What was saved without a graph, such as
      intermediate results, cannot be told from constants and is not noticed.
    * It writes the `.grad` of `parameters`, or of others that the graph leads to: one backward pass of two.
    """
    watch, nodes = _Watch(), _watched_nodes(scores)
    before = _gradients_of(scores, parameters) if nodes else []
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.register_hook(partial(watch.look, node)).remove)
        yield
    if watch.lost:
        reason = f"the backward pass of the Function {', '.join(watch.lost)} returns tensors without a graph"
        raise RuntimeError(_REFUSED.format(what, reason, way_out))
    if _put_back(before):
        names = ", ".join(dict.fromkeys(map(_name, nodes)))
        raise RuntimeError(
            f"{what} differentiates the model twice, and the backward pass of a Function (of {names}) writes "
            f"a .grad itself, which would hold neither gradient: return the gradient instead, or {way_out}"
        )
    if wrong := dict.fromkeys(
        _name(node) for node, gradients in watch.seen if misses_a_term(node, gradients)
    ):
        reason = (
            f"the backward pass of the Function {', '.join(wrong)} detaches what it saved, or is "
            "differentiated wrongly: its result changes with the saved tensors otherwise than its graph says"
        )
        raise RuntimeError(_REFUSED.format(what, reason, way_out))


@contextmanager
def gradients_put_back(scores: Tensor, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Context for gradients of `scores`, after which each `.grad` is what it was, whatever is written."""
    nodes = _watched_nodes(scores)
    before = _gradients_of(scores, parameters, copied=True) if nodes else []
    try:
        yield
    finally:
        _put_back(before)


def _watched_nodes(scores: Tensor) -> list[Any]:
    """The calls of custom Functions, where their values can be looked at: in no trace and no CUDA graph."""
    if is_traced(scores) or (scores.is_cuda and torch.cuda.is_current_stream_capturing()):
        return []
    return foreign_nodes(scores)


class _Gradient(NamedTuple):
    """The `.grad` of a tensor at one moment."""

    tensor: Tensor
    grad: Tensor | None
    version: int
    values: Tensor | None  # a copy, where it may have to be put back

    @property
    def is_written(self) -> bool:
        """Whether it has been replaced or changed in place since."""
        grad = self.grad
        return self.tensor.grad is not grad or (grad is not None and grad._version != self.version)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo that, changes in place only where there is a copy."""
        self.tensor.grad = self.grad
        if self.grad is not None and self.values is not None:
            self.grad.copy_(self.values)


def _gradients_of(scores: Tensor, parameters: Iterable[Tensor], *, copied: bool = False) -> list[_Gradient]:
    leaves = [node.variable for node in nodes_of(scores) if hasattr(node, "variable")]
    found = {id(leaf): leaf for leaf in (*leaves, *parameters) if leaf.is_leaf}.values()
    without = [_Gradient(leaf, None, 0, None) for leaf in found if leaf.grad is None]
    grads = [(leaf, leaf.grad) for leaf in found if leaf.grad is not None]
    return without + [_Gradient(leaf, g, g._version, g.clone() if copied else None) for leaf, g in grads]


def _put_back(before: list[_Gradient]) -> bool:
    """Undo what was written to a `.grad`; whether there was anything."""
    written = [gradient for gradient in before if gradient.is_written]
    for gradient in written:
        gradient.put_back()
    return bool(written)


def _name(node: Any) -> str:
    return type(node)._forward_cls.__name__
