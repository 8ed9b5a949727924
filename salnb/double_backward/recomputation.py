"""What the backward pass recomputes (`torch.utils.checkpoint`) runs as it ran in the forward pass.

Modes are active in the forward pass only, and `autograd.grad` itself sets them aside. Recomputed outside of
them, a segment would save the tensors of other functions than those that read them: wrong numbers, and no
error where the shapes agree. Recomputation is the work of an unpack hook of `saved_tensors_hooks`. So while a
mode of ours is active, each of these hooks is given one that puts the modes back before anything is
recomputed, in whichever thread and backward pass that happens. Hooks that only move or compress what was
saved pay for a function call.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from salnb._common.aliases import copies_that_share

__all__ = [
    "RecomputedMode",
    "again_in_recomputation",
    "is_recomputing",
    "model_of_the_forward_pass",
    "reentrant_explained",
    "stored_instead",
]

Context = Callable[[], AbstractContextManager]

# whose norm layers, subclasses of PyTorch's, do what those do
_KNOWN = ("torch", "torchvision", "timm")

_lock = threading.Lock()
_plain_enter, _plain_exit = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
_users = 0  # how many contexts, of all threads, want hooks to be wrapped


class _Thread(threading.local):
    """What a thread is doing."""

    depth = 0  # of contexts in which hooks are wrapped
    store = False  # whether checkpoints store their activations
    contexts: tuple[Callable[[], Context], ...] = ()  # asked at each entry into a hook
    not_entered: tuple[saved_tensors_hooks, ...] = ()
    begin: Callable[[], None] | None = None  # of the unpack hook that is running, before it recomputes
    recomputing = False


_thread = _Thread()


@contextmanager
def _wrapping() -> Iterator[None]:
    """Context in which the hooks that this thread enters are wrapped."""
    _start()
    try:
        yield
    finally:
        _stop()


def _start() -> None:
    global _users
    with _lock:
        _users += 1
        saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = _enter, _exit  # type: ignore[method-assign]
    _thread.depth += 1


def _stop() -> None:
    global _users
    _thread.depth -= 1
    with _lock:
        _users -= 1
        if not _users:
            saved_tensors_hooks.__enter__ = _plain_enter  # type: ignore[method-assign]
            saved_tensors_hooks.__exit__ = _plain_exit  # type: ignore[method-assign]


class RecomputedMode(TorchFunctionMode):
    """A mode that is active again wherever a part of the forward pass that ran in it is recomputed."""

    def __enter__(self) -> Any:
        _start()
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        _stop()


@contextmanager
def again_in_recomputation(at_entry: Callable[[], Context]) -> Iterator[None]:
    """Context for a forward pass, whose recomputation runs in a context of its own.

    Args:
        at_entry: called where a segment begins that may be recomputed; returns what makes the context. It is
            kept as long as the graph is, and must not hold any part of the graph.
    """
    before = _thread.contexts
    _thread.contexts = (*before, at_entry)
    try:
        with _wrapping():
            yield
    finally:
        _thread.contexts = before


@contextmanager
def stored_instead() -> Iterator[None]:
    """Context in which checkpoints store their activations: what is traced is recomputed nowhere."""
    before, _thread.store = _thread.store, True
    try:
        with _wrapping():
            yield
    finally:
        _thread.store = before


def is_recomputing() -> bool:
    """Whether this is a repetition of a forward pass, on behalf of a backward pass."""
    return _thread.recomputing


def _enter(hooks: saved_tensors_hooks) -> None:
    """`saved_tensors_hooks.__enter__`."""
    if _thread.begin is not None:  # hooks inside of an unpack hook are there to catch what it recomputes
        _thread.begin()
    if not _thread.depth:
        _plain_enter(hooks)
    elif _thread.store and type(hooks).__module__ == "torch.utils.checkpoint":
        _thread.not_entered = (*_thread.not_entered, hooks)
    else:
        unpack = hooks.unpack_hook
        hooks.unpack_hook = _as_in_the_forward_pass(unpack)
        try:
            _plain_enter(hooks)
        finally:
            hooks.unpack_hook = unpack


def _exit(hooks: saved_tensors_hooks, *exc_info: Any) -> None:
    """`saved_tensors_hooks.__exit__`."""
    if _thread.not_entered and _thread.not_entered[-1] is hooks:
        _thread.not_entered = _thread.not_entered[:-1]
    else:
        _plain_exit(hooks, *exc_info)


def _as_in_the_forward_pass(unpack: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """An unpack hook that recomputes in the modes and contexts of this moment."""
    modes, asked = _get_current_function_mode_stack(), _thread.contexts
    contexts = [at_entry() for at_entry in asked]

    def unpack_again(packed: Any) -> Tensor:
        outer = _thread.begin, _thread.recomputing, _thread.contexts
        with ExitStack() as stack:

            def begin() -> None:
                _thread.begin, _thread.recomputing, _thread.contexts = None, True, asked
                for context in contexts:
                    stack.enter_context(context())
                stack.enter_context(_function_modes(modes))

            _thread.begin = begin
            try:
                with _wrapping():
                    return unpack(packed)
            except RuntimeError as error:
                if "selective activation checkpoint" not in str(error):
                    raise
                raise RuntimeError(
                    "selective checkpointing keeps what it saved for one backward pass only, and a saliency "
                    "map takes one of its own: leave context_fn out, or gamma at 0"
                ) from error
            finally:
                _thread.begin, _thread.recomputing, _thread.contexts = outer

    return unpack_again


@contextmanager
def _function_modes(modes: list[Any]) -> Iterator[None]:
    """Context with these modes in the place of those that are active."""
    before = _exchange(modes)
    try:
        yield
    finally:
        _exchange(before)


def _exchange(modes: list[Any]) -> list[Any]:
    active = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    return active[::-1]


@contextmanager
def reentrant_explained() -> Iterator[None]:
    """Context that says what to do about the other kind of checkpoint, which allows no `autograd.grad`."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "a saliency map cannot be taken through reentrant checkpointing: call torch.utils.checkpoint "
            "with use_reentrant=False (transformers: gradient_checkpointing_kwargs={'use_reentrant': False}; "
            "timm, from 1.0.13 on: timm.layers.set_reentrant_ckpt(False))"
        ) from error


