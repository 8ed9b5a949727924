"""All that a compiled step was made for, apart from the values of its tensors.

Python runs while a step is traced, and not again. So whatever it may look at belongs to the key of the graph:
the tree of modules, their hyper-parameters and other attributes, hooks, train and eval modes, the kinds of
all tensors and which of them are one, and PyTorch's global switches. For ResNet-50 this takes about a
millisecond. What it cannot see: global variables of a model's code, files, clocks.
"""

import functools
import pickle
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from salnb.double_backward.mode import switches
from salnb.objective.precision import autocast_dtype

__all__ = ["changes", "graph_key", "refuse_what_a_graph_forgets", "structure_key"]

_PLAIN = {int, float, complex, str, bytes, bool, type(None), type(...), torch.dtype, torch.device, torch.Size}
_PLAIN |= {torch.memory_format, torch.layout}
# what is told apart, or what no forward pass looks at
_SKIPPED = {"_parameters", "_buffers", "_modules", "_state_dict_hooks", "_state_dict_pre_hooks"}
_SKIPPED |= {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_non_persistent_buffers_set"}
_GLOBAL_HOOKS = [name for name in vars(torch_modules) if name.startswith("_global_") and "_hooks" in name]
_DEPTH = 4  # of objects within objects: what lies deeper is told by its identity


# whose objects a model may hold, and which lead to all the rest of a program
_OUTSIDE = {"logging", "threading", "weakref", "lightning", "pytorch_lightning", "lightning_fabric"}


class _Same:
    """Equal to itself only; keeps the object, so that no other one gets its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


class _Entries(tuple[tuple, ...]):
    """What a module's forward pass may look at, each behind its name."""

    __slots__ = ()


def graph_key(step: nn.Module, settings: Any, given: list[Tensor], structure: pytree.TreeSpec) -> dict:
    """What a graph holds for, by what it is called.

    Args:
        step: the module that is traced.
        settings: a hashable description of the step.
        given: the tensors of the batch.
        structure: that of the batch.
    """
    key: dict[str, Hashable] = {
        "the batch": (tuple(map(_tensor_kind, given)), structure_key(structure)),
        "the objective": _frozen(settings),
        "a global switch of PyTorch": _switches(given[0]),
        "a global hook": tuple(_frozen_hooks(getattr(torch_modules, name)) for name in _GLOBAL_HOOKS),
    }
    classes: dict[type, None] = {}
    tensors: dict[Any, int] = {}  # which keeps them: an address may be taken again
    for name, module in step.named_modules(remove_duplicate=False):
        if name:
            classes[type(module)] = None
            key[name] = _Entries(_entries(module, tensors))
    for cls in classes:
        key[f"the class {cls.__name__}"] = cls, _frozen_class(cls)
    return key


def _entries(module: nn.Module, tensors: dict[Any, int]) -> list[tuple]:
    entries: list[tuple] = [("", type(module))]
    # what pruning, weight_norm and spectral_norm set anew in each pass, before it is looked at
    hooks = module._forward_pre_hooks.values()
    set_anew = {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in hooks} if hooks else ()
    for name, value in module.__dict__.items():
        kind = type(value)
        if kind in _PLAIN:
            entries.append((name, kind, value))
        elif kind is OrderedDict and not value:  # no hooks
            continue
        elif name not in _SKIPPED and name not in set_anew:
            entries.append((name, _frozen_hooks(value) if name.endswith("_hooks") else _frozen(value)))
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            # tied ones have one number
            number = tensors.setdefault(tensor, len(tensors))
            entries.append((name, number, None if tensor is None else _tensor_kind(tensor)))
    return entries


def structure_key(structure: pytree.TreeSpec) -> Hashable:
    """A hashable stand-in for the structure, which is not hashable in every version of PyTorch."""
    children = structure.children() if hasattr(structure, "children") else structure.children_specs
    return structure.type, _frozen(structure.context), tuple(map(structure_key, children))


def changes(key: Mapping[str, Hashable], other: Mapping[str, Hashable]) -> list[str]:
    """The names of what differs between two keys."""
    names = []
    for name in {**key, **other}:
        before, after = key.get(name), other.get(name)
        if isinstance(before, _Entries) and isinstance(after, _Entries):
            first, second = ({entry[0]: entry for entry in entries} for entries in (before, after))
            differing = [inner for inner in {**first, **second} if first.get(inner) != second.get(inner)]
            names += [f"{name}.{inner}".rstrip(".") for inner in differing]
        elif before != after:
            names.append(name)
    return names


@contextmanager
def refuse_what_a_graph_forgets(step: nn.Module, key_of_the_moment: Any) -> Iterator[None]:
    """Raise a RuntimeError if Python, while a step is traced inside, does what is to be done in each step.

    A graph neither draws Python's random numbers nor sets attributes of modules. The attributes are put back.
    """
    before, drawn = key_of_the_moment(), _python_random()
    attributes = [(module, module.__dict__.copy()) for module in step.modules()]
    yield
    if drawn != _python_random():
        raise RuntimeError(
            "compile() needs a model that draws its random numbers with PyTorch, and this one (or its "
            "augmentation) uses Python's or NumPy's, which a graph would draw only once: leave compile() out"
        )
    changed = changes(before, key_of_the_moment())
    for module, attributes_before in attributes:  # without tensors of the trace
        module.__dict__.clear()
        module.__dict__.update(attributes_before)
    if changed:
        raise RuntimeError(
            f"compile() needs a model that leaves its attributes alone, but a forward pass changes "
            f"{', '.join(changed[:5])}: make it a buffer, or leave compile() out (where it is a cache that "
            "is filled once, run the model once before)"
        )


def _python_random() -> Hashable:
    numpy = sys.modules.get("numpy")
    return random.getstate(), pickle.dumps(numpy.random.get_state()) if numpy else None


def _switches(images: Tensor) -> Hashable:
    try:
        tf32 = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set in the newer way, which cannot be mixed with the older one
        tf32 = None
    return (
        autocast_dtype(images),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        tf32,
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        switches(),
        tuple(map(_Same, _get_current_function_mode_stack())),  # set_default_device is one
    )


def _tensor_kind(tensor: Tensor) -> tuple:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.stride(), tensor.requires_grad


def _frozen_class(cls: type) -> Hashable:
    """Attributes of the classes that are not PyTorch's, and the forward pass of any."""
    own = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("torch", "builtins", "typing", "abc")]
    items = [(name, value) for c in own for name, value in vars(c).items() if name[:2] != "__"]
    # functions and descriptors are told by their identity: what they lead to has no end
    frozen = [(name, _Same(v) if hasattr(v, "__get__") else _frozen(v, depth=1)) for name, v in items]
    return _Same(getattr(cls, "forward", None)), tuple(frozen)


