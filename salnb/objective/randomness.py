"""Random numbers that a graph would not draw as Python does: these are noticed while a step is traced."""

import pickle
import random
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["refuse_other_randomness", "refuse_seeding"]

_SEEDING = ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all")
_HOMES = (torch, torch.random, torch.cuda, torch.cuda.random)


@contextmanager
def refuse_other_randomness() -> Iterator[None]:
    """Raise a RuntimeError if random numbers are drawn inside from Python, NumPy or the system."""
    drawn = _python_random()
    with _system_entropy_counted() as drawn_of_system:
        yield
    if drawn_of_system or drawn != _python_random():
        raise RuntimeError(
            "compile() needs a model that draws its random numbers with PyTorch, and this one (or its "
            "augmentation) uses Python's or NumPy's, which a graph would draw only once: leave compile() out"
        )


@contextmanager
def refuse_seeding() -> Iterator[None]:
    """Raise a RuntimeError where this thread seeds PyTorch's generators inside, or sets them back.

    A graph draws anew in each call. `torch.random.fork_rng` sets them back, too.
    """
    thread = threading.get_ident()

    def instead_of(function: Callable) -> Callable:
        def refusing(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*args, **kwargs)
            raise RuntimeError(
                "compile() needs a model that leaves PyTorch's random generators alone, but a forward pass "
                f"calls {function.__name__}, or fork_rng, which a graph would not do again: draw the numbers "
                "once and keep them as a buffer, or leave compile() out"
            )

        return refusing

    originals = [(home, name, vars(home)[name]) for home in _HOMES for name in _SEEDING if name in vars(home)]
    for home, name, function in originals:
        setattr(home, name, instead_of(function))
    try:
        yield
    finally:
        for home, name, function in originals:
            setattr(home, name, function)


@contextmanager
def _system_entropy_counted() -> Iterator[list[int]]:
    """A list of how many bytes this thread draws inside for SystemRandom and for NumPy's new generators."""
    drawn: list[int] = []
    source: Any = random
    thread, original = threading.get_ident(), source._urandom

    def counting(size: int) -> bytes:
        if threading.get_ident() == thread:
            drawn.append(size)
        return original(size)

    source._urandom = counting
    try:
        yield drawn
    finally:
        source._urandom = original


def _python_random() -> Hashable:
    numpy = sys.modules.get("numpy")
    return random.getstate(), pickle.dumps(numpy.random.get_state()) if numpy else None
