"""How a network is called, and where in what it returns the logits are."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["AS_IT_IS", "ModelCall", "described", "given_twice"]


class ModelCall(NamedTuple):
    """How a network is called.

    Attributes:
        output: gives the logits from what the network returns; None takes a tensor, or its `.logits`.
        kwargs: what the network is called with beside the images, by name.
    """

    output: Callable[[Any], Tensor] | None = None
    kwargs: Mapping[str, Any] | None = None

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        """What should be the logits; `described` says what is wrong with it."""
        return self.logits(model(images, **(self.kwargs or {})))

    def logits(self, returned: Any) -> Any:
        """What should be the logits in what the network returned."""
        if self.output is not None:
            return self.output(returned)
        inside = None if isinstance(returned, Tensor) else getattr(returned, "logits", None)
        return inside if isinstance(inside, Tensor) else returned


AS_IT_IS = ModelCall()


def described(logits: Any) -> str:
    """What came instead of logits, and the way out, as the end of an error message."""
    if isinstance(logits, Tensor):
        return str(tuple(logits.shape))
    kind, keys = type(logits).__name__, [*logits] if isinstance(logits, Mapping) else []
    where = repr(keys[0] if "logits" not in keys else "logits") if keys else 0
    return (
        f"{kind}{f' with {keys}' if keys else ''}: say where they are, as in output=lambda out: out[{where}]"
    )


def given_twice(kwargs: Mapping[str, Any], n: int) -> dict[str, Any]:
    """What a network gets beside N images, for a batch of 2N: tensors (N, ...) one behind the other."""

    def twice(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.clone() if value.is_inference() else value
        return torch.cat([value, value]) if value.shape[:1] == (n,) else value

    return {name: twice(value) for name, value in kwargs.items()}
