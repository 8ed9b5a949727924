"""Running a model without a trace: alone among threads, and with its state put back afterwards."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from salnb._common.aliases import InPlace, copies_that_share, held_in_containers, memory_of
from salnb._common.checks import is_traced
from salnb.saliency.own_gradients import gradients_left

__all__ = ["DeadlockError", "alone", "check_usable", "left_as_found"]

_free = threading.Condition()
_owners: dict[int, int] = {}  # the thread that each module is taken by, both by id
_wanted: dict[int, list[int]] = {}  # the modules that each waiting thread wants


class DeadlockError(RuntimeError):
    """Threads wait for one another."""


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Context in which a model may be run, and after which it is as it was.

    Put back, also after an error: buffers, whether written to or replaced, parameters that were replaced (not
    what was written to them) and whether they require a gradient, the train or eval mode, attributes that are
    tensors, and, of the modules that are not PyTorch's own, those that are numbers or None. Buffers and
    attributes that such modules did not have are taken away, unless the pass has made them parameters or
    modules too, as in a network that builds itself when it first runs. What a model keeps in lists and
    dictionaries stays as the pass left it, unless it is a view of a buffer or such an attribute. The `.grad`
    of parameters, which a `backward()` of the model's own writes, is put back by `gradients_left`.

    Threads that run models with a module in common wait for one another, as in `alone`.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with alone(modules), gradients_left(modules):
        modes = [(m, m.training) for m in modules if hasattr(m, "training")]  # frozen scripts have none
        moving = [module for module in modules if _may_move(module)]
        # by the id of the original, which may be in several places
        copies = _copies_of_statistics(modules)
        in_place = _copy_views(moving, copies)
        # such as the weight that pruning and spectral_norm make anew in each pass
        made = [(module, its) for module in modules if (its := _tensors_of(module))]
        lent = [(module, _names(module), *_lend_copies(module, copies)) for module in moving]
        parameters = [(*its, its[-1].requires_grad) for module in modules for its in _parameters_of(module)]
        try:
            yield
        finally:
            for store, name, parameter, flag in parameters:
                if store.get(name) is not parameter and type(store.get(name)) is nn.Parameter:
                    store[name] = parameter
                if parameter.requires_grad is not flag:
                    parameter.requires_grad_(flag)
            for module, tensors in made:
                vars(module).update(tensors)
            for module, names, attributes, buffers in lent:
                _put_back(module, attributes, buffers)
                _take_away(module, names)
            in_place.put_back()
            for module, mode in modes:
                if module.training is not mode:
                    module.training = mode


@contextmanager
def alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which no other thread is inside with any of these modules.

    A thread that is inside already may enter again.

    Raises:
        DeadlockError: threads that are inside wait for one another.
    """
    me = threading.get_ident()
    names = [id(module) for module in modules]
    with _free:
        _wanted[me] = names
        try:
            _free.wait_for(lambda: _may_enter(me))
        finally:
            del _wanted[me]
        taken = [name for name in names if name not in _owners]  # the others are taken further out
        _owners.update(dict.fromkeys(taken, me))
    try:
        yield
    finally:
        with _free:
            for name in taken:
                del _owners[name]
            _free.notify_all()


def _may_enter(me: int) -> bool:
    """Whether no other thread has a module that this one wants."""
    met: set[int] = set()
    ahead = _holders(me)
    while ahead - met:
        met |= ahead
        ahead = set().union(*map(_holders, ahead))
        if me in ahead:
            raise DeadlockError(
                "threads wait for one another: a model's forward pass takes a map of, or trains, a model "
                "that another thread is running, and whose forward pass does the same with this one"
            )
    return not met


def _holders(thread: int) -> set[int]:
    """The other threads that have a module which this one waits for."""
    return {_owners[name] for name in _wanted.get(thread, ()) if name in _owners} - {thread}


