"""The graph that PyTorch keeps of a computation."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["nodes_of"]


def nodes_of(tensor: Tensor) -> Iterator[Any]:
    """The nodes of the graph that a tensor was computed by, each once; none of a tensor without a graph."""
    seen, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
            yield node
