"""The `.grad` of parameters, which a model's forward pass may write by a `backward()` of its own."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["gradients_left"]


@contextmanager
def gradients_left(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context after which the `.grad` of the modules' parameters is what it was, if this thread wrote to it.

    What is there is copied only when a backward pass is about to add to it; one of another thread, such as a
    training step, is let through.

    Raises:
        RuntimeError: what was there had been overwritten before, as by a `zero_grad(set_to_none=False)`.
    """
    parameters = {id(p): p for module in modules for p in _parameters_of(module)}.values()
    before = {p: (p.grad, None if p.grad is None else p.grad._version) for p in parameters}
    kept: dict[Tensor, Tensor] = {}
    written: set[Tensor] = set()
    thread = threading.get_ident()

    def keep(parameter: Tensor, grad: Tensor) -> None:
        if parameter in written or not _takes_a_gradient(thread):
            return
        written.add(parameter)
        old, version = before[parameter]
        if old is not None and old._version == version:
            kept[parameter] = old.detach().clone()

    with ExitStack() as stack:
        for parameter in parameters:
            stack.callback(parameter.register_hook(partial(keep, parameter)).remove)
        try:
            yield
        finally:
            lost = _put_back(before, kept) if written else False
    if lost:
        raise RuntimeError(
            "a backward() in the model's forward pass comes after .grad was overwritten in place, "
            "which cannot be put back: set .grad to None there, as zero_grad() does"
        )


def _parameters_of(module: nn.Module) -> list[Tensor]:
    """Those that a backward pass may give a gradient, and that are neither sharded nor unmade."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    own = module._parameters.values()
    return [p for p in own if type(p) is nn.Parameter and p.requires_grad and p.is_leaf and not is_lazy(p)]


@torch.no_grad()
def _put_back(before: dict[Tensor, tuple[Tensor | None, int | None]], kept: dict[Tensor, Tensor]) -> bool:
    """Give each parameter its gradient again; whether the values of one are lost."""
    lost = False
    for parameter, (grad, version) in before.items():
        if parameter.grad is not grad:
            parameter.grad = grad
        if grad is not None and grad._version != version:
            if parameter in kept:
                grad.copy_(kept[parameter])
            else:
                lost = True
    return lost


def _takes_a_gradient(thread: int) -> bool:
    """Whether a thread is inside a backward pass, whose hooks may run in threads of the engine."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.autograd"):
            return True
        frame = frame.f_back
    return False