def _frozen_hooks(hooks: Any) -> Hashable:
    """Hooks in their order; what a handle is numbered does not matter."""
    return tuple(map(_frozen, hooks.values())) if isinstance(hooks, Mapping) else _frozen(hooks)


def _frozen(value: Any, seen: dict[int, int] | None = None, depth: int = 0) -> Hashable:
    """A hashable stand-in, which changes when the value is changed in place, too."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in (tuple, list) and _PLAIN.issuperset(kinds := tuple(map(type, value))):
        return kind, kinds, tuple(value)
    if isinstance(value, Tensor):
        return _Same(value), None if value.is_inference() else value._version
    seen = {} if seen is None else seen
    if id(value) in seen:
        return "again", seen[id(value)]
    known = isinstance(value, type | types.ModuleType | types.BuiltinFunctionType)
    if known or depth > _DEPTH or kind.__module__.split(".")[0] in _OUTSIDE:
        return _Same(value)
    seen[id(value)] = len(seen)
    return kind, _frozen_contents(value, seen, depth + 1)


def _frozen_contents(value: Any, seen: dict[int, int], depth: int) -> Hashable:
    """What is in a container or an object; the object itself where that cannot be told."""
    if isinstance(value, Mapping):
        return _frozen_items(value.items(), seen, depth)
    if isinstance(value, list | tuple):
        return tuple(_frozen(item, seen, depth) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(_frozen(item, seen, depth) for item in value)
    if isinstance(value, types.MethodType):
        return _Same(value.__func__), _Same(value.__self__)
    if isinstance(value, functools.partial):
        return _frozen((value.func, value.args, value.keywords), seen, depth)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return _Same(value), _frozen([value.__defaults__, value.__kwdefaults__, *cells], seen, depth)
    if hasattr(value, "__dict__") and not isinstance(value, random.Random):
        # a module that is no submodule: its parameters are no inputs of the graph
        return _frozen_items(vars(value).items(), seen, depth)
    return _frozen_memory(value)


def _frozen_memory(value: Any) -> Hashable:
    """Sources of random numbers, and NumPy's arrays and numbers."""
    if isinstance(value, random.Random):
        return value.getstate()
    if hasattr(value, "bit_generator"):
        return pickle.dumps(value.bit_generator.state)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return value.dtype.str, value.shape, value.tobytes()
    return _Same(value)


def _frozen_items(items: Iterable[tuple], seen: dict[int, int], depth: int) -> Hashable:
    return tuple((_frozen(name, seen, depth), _frozen(value, seen, depth)) for name, value in items)
