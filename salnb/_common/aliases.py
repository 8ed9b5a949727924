"""Tensors of a model that are views of one another: their copies are, too."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from salnb._common.checks import is_traced

__all__ = ["InPlace", "copies_that_share", "held_in_containers", "memory_of"]

_OF_EVERY_MODULE = {*vars(nn.Module())}
_DEEP, _MANY = 3, 1000  # containers within containers, and the entries of one, that are looked at


def memory_of(tensor: Tensor) -> int | None:
    """What tells the memory of a plain tensor; None of one that has none of its own."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or is_traced(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None


def copies_that_share(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Copies, by the ids of the originals, of tensors that have memory in common; so have the copies."""
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        if (memory := memory_of(tensor)) is not None:
            groups.setdefault(memory, {})[id(tensor)] = tensor
    return {name: copy for group in groups.values() if len(group) > 1 for name, copy in _copied(group)}


def _copied(group: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    storage = next(iter(group.values())).untyped_storage().clone()
    raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    for name, tensor in group.items():
        whole = raw[: len(raw) - len(raw) % tensor.element_size()].view(tensor.dtype)
        yield name, whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def held_in_containers(module: nn.Module) -> Iterator[Tensor]:
    """The tensors in lists, dictionaries and the like that are attributes of a module."""
    ahead = [(value, 0) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    while ahead:
        value, depth = ahead.pop()
        if isinstance(value, Tensor):
            if depth:
                yield value
        elif isinstance(value, dict | list | tuple | deque | set) and len(value) <= _MANY and depth < _DEEP:
            entries: Iterable[Any] = value.values() if isinstance(value, dict) else value
            ahead += [(entry, depth + 1) for entry in entries]


class InPlace:
    """Tensors that a pass works on themselves, as a container has views of them, and what they held."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.before = {id(tensor): (tensor, tensor.clone()) for tensor in tensors}

    @torch.no_grad()
    def put_back(self) -> None:
        """Give them the values that they had."""
        for tensor, values in self.before.values():
            if not torch.equal(tensor, values):
                tensor.copy_(values)