def _may_move(module: nn.Module) -> bool:
    """Whether a forward pass may change what `left_as_found` puts back, apart from the mode."""
    if isinstance(module, LazyModuleMixin):  # its first pass makes it what it is
        return False
    return bool(module._buffers) or not _is_of_torch(type(module))


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def _copies_of_statistics(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Copies of all that batch norms in eval mode hold, which a pass may move nonetheless, by their ids.

    Made together: one after the other, a GPU would notice so many small ones.
    """
    groups: dict[Any, dict[int, Tensor]] = {}
    for module in modules:
        if isinstance(module, _BatchNorm) and not module.training and _may_move(module):
            for buffer in module._buffers.values():
                if type(buffer) is Tensor and not buffer.requires_grad and not is_traced(buffer):
                    groups.setdefault((buffer.device, buffer.dtype), {})[id(buffer)] = buffer
    copies: dict[int, Tensor] = {}
    for group in groups.values():
        fresh = [torch.empty_like(buffer) for buffer in group.values()]
        torch._foreach_copy_(fresh, list(group.values()))
        copies |= zip(group, fresh, strict=True)
    return copies


def _copy_views(modules: Sequence[nn.Module], copies: dict[int, Tensor]) -> InPlace:
    """Add the copies of what are views of one another, which the pass is to find so.

    Containers are not copied: what they hold views of stays where it is, and gets its values back afterwards.
    """
    moved = [
        tensor for module in modules for tensor in (*_attributes_of(module).values(), *_buffers_of(module))
    ]
    copied = [t for t in moved if isinstance(t, Tensor) and not t.requires_grad]
    copies |= copies_that_share(copied)
    held = {memory_of(t) for m in modules if not _is_of_torch(type(m)) for t in held_in_containers(m)} - {
        None
    }
    in_place = [tensor for tensor in copied if memory_of(tensor) in held] if held else []
    copies |= {id(tensor): tensor for tensor in in_place}
    return InPlace(in_place)


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module of the user's that are put back: numbers, tensors and None."""
    if _is_of_torch(type(module)):
        return {}
    return {k: v for k, v in vars(module).items() if v is None or isinstance(v, Number | Tensor)}


def _buffers_of(module: nn.Module) -> list[Tensor | None]:
    return [buffer for _, buffer in module._buffers.items()]  # scripted modules have no dictionary there


def _lend_copies(
    module: nn.Module, copies: dict[int, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """Give a module copies of its buffers to write to; returns what it had, attributes and buffers."""

    def copy_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    attributes = _attributes_of(module)
    for name, value in attributes.items():
        if isinstance(value, Tensor) and not value.requires_grad:
            vars(module)[name] = copy_of(value)
    buffers = dict(module._buffers.items())  # scripted modules have something else than a dictionary there
    for name, buffer in buffers.items():
        if buffer is not None:
            _set_buffer(module, name, copy_of(buffer))
    return attributes, buffers


def _put_back(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Tensor | None]) -> None:
    for name, value in attributes.items():
        if vars(module).get(name) is not value:
            vars(module)[name] = value
    for name, buffer in buffers.items():
        _set_buffer(module, name, buffer)


def _parameters_of(module: nn.Module) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    """The store, name and object of each: not of what shards or swaps parameters, whose own they are not."""
    if isinstance(module, torch.jit.ScriptModule | LazyModuleMixin):
        return []
    store: Any = module._parameters
    return [(store, name, tensor) for name, tensor in store.items() if type(tensor) is nn.Parameter]


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The attributes of a module of PyTorch's own that are tensors."""
    if not _is_of_torch(type(module)) or isinstance(module, torch.jit.ScriptModule | LazyModuleMixin):
        return {}
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


def _names(module: nn.Module) -> tuple[set[str], ...]:
    """Of a module that is not PyTorch's own: its attributes, its buffers, and its modules and parameters."""
    if _is_of_torch(type(module)) or isinstance(module, torch.jit.ScriptModule):
        return ()
    parts = {
        name for store in (module._modules, module._parameters) for name in store if store[name] is not None
    }
    return set(vars(module)), set(module._buffers), parts


def _take_away(module: nn.Module, names: tuple[set[str], ...]) -> None:
    """Undo what a pass has added to a module that had these names."""
    now = _names(module)
    if not names or now[2] - names[2]:  # it has built itself
        return
    for name in now[0] - names[0]:
        del vars(module)[name]
    for name in now[1] - names[1]:
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)


def _set_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, value)
    else:
        module._buffers[name] = value


def check_usable(model: nn.Module) -> None:
    """Raise if no gradient can be taken through a model as it is.

    Raises:
        TypeError: it is spread over several devices by `nn.DataParallel`.
        ValueError: parameters or buffers were made in inference mode.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise TypeError(
                f"model must not hold an nn.DataParallel on {len(module.device_ids)} devices, whose threads "
                "saliency methods do not reach: take its .module"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not is_lazy(tensor) and tensor.is_inference():
                raise ValueError(
                    "model must be made outside of torch.inference_mode(), got a "
                    f"{type(module).__name__} whose {name} was made inside: build or load the model outside, "
                    "or take copy.deepcopy(model) there"
                )
