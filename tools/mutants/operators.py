"""What is broken beyond cosmic-ray's own operators: mistakes of tensor code.

Each operator lists what it could do to a node of the syntax tree as functions, in a fixed order; cosmic-ray
asks for the number of these and has one of them carried out.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Name, String
from parso.tree import search_ancestor

__all__ = ["OPERATORS", "Provider"]

Node = Any  # a node or a leaf of parso's tree
Edits = list[Callable[[], None]]

_TWO_WAY = (
    ("amax", "amin"), ("max", "min"), ("argmax", "argmin"), ("maximum", "minimum"), ("any", "all"),
    ("mean", "sum"), ("floor", "ceil"), ("sin", "cos"), ("square", "abs"), ("zeros_like", "ones_like"),
    ("l1_loss", "mse_loss"), ("height", "width"), ("tall", "wide"), ("high", "wide"), ("top", "left"),
    ("across", "down"), ("low", "high"), ("old", "new"), ("images", "new_images"), ("maps", "new_maps"),
    ("forward", "backward"), ("mean", "spread"), ("gx", "gy"), ("vx", "gy"), ("vx", "vw"),
)  # fmt: skip
_IN_TURN = (("alpha", "beta"), ("beta", "gamma"), ("gamma", "alpha"))
SWAPPED = (*_TWO_WAY, *((b, a) for a, b in _TWO_WAY), *_IN_TURN)
DROPPED = {
    "abs",
    "clamp",
    "clone",
    "detach",
    "exp",
    "flip",
    "log",
    "neg",
    "relu",
    "requires_grad_",
    "sqrt",
    "square",
}
STRINGS = {"bilinear": "nearest", "zeros": "border", "border": "zeros", "highest": "high"}
RESAMPLING = {"interpolate", "grid_sample", "affine_grid"}
ORDERED = {"where": (1, 2), "merge": (0, 1)}  # calls, and two arguments of theirs that may be mistaken


class _Edits(Operator):
    """An operator that is given as the edits of a node, each a function that changes it in place."""

    before, after = "", ""  # an example

    @abstractmethod
    def edits(self, node: Node) -> Edits:
        """All that can be done to this node."""

    def mutation_positions(self, node: Node) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """See cosmic-ray: one pair of positions for each edit."""
        return ((node.start_pos, node.end_pos) for _ in self.edits(node))

    def mutate(self, node: Node, index: int) -> Node:
        """See cosmic-ray: the node after one of its edits."""
        self.edits(node)[index]()
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        """See cosmic-ray."""
        return (Example(cls.before, cls.after),)


def _becomes(leaf: Node, value: str) -> Callable[[], None]:
    return partial(setattr, leaf, "value", value)


def _is_attribute(leaf: Node) -> bool:
    return leaf.get_previous_leaf() is not None and leaf.get_previous_leaf().value == "."


def _is_read(leaf: Node) -> bool:
    """Whether a name is looked up here, not defined, imported or that of an argument."""
    if leaf.is_definition() or search_ancestor(leaf, "import_from", "import_name"):
        return False
    return not (leaf.parent.type == "argument" and leaf.parent.children[0] is leaf)


def _arguments(trailer: Node) -> list[Node]:
    """The arguments of a call: `trailer` is its brackets with what is between."""
    inside = trailer.children[1:-1]
    if inside and inside[0].type == "arglist":
        inside = inside[0].children
    return [node for node in inside if not (node.type == "operator" and node.value == ",")]


def _calls(node: Node) -> Iterator[tuple[int, str, Node]]:
    """The calls in a chain of trailers: where the brackets stand, the name before them, the brackets."""
    if node.type not in ("atom_expr", "power"):
        return
    for i, child in enumerate(node.children[1:], start=1):
        if child.type == "trailer" and child.children[0].value == "(":
            name = node.children[i - 1].get_last_leaf()
            if name.type == "name":
                yield i, name.value, child


class SwapName(_Edits):
    """Takes one name for another: a reduction, a weight, a side of the image."""

    before, after = "x.amax(1)", "x.amin(1)"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        if not isinstance(node, Name) or not _is_read(node):
            return []
        others = [new for old, new in SWAPPED if old == node.value]
        if not _is_attribute(node):
            scope = search_ancestor(node, "funcdef")
            code = scope.get_code() if scope else ""
            built_in = ("min", "max", "any", "all")
            others = [new for new in others if new in built_in or re.search(rf"\b{new}\b(?!=)", code)]
        return [_becomes(node, new) for new in others]


class OneOfSeveralMaxima(_Edits):
    """Takes `amax`, which spreads its gradient over equal maxima, for `max(…).values`, or the other way."""

    before, after = "x.max(1, keepdim=True).values", "x.amax(1, keepdim=True)"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        found: Edits = []
        for i, name, brackets in _calls(node):
            arguments = _arguments(brackets)
            one_dimension = bool(arguments) and re.fullmatch(r"-?\d", arguments[0].get_code().strip())
            following = node.children[i + 1].get_code() if i + 1 < len(node.children) else ""
            called = node.children[i - 1].get_last_leaf()
            if name in ("max", "min") and following == ".values":
                found.append(partial(self._spread, node, i, called))
            if name in ("amax", "amin") and one_dimension:
                found.append(partial(self._pick, brackets, called))
        return found

    @staticmethod
    def _spread(node: Node, at: int, called: Node) -> None:
        called.value = "a" + called.value
        del node.children[at + 1]

    @staticmethod
    def _pick(brackets: Node, called: Node) -> None:
        called.value = called.value[1:]
        brackets.children[-1].value = ").values"


class DropCall(_Edits):
    """Leaves out a method: `.detach()`, `.clone()`, `.abs()`."""

    before, after = "x.detach().sum()", "x.sum()"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        return [
            partial(node.children.__delitem__, slice(i - 1, i + 1))
            for i, name, _ in _calls(node)
            if name in DROPPED and i >= 2 and _is_attribute(node.children[i - 1].get_last_leaf())
        ]


class NoGraph(_Edits):
    """Loses the graph: a keyword that is handed on becomes a constant."""

    before, after = "f(create_graph=create_graph)", "f(create_graph=False)"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        if node.type != "argument" or node.children[0].get_code().strip() not in (
            "create_graph",
            "retain_graph",
        ):
            return []
        value = node.children[-1]
        if value.type != "name":
            return []
        return [_becomes(value, "False"), _becomes(value, "True")]


class AlignCorners(_Edits):
    """Resamples with the pixels' corners in place of their centres."""

    before, after = "F.interpolate(x, size)", "F.interpolate(x, size, align_corners=True)"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        return [
            _becomes(brackets.children[-1], ", align_corners=True)")
            for _, name, brackets in _calls(node)
            if name in RESAMPLING and "align_corners" not in brackets.get_code()
        ]


