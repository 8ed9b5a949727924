"""What low precision needs: autocast for the network only, and scales that keep float16 from underflowing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from salnb._common.buffers import OwnBuffers

__all__ = ["LossScale", "autocast_dtype", "full_precision", "tf32"]


def autocast_dtype(images: Tensor) -> torch.dtype | None:
    """What autocast computes in on the images' device, or None where it is off."""
    device = images.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def full_precision(images: Tensor) -> torch.autocast:
    """Context without autocast, which is meant for networks."""
    return torch.autocast(images.device.type, enabled=False)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Context in which float32 products of matrices and convolutions are rounded to TF32, or are not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class LossScale(OwnBuffers):
    """A power of two to multiply with before a gradient is taken, and to divide the gradient by.

    It is halved when a gradient overflows, and doubled, up to `2**top` at most, after 2000 gradients that did
    not, like the scale of `GradScaler`. Nothing waits for the device.

    Args:
        exponent: the first scale is `2**exponent`.
        top: the highest exponent.

    The state is not saved: a resumed training finds its scale again. It is kept in integers, which
    `module.half()` leaves alone.
    """

    exponent: Tensor
    steps: Tensor

    def __init__(self, exponent: int, top: int):
        super().__init__(exponent=exponent, steps=0)
        self.top = top

    @property
    def value(self) -> Tensor:
        """The scale, a float32 scalar on the module's device."""
        return torch.exp2(self.exponent.float())

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Take note whether a gradient was finite."""
        self.steps.copy_(torch.where(finite, self.steps + 1, 0))
        grown = self.exponent + (self.steps % 2000 == 0)
        self.exponent.copy_(torch.where(finite, grown, self.exponent - 1).clamp(0, self.top))
