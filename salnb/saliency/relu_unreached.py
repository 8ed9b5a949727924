"""The ReLUs that no rule has swapped, found in the graph of a forward pass."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from salnb._common.autograd import nodes_of
from salnb.saliency.relu_masks import is_zero

__all__ = ["STACKS", "note_stack", "relus_unreached"]

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
    "Fmin": "_saved_other",
}
#: where several tensors meet, of which one may be zero
_OVER_STACKS = ("Amax", "Amin", "Max", "Min", "Sort", "Topk")
#: the calls that make stacks
STACKS = {torch.stack, torch.cat, torch.concat, torch.concatenate}
_HAS_ZEROS = "salnb: a constant of it is zero"

Edge = tuple[Any, int]  # a node, and which of its results is meant


def relus_unreached(scores: Tensor, met: Mapping[str, int]) -> list[str]:
    """The ReLUs of a graph that no rule has swapped, as words for a warning.

    These run where no mode sees them: in scripted modules, in threads of the model, in an
    `autograd.Function` of the user's, which is known by its name only. Or they are made of other operations:
    half the sum of a tensor and its magnitude, the largest of it and zeros in a stack. Those that were `met`
    and are told by no graph come first.
    """
    found = Counter(met)
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
    if kind in ("Add", "Lerp") and _joins_magnitude(node, kind):
        return f"{name} of a tensor and its magnitude"
    if kind in _OVER_STACKS and _is_over_zeros(node):
        return f"{name} over a stack with zeros"
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


def _kind(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _joins_magnitude(node: Any, kind: str) -> bool:
    """Whether a sum, or a mean, is of x and its magnitude, both times the same number."""
    if len(node.next_functions) != 2 or (kind == "Lerp" and getattr(node, "_saved_weight", None) != 0.5):
        return False
    for plain, other in permutations(node.next_functions):
        for of_magnitude in _unscaled(other):
            tensor = _under_magnitude(of_magnitude[-1])
            for of_tensor in _unscaled(plain) if tensor else ():
                if of_tensor[-1] == tensor and _factor(of_tensor) == _factor(of_magnitude):
                    return True
    return False


def _unscaled(edge: Edge) -> Iterator[list[Edge]]:
    """The ways from an edge to what it is a multiple of: by none, one factor or several."""
    way = [edge]
    yield way
    while _kind(way[-1][0]) in ("Mul", "Div") and len(way) < 4:
        factors = [before for before in way[-1][0].next_functions if before[0] is not None]
        if len(factors) != 1:
            return
        way = [*way, factors[0]]
        yield way


def _factor(way: list[Edge]) -> float | None:
    """By what number one end of a way is a multiple of the other; NaN, which equals none, if by a tensor."""
    factor = 1.0
    for node, _ in way[:-1]:
        number = node._saved_self if node._saved_other is None else node._saved_other
        if not isinstance(number, Tensor) or number.ndim or number.is_meta:
            return float("nan")
        with _disable_current_modes():
            value = number.item()
        factor = factor * value if _kind(node) == "Mul" else factor / value
    return factor


def _under_magnitude(edge: Edge) -> Edge | None:
    """The x of abs(x), of the root of its square, of x · sign(x), or of relu(-x), which with x makes one."""
    node, kind = edge[0], _kind(edge[0])
    if kind == "Abs":
        return node.next_functions[0]
    before: Any = node.next_functions[0][0] if node is not None and node.next_functions else None
    if kind == "Sqrt" and _kind(before) == "Pow" and getattr(before, "_saved_exponent", None) == 2:
        return before.next_functions[0]
    if kind == "Rectifier" and _kind(before) == "Neg":
        return before.next_functions[0]
    if kind == "Mul":
        for x, sign in permutations(node.next_functions, 2):
            if _kind(sign[0]) in ("Sign", "Sgn") and sign[0].next_functions[0] == x:
                return x
    return None


def note_stack(result: Any, tensors: Any, *args: Any, **options: Any) -> None:
    """Remember of a stack whether a constant in it is zero, as the largest in it has no values to look at."""
    if isinstance(result, Tensor) and result.grad_fn is not None:
        constant = [t for t in tensors if not t.requires_grad]
        if constant:
            metadata: Any = result.grad_fn.metadata
            metadata[_HAS_ZEROS] = any(is_zero(t) is not False for t in constant)


def _is_over_zeros(node: Any) -> bool:
    """Whether a maximum or a minimum is taken of what was stacked, zeros among it."""
    stack, _ = node.next_functions[0]
    if _kind(stack) not in ("Stack", "Cat") or not hasattr(node, "_saved_dim"):
        return False
    constant = [i for i, (before, _) in enumerate(stack.next_functions) if before is None]
    if not constant:
        return False
    values = getattr(node, "_saved_self", None)
    shape = node._saved_self_sym_sizes if values is None else values.shape
    dims = node._saved_dim if isinstance(node._saved_dim, tuple) else (node._saved_dim,)
    dim = _from_front(stack._saved_dim, len(shape))
    if [_from_front(d, len(shape)) for d in dims] != [dim] or shape[dim] != len(stack.next_functions):
        return False
    if values is None:  # max(dim), sort and topk keep none; nor is known what was stacked unseen
        return stack.metadata.get(_HAS_ZEROS, True)
    return any(is_zero(values.detach().select(dim, i)) for i in constant)


def _from_front(dim: int, ndim: int) -> int:
    """A dimension counted from the front; autograd gives negative ones modulo 2 to the power of 64."""
    return (dim - 2**64 if dim >= 2**63 else dim) % ndim
