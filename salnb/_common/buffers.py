"""Buffers that no state dict holds: what a module knows by itself, wherever it is moved."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from salnb._common.checks import is_traced

__all__ = ["OwnBuffers"]


class OwnBuffers(nn.Module):
    """A module with buffers that are not saved, and whose values survive `to_empty` and the meta device.

    Weights that are loaded afterwards do not hold them: nothing else could fill them in again.
    """

    #: whether `half()` and the like leave the dtypes of the buffers
    _keeps_dtype = False
    _first_values: Mapping[str, Any] = MappingProxyType({})  # of one that an older version has pickled

    def __init__(self, **values: Any):
        """Make a buffer of each value, which is what `torch.tensor` takes."""
        super().__init__()
        self._first_values = values
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)

    def reset_parameters(self) -> None:
        """Put back the values of the beginning, where the buffers are; of those on meta there are none."""
        with torch.no_grad():
            for name, value in self._first_values.items():
                buffer = self._buffers[name]
                if buffer is not None and not buffer.is_meta:
                    buffer.copy_(torch.tensor(value, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers with their values."""
        before = {name: self._buffers[name] for name in self._first_values}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new.is_meta or is_traced(new):
                continue
            if old.is_meta:
                old = torch.tensor(self._first_values[name], dtype=old.dtype, device="cpu")
            self._buffers[name] = old.to(new.device, None if self._keeps_dtype else new.dtype)
        return self