class SwapString(_Edits):
    """Takes one mode for another."""

    before, after = 'mode="bilinear"', 'mode="nearest"'

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        if not isinstance(node, String) or node.value.strip("\"'") not in STRINGS:
            return []
        return [_becomes(node, repr(STRINGS[node.value.strip("\"'")]))]


class SwapOrder(_Edits):
    """Exchanges what stands left and right: of `@`, of a minus, of the branches of `where`."""

    before, after = "a @ b", "b @ a"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        if node.type in ("term", "arith_expr") and len(node.children) == 3:
            left, operator, right = node.children
            if operator.value == "@" or (operator.value == "-" and not _sign_is_lost(node)):
                return [partial(_exchange, left, right)]
        found: Edits = []
        for _, name, brackets in _calls(node):
            arguments = _arguments(brackets)
            if name in ORDERED and len(arguments) > max(ORDERED[name]):
                first, second = (arguments[i] for i in ORDERED[name])
                found.append(partial(_exchange, first, second))
        return found


def _sign_is_lost(node: Node) -> bool:
    """Whether the next thing done to a difference in brackets is to square it."""
    after = node.parent.get_next_sibling() if node.parent.type == "atom" else None
    return after is not None and after.get_code() in (".abs", ".square")


def _exchange(a: Node, b: Node) -> None:
    """Exchange two nodes; the blanks before them stay where they are."""
    (in_a, at_a), (in_b, at_b) = ((n.parent, n.parent.children.index(n)) for n in (a, b))
    before = a.get_first_leaf().prefix, b.get_first_leaf().prefix
    in_a.children[at_a], in_b.children[at_b] = b, a
    b.get_first_leaf().prefix, a.get_first_leaf().prefix = before


class DropReversal(_Edits):
    """Goes through a row forwards, where the inverse has to go backwards."""

    before, after = "steps[::-1]", "steps"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        if node.type == "trailer" and node.get_code() == "[::-1]":
            return [partial(_empty, node)]
        return [
            _becomes(node.children[0], "") for i, name, _ in _calls(node) if name == "reversed" and i == 1
        ]


def _empty(node: Node) -> None:
    for leaf in ast_nodes(node):
        if hasattr(leaf, "value"):
            leaf.value = ""


class SampleDeviation(_Edits):
    """Divides by one less than the count."""

    before, after = "total / count", "total / (count - 1)"

    def edits(self, node: Node) -> Edits:
        """See `_Edits`."""
        if not isinstance(node, Name) or node.value not in ("count", "n", "n_samples"):
            return []
        left = node.get_previous_leaf()
        return [_becomes(node, f"({node.value} - 1)")] if left is not None and left.value == "/" else []


OPERATORS = {
    operator.__name__: operator
    for operator in (
        SwapName,
        OneOfSeveralMaxima,
        DropCall,
        NoGraph,
        AlignCorners,
        SwapString,
        SwapOrder,
        DropReversal,
        SampleDeviation,
    )
}


class Provider:
    """These operators in the form in which cosmic-ray looks for them."""

    def __iter__(self) -> Iterator[str]:
        return iter(OPERATORS)

    def __getitem__(self, name: str) -> type[Operator]:
        return OPERATORS[name]
