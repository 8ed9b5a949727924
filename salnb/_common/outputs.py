"""How a network is called, and where in what it returns the logits are."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "AS_IT_IS",
    "ModelCall",
    "check_model_kwargs",
    "check_output",
    "check_real",
    "described",
    "given_twice",
]


class ModelCall(NamedTuple):
    """How a network is called.

    Attributes:
        output: gives the logits from what the network returns; None takes a tensor, or its `.logits`.
        kwargs: what the network is called with beside the images, by name. It gets copies of the tensors,
            also of those in lists and dictionaries, which it may overwrite.
    """

    output: Callable[[Any], Tensor] | None = None
    kwargs: Mapping[str, Any] | None = None

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        """What should be the logits; `described` says what is wrong with it."""
        return self.logits(model(images, **_copied(self.kwargs or {})))

    def logits(self, returned: Any) -> Any:
        """What should be the logits in what the network returned."""
        if self.output is not None:
            return self.output(returned)
        inside = None if isinstance(returned, Tensor) else getattr(returned, "logits", None)
        return inside if isinstance(inside, Tensor) else returned


AS_IT_IS = ModelCall()


def check_output(output: Any) -> None:
    """Raise a TypeError unless this can give logits from what a network returns, or is None."""
    if output is not None and not callable(output):
        raise TypeError(f"output must be a function of what the model returns, or None, got {output!r}")


def check_model_kwargs(kwargs: Any) -> None:
    """Raise a TypeError unless this is None or a mapping from names."""
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(k, str) for k in kwargs)):
        raise TypeError(f"model_kwargs must be a mapping from names, or None, got {kwargs!r}")


def check_real(logits: Tensor) -> None:
    """Raise a ValueError if logits are complex: none of them is the largest, and no loss takes them."""
    if logits.is_complex():
        raise ValueError(f"model must return real logits, got {logits.dtype}: take their .real or .abs()")


def described(logits: Any) -> str:
    """What came instead of logits, and the way out, as the end of an error message."""
    if isinstance(logits, Tensor):
        return str(tuple(logits.shape))
    kind, keys = type(logits).__name__, [*logits] if isinstance(logits, Mapping) else []
    where = repr(keys[0] if "logits" not in keys else "logits") if keys else 0
    return (
        f"{kind}{f' with {keys}' if keys else ''}: say where they are, as in output=lambda out: out[{where}]"
    )


def _copied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """With a copy of each tensor, which has its gradient; what holds no tensor stays as it is."""
    copies: dict[int, Tensor] = {}  # by the id of the original, which may be there several times

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    def has_tensors(value: Any) -> bool:
        return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))

    return {name: pytree.tree_map(copied, v) if has_tensors(v) else v for name, v in kwargs.items()}


def given_twice(kwargs: Mapping[str, Any], n: int) -> dict[str, Any]:
    """What a network gets beside N images, for a batch of 2N: tensors (N, ...) one behind the other."""

    def twice(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.clone() if value.is_inference() else value
        return torch.cat([value, value]) if value.shape[:1] == (n,) else value

    return {name: twice(value) for name, value in kwargs.items()}
