"""What a step has to do, counted without doing it: floating-point operations, and bytes read and written.

An operator counts with what it has to read and to write, each once; whatever it does besides is its own.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from salnb import models
from salnb.timing.cases import Case
from salnb.timing.profiler import KINDS, kind_of
from salnb.timing.steps import NUM_CLASSES, step_of

__all__ = ["count_bytes", "count_flops"]

# of the kinds of the profiler "other" is told apart further
_KINDS = (*KINDS[:-1], "elementwise", KINDS[-1])


def count_flops(case: Case) -> tuple[int, int]:
    """Floating-point operations of a step on average, and those of its convolutions, by torch's formulas.

    Products of matrices and convolutions are counted, two operations for each multiplication with addition.
    Nothing is computed: tensors have shapes only.
    """
    work = _per_step(case)
    return work["flops"], work["convolution flops"]


def count_bytes(case: Case) -> dict[str, int]:
    """Bytes that the operators of a step read and write on average, by kind of operation.

    What a derivative is made of belongs to the kind of its function: passes over images in a second
    derivative of batch norm are "batch norm", not "elementwise". Views and allocations move nothing. A
    step with fused kernels, which move less, or in channels_last counts as the usual one.
    """
    work = _per_step(case)
    return {kind: work[kind] for kind in _KINDS}


def _per_step(case: Case) -> Counter[str]:
    precision = "32" if case.precision == "tf32" else case.precision
    usual = replace(
        case, every=1, precision=precision, compiled=False, captured=False, channels_last=False, fused=False
    )
    each_once = replace(usual, samples=min(case.samples, 1))
    base, each = _count(each_once.baseline), _count(each_once)
    if case.samples > 1:  # every further noisy copy takes as much again
        twice = _count(replace(usual, samples=2))
        each = Counter({name: each[name] + (case.samples - 1) * (twice[name] - each[name]) for name in each})
    return Counter({name: (each[name] + (case.every - 1) * base[name]) // case.every for name in each})


@cache
def _count(case: Case) -> Counter[str]:
    with torch.device("meta"):  # some draw their weights in ways that fake tensors do not bear
        model = models.build(case.network, NUM_CLASSES)
    # of the attention kernels only the one that is written out is counted whole
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        step = step_of(case, torch.device("cpu"), model=_without_values(model))
        with _WorkCounter() as counter:
            step()
    return counter.found


def _without_values(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


class _WorkCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter(dict.fromkeys(("flops", "convolution flops", *_KINDS), 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.found["flops"] += flops
            self.found["convolution flops"] += flops * ("convolution" in str(func))
        if moved := _moved(func, _tensors((args, kwargs)), _tensors(out)):
            node = torch._C._current_autograd_node()
            kind = kind_of([func._schema.name, node.name() if node else ""])
            elementwise = kind == "other" and torch.Tag.pointwise in func.tags
            self.found["elementwise" if elementwise else kind] += moved
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


_ALLOCATING = ("empty", "new_empty")
_OVERWRITING = ("aten::copy_", "aten::fill_", "aten::zero_")


def _moved(func: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    name = func._schema.name
    there = {tensor.untyped_storage()._cdata for tensor in given}
    is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in there for t in made)
    if is_view or not made or name.partition("::")[2].startswith(_ALLOCATING):
        return 0
    return _size(given[name in _OVERWRITING :]) + _size(made)


def _size(tensors: Iterable[Tensor]) -> int:
    """In bytes; what is expanded lies in memory once."""
    return sum(
        math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) * t.element_size()
        for t in tensors
    )