def model_of_the_forward_pass(model: Any) -> AbstractContextManager[None]:
    """Context for a forward pass, whose recomputation finds the model as it was, and leaves it as it is.

    Running statistics and whatever else moves with each pass are moved once, and parameters swapped in by
    `torch.func.functional_call` are those that are recomputed with. So it is with attributes that are tensors
    or numbers, of modules that are not PyTorch's own.
    """
    if not isinstance(model, nn.Module):
        return nullcontext()
    return again_in_recomputation(_ModelState(model).at_entry)


class _ModelState:
    """The parameters, buffers and attributes of a model in one forward pass."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.copies: dict[Tensor, tuple[int, Tensor]] = {}  # of whole numbers: version and values
        self.scratch: dict[tuple, Tensor] = {}

    def at_entry(self) -> Context:
        """What puts the model back into the state of this moment."""
        swaps: list[tuple[dict, str, Callable[[], Any]]] = []
        modules = [
            m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule | LazyModuleMixin)
        ]
        for module in modules:  # of the others nothing can be swapped
            find: Callable[[Any], Callable[[], Any]] = self._buffer
            if isinstance(module, _NormBase) and type(module).__module__.split(".")[0] in _KNOWN:
                # in train mode statistics are written and not read, in eval mode read and not written
                find = self._scratch_like if module.training else _returning
            for store, of in ((module._parameters, _returning), (module._buffers, find)):
                swaps += [(store, name, of(tensor)) for name, tensor in store.items() if tensor is not None]
            if type(module).__module__.split(".")[0] not in _KNOWN:
                swaps += self._attributes(vars(module))
        if not (views := _views(modules)):
            return lambda: _swapped(swaps)
        return lambda: _swapped([*swaps, *_copied_together(views)])

    def _attributes(self, values: dict[str, Any]) -> list[tuple[dict, str, Callable[[], Any]]]:
        """What may move: numbers, and tensors that are no part of a graph, whose copies would keep it."""
        swaps: list[tuple[dict, str, Callable[[], Any]]] = []
        for name, value in values.items():
            if isinstance(value, Number) and name != "training":
                swaps.append((values, name, _returning(value)))
            elif type(value) is Tensor and not value.requires_grad:
                swaps.append((values, name, self._buffer(value)))
        return swaps

    def _scratch_like(self, buffer: Tensor) -> Callable[[], Tensor]:
        kind = (buffer.shape, buffer.dtype, buffer.device)
        if kind not in self.scratch:
            self.scratch[kind] = torch.zeros_like(buffer)
        return _returning(self.scratch[kind])

    def _buffer(self, buffer: Tensor) -> Callable[[], Tensor]:
        # batch norm changes its statistics without a new version; large tables are of indices
        if buffer.is_floating_point() or buffer.is_complex() or buffer.is_inference():
            copy, requires_grad = buffer.detach().clone(), buffer.requires_grad
            return lambda: copy.clone().requires_grad_(requires_grad)
        if buffer._version != self.copies.get(buffer, (None,))[0]:
            self.copies[buffer] = buffer._version, buffer.clone()
        return self.copies[buffer][1].clone


def _views(modules: Iterable[nn.Module]) -> list[tuple[dict, str, Tensor]]:
    """Copies, views of one another, of the buffers and attributes that are, and where they belong."""
    own, known = [], []
    # of PyTorch's modules only the buffers matter, and only to views of somebody else's
    for module in modules:
        if type(module).__module__.split(".")[0] in _KNOWN:
            known.append(module._buffers)
        else:
            own += [vars(module), module._buffers]
    places = _tensors_in(own)
    if not places:
        return []
    places += _tensors_in(known)
    copies = copies_that_share(tensor for _, _, tensor in places)
    return [(store, name, copies[id(tensor)]) for store, name, tensor in places if id(tensor) in copies]


def _tensors_in(stores: list[dict[str, Any]]) -> list[tuple[dict, str, Tensor]]:
    return [(s, n, t) for s in stores for n, t in s.items() if type(t) is Tensor and not t.requires_grad]


def _copied_together(views: list[tuple[dict, str, Tensor]]) -> list[tuple[dict, str, Callable[[], Any]]]:
    copies = copies_that_share(tensor for _, _, tensor in views)
    return [(store, name, _returning(copies[id(tensor)])) for store, name, tensor in views]


def _returning(tensor: Any) -> Callable[[], Any]:
    return lambda: tensor


@contextmanager
def _swapped(swaps: list[tuple[dict, str, Callable[[], Any]]]) -> Iterator[None]:
    """Context with other tensors in a model's dictionaries."""
    before: list[tuple[dict, str, Any]] = []
    for store, name, find in swaps:
        if (there := store.get(name)) is not (tensor := find()):
            before.append((store, name, there))
            store[name] = tensor
    try:
        yield
    finally:
        for store, name, tensor in reversed(before):  # one may be there twice
            store[name] = tensor
