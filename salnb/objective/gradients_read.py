"""What a model reads of its parameters' `.grad` as a step is traced: a graph would not read it again."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch._C import TensorBase
from torch.overrides import TorchFunctionMode

__all__ = ["refuse_reading_gradients"]

_READING: Any = vars(TensorBase)["grad"].__get__
_OTHERS = ("salnb", "torch")  # which look at it and put it back, or set it to None


class _Refusing(TorchFunctionMode):
    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.parameters = {id(parameter) for parameter in parameters}

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        of_parameter = func == _READING and id(args[0]) in self.parameters
        if of_parameter and (reader := _caller()).partition(".")[0] not in _OTHERS:
            raise RuntimeError(
                "compile() needs a model that does not read .grad, which a graph would not do again, but "
                f"a forward pass does ({reader}): keep what it needs as a buffer, or leave compile() out"
            )
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The module of the code that called a function, whatever modes lie between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame.f_globals.get("__name__", "")


def refuse_reading_gradients(parameters: Iterable[Tensor]) -> TorchFunctionMode:
    """Context with a RuntimeError where code other than PyTorch's reads the `.grad` of one of these."""
    return _Refusing(parameters)
