"""All that a compiled step was made for, apart from the values of its tensors.

Python runs while a step is traced, and not again. So whatever it may look at belongs to the key of the graph:
the tree of modules, their hyper-parameters and other attributes, hooks, train and eval modes, the kinds of
all tensors and which of them are one, and PyTorch's global switches. For ResNet-50 this takes about a
millisecond. Of an object that a method is bound to, it is what the method's code names. What it cannot see:
global variables of a model's code, files, clocks, and what objects hold that lie more than four levels deep
in one attribute, beyond the first 200 of these (containers are looked into to the end).
"""

import functools
import itertools
import pickle
import random
import sys
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from salnb.double_backward.mode import switches
from salnb.objective.precision import autocast_dtype
from salnb.objective.randomness import refuse_other_randomness

__all__ = ["changes", "graph_key", "refuse_what_a_graph_forgets", "structure_key"]

_PLAIN = {int, float, complex, str, bytes, bool, type(None), type(...), torch.dtype, torch.device, torch.Size}
_PLAIN |= {torch.memory_format, torch.layout}
# what is told apart, or what no forward pass looks at
_SKIPPED = {"_parameters", "_buffers", "_modules", "_state_dict_hooks", "_state_dict_pre_hooks"}
_SKIPPED |= {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_non_persistent_buffers_set"}
_OF_RNNS = {"_flat_weights", "_flat_weight_refs"}  # their parameters once more
_GLOBAL_HOOKS = [name for name in vars(torch_modules) if name.startswith("_global_") and "_hooks" in name]
_DEPTH = 4  # of objects within objects or containers: those that lie deeper are counted
_DEEP = 50  # of any within others: what lies deeper is told by its identity
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_MANY = 200  # classes and modules of Python within one attribute, values within one of these, deep objects

# whose objects a model may hold, and which lead to all the rest of a program
_OUTSIDE = {"logging", "threading", "weakref", "lightning", "pytorch_lightning", "lightning_fabric"}
# whose classes and modules do not change
_FIXED = {*sys.stdlib_module_names, *_OUTSIDE, "torch", "numpy"} - {"__main__"}


class _Seen(dict[int, tuple[int, Any]]):
    """By an object's address: its number, and itself, so that no other one gets the address."""

    namespaces = 0  # classes and modules among them
    deep = 0  # objects among them that lie deep


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


def graph_key(
    step: nn.Module, settings: Any, given: list[Tensor], structure: pytree.TreeSpec, places: bool = False
) -> dict:
    """What a graph holds for, by what it is called.

    Args:
        step: the module that is traced.
        settings: a description of the step, `TermSettings`; each of its `model_kwargs` has its own entry.
        given: the tensors of the batch.
        structure: that of the batch.
        places: whether it holds only where parameters and buffers lie at present.
    """
    kwargs = settings.model_kwargs
    key: dict[str, Hashable] = {
        "the batch": (tuple(map(_tensor_kind, given)), structure_key(structure)),
        "the objective": _frozen({n: v for n, v in vars(settings).items() if n != "model_kwargs"}),
        "a global switch of PyTorch": _switches(given[0]),
        "a global hook": tuple(_frozen_hooks(getattr(torch_modules, name)) for name in _GLOBAL_HOOKS),
    }
    key |= {f"model_kwargs[{name!r}]": _frozen(value) for name, value in kwargs}
    classes: dict[type, None] = {}
    tensors = _Seen()
    modules = [(name, module) for name, module in step.named_modules(remove_duplicate=False) if name]
    # what an attribute leads to and is of the tree has its own entries
    tree: _Seen = _Seen({id(module): (number, module) for number, (_, module) in enumerate(modules)})
    for name, module in modules:
        classes[type(module)] = None
        key[name] = _Entries(_entries(module, tensors, tree))
    if places:
        addresses = tuple(tensor.data_ptr() for _, tensor in tensors.values() if tensor is not None)
        key["the place of a parameter or buffer"] = addresses
    for cls in classes:
        key[f"the class {cls.__name__}"] = cls, _frozen_class(cls, _Seen(tree), 1)
    return key


def _entries(module: nn.Module, tensors: _Seen, tree: _Seen) -> list[tuple]:
    entries: list[tuple] = [("", type(module))]
    # what pruning, weight_norm and spectral_norm set anew in each pass, before it is looked at
    hooks = module._forward_pre_hooks.values()
    set_anew: set[Any] = (
        {getattr(h, "_tensor_name", getattr(h, "name", None)) for h in hooks} if hooks else set()
    )
    if isinstance(module, nn.RNNBase):
        set_anew = set_anew | _OF_RNNS
    for name, value in module.__dict__.items():
        kind = type(value)
        if kind in _PLAIN:
            entries.append((name, kind, value))
        elif kind is OrderedDict and not value:  # no hooks
            continue
        elif name not in _SKIPPED and name not in set_anew:
            hooks_or_value = _frozen_hooks(value, tree) if name.endswith("_hooks") else _frozen(value, tree)
            entries.append((name, hooks_or_value))
    for slot in _slots(type(module)):
        entries += [(name, _frozen(value, tree)) for name, value in _slot_items(module, slot)]
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            # tied ones have one number
            number, _ = tensors.setdefault(id(tensor), (len(tensors), tensor))
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
    before = key_of_the_moment()
    attributes = [(module, module.__dict__.copy()) for module in step.modules()]
    with refuse_other_randomness():
        yield
    changed = changes(before, key_of_the_moment())
    for module, attributes_before in attributes:  # without tensors of the trace
        module.__dict__.clear()
        module.__dict__.update(attributes_before)
    if changed:
        raise RuntimeError(
            f"compile() needs a model that leaves its attributes alone, but a forward pass changes "
            f"{', '.join(changed[:5])}: make it a buffer, or leave compile() out (where it is a cache that "
            "is filled once, run the model once before; a generator counts as "
            "changed)"
        )


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


def _frozen_class(cls: type, seen: _Seen, depth: int, names: set[str] | None = None) -> Hashable:
    """Attributes (those of the names) of the classes that may change, and the forward pass of any."""
    items = [(name, value) for c in _own(cls) for name, value in vars(c).items() if name[:2] != "__"]
    items = [(name, value) for name, value in items if names is None or name in names]
    # functions and descriptors are told by their identity: what they lead to has no end
    frozen = [(name, _Same(v) if hasattr(v, "__get__") else _frozen(v, seen, depth)) for name, v in items]
    return _Same(getattr(cls, "forward", None)), tuple(frozen)


def _own(cls: type) -> list[type]:
    """The classes of the method resolution order that may change."""
    return [c for c in cls.__mro__ if c.__module__.split(".")[0] not in _FIXED]


def _members(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    members = [member for c in _own(cls) for member in vars(c).values()]
    return tuple(member for member in members if isinstance(member, types.MemberDescriptorType))


_slots: Any = functools.lru_cache(maxsize=1024)(_members)


def _slot_items(value: Any, slot: types.MemberDescriptorType) -> list[tuple[str, Any]]:
    try:
        return [(slot.__name__, slot.__get__(value))]
    except AttributeError:  # not set
        return []


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """An object's attributes of its own."""
    slots = [item for slot in _slots(type(value)) for item in _slot_items(value, slot)]
    return [*getattr(value, "__dict__", {}).items(), *slots]


def _frozen_hooks(hooks: Any, tree: _Seen | None = None) -> Hashable:
    """Hooks in their order; what a handle is numbered does not matter."""
    if isinstance(hooks, Mapping):
        return tuple(_frozen(hook, tree) for hook in hooks.values())
    return _frozen(hooks, tree)


def _frozen(value: Any, seen: _Seen | None = None, depth: int = 0) -> Hashable:
    """A hashable stand-in, which changes when the value is changed in place, too."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in (tuple, list) and _PLAIN.issuperset(kinds := tuple(map(type, value))):
        return kind, kinds, tuple(value)
    if isinstance(value, Tensor):
        return _Same(value), None if value.is_inference() else value._version
    if seen is None or depth == 0:
        seen = _Seen(seen or {})
    if id(value) in seen:
        return "again", seen[id(value)][0]
    if deep := depth > _DEPTH and not isinstance(value, _CONTAINERS):
        seen.deep += 1
    too_deep = depth > _DEEP or (deep and seen.deep > _MANY)
    opaque = too_deep or isinstance(value, types.BuiltinFunctionType)
    if opaque or (kind.__module__.split(".")[0] in _OUTSIDE and not isinstance(value, Mapping)):
        return _Same(value)
    if isinstance(value, type | types.ModuleType):
        return _Same(value), _frozen_namespace(value, seen, depth)
    seen[id(value)] = len(seen), value
    return kind, _frozen_namespace(kind, seen, depth), _frozen_contents(value, seen, depth + 1)


def _frozen_namespace(value: type | types.ModuleType, seen: _Seen, depth: int) -> Hashable:
    """What a class or a module of Python holds, where that may change."""
    name = value.__module__ if isinstance(value, type) else value.__name__
    if name.split(".")[0] in _FIXED or id(value) in seen or seen.namespaces >= _MANY:
        return None
    seen.namespaces += 1
    seen[id(value)] = len(seen), value
    if isinstance(value, type):
        return None if issubclass(value, Enum) else _frozen_class(value, seen, depth + 1)
    public = [(n, v) for n, v in vars(value).items() if n[0] != "_" and type(v) in _PLAIN | {tuple}]
    return _frozen_items(public[:_MANY], seen, depth + 1)


def _frozen_contents(value: Any, seen: _Seen, depth: int) -> Hashable:
    """What is in a container or an object; the object itself where that cannot be told."""
    if isinstance(value, Mapping):
        contents = _frozen_items(value.items(), seen, depth)
        return (
            (contents, _frozen_items(_attributes(value), seen, depth))
            if isinstance(value, dict)
            else contents
        )
    if isinstance(value, list | tuple | deque):
        contents = tuple(_frozen(item, seen, depth) for item in value)
        return contents, getattr(value, "maxlen", None), _frozen_items(_attributes(value), seen, depth)
    if isinstance(value, set | frozenset):
        contents = frozenset(_frozen(item, seen, depth) for item in value)
        return contents, _frozen_items(_attributes(value), seen, depth)
    if isinstance(value, types.MethodType):
        return _Same(value.__func__), _frozen_self(value, seen, depth)
    if isinstance(value, functools.partial):
        return _frozen((value.func, value.args, value.keywords), seen, depth)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        inner = [value.__defaults__, value.__kwdefaults__, *cells, vars(value)]
        return _Same(value), _frozen(inner, seen, depth)
    if (memory := _frozen_memory(value, seen, depth)) is not None:
        return memory
    if hasattr(value, "__dict__") or _slots(type(value)):
        # a module that is no submodule: its parameters are no inputs of the graph
        return _frozen_items(_attributes(value), seen, depth)
    return _Same(value)


def _frozen_self(method: types.MethodType, seen: _Seen, depth: int) -> Hashable:
    """Of the object that a method is bound to, what the method may look at."""
    owner = method.__self__
    names = _names_looked_at(method.__func__, type(owner))
    outside = type(owner).__module__.split(".")[0] in _OUTSIDE
    if isinstance(owner, type) or id(owner) in seen or outside or names is None:
        return _frozen(owner, seen, depth)
    items = [(name, value) for name, value in _attributes(owner) if name in names]
    of_class = _frozen_class(type(owner), seen, depth, names)
    return _Same(owner), _frozen_items(items, seen, depth), of_class


def _names_looked_at(function: Any, cls: type) -> set[str] | None:
    """The names in the code of a method and of those that it calls; None where there may be others."""
    own = _own(cls)
    names: set[str] = set()
    dynamic = any(name in vars(c) for c in own for name in ("__getattr__", "__getattribute__"))
    if dynamic or not isinstance(function, types.FunctionType):
        return None
    todo, done = [function], set()
    while todo:
        part = todo.pop()
        if id(part) in done:
            continue
        done.add(id(part))
        if isinstance(part, types.CodeType):
            todo += [*part.co_names, *part.co_consts]
        elif isinstance(part, tuple):
            todo += part
        elif isinstance(part, str):  # of an attribute, or for getattr
            names.add(part)
            todo += [vars(c)[part] for c in own if part in vars(c)]
        elif isinstance(part, types.FunctionType | property | classmethod | staticmethod) or (
            type(part).__module__ == "functools"
        ):
            inner = ("__code__", "__wrapped__", "__func__", "fget", "func")
            todo += [getattr(part, name) for name in inner if hasattr(part, name)]
    return None if names & {"vars", "__dict__"} else names


def _frozen_memory(value: Any, seen: _Seen, depth: int) -> Hashable:
    """Sources of random numbers, iterators, arrays and NumPy's numbers; None of anything else."""
    of = type(value).__module__
    if isinstance(value, random.SystemRandom):
        return _Same(value)  # it has no state: what it draws is seen by itself
    if isinstance(value, random.Random):
        return value.getstate()
    if of.startswith("numpy.random"):
        has_state = hasattr(value, "get_state")
        source = getattr(value, "bit_generator", value)
        return pickle.dumps(value.get_state() if has_state else getattr(source, "state", None))
    if of == "numpy" and hasattr(value, "tobytes"):
        contents = _frozen(value.tolist(), seen, depth) if value.dtype.hasobject else value.tobytes()
        return value.dtype.str, value.shape, contents
    if isinstance(value, bytearray | array):
        return getattr(value, "typecode", None), bytes(value)
    if isinstance(value, itertools.count | itertools.repeat):
        return repr(value)
    if of in ("builtins", "itertools") and hasattr(value, "__next__"):
        try:
            return _frozen(value.__reduce__(), seen, depth) if of == "builtins" else _Same(object())
        except TypeError:  # a generator
            return _Same(object())
    return None


def _frozen_items(items: Iterable[tuple], seen: _Seen, depth: int) -> Hashable:
    return tuple((_frozen(name, seen, depth), _frozen(value, seen, depth)) for name, value in items)
