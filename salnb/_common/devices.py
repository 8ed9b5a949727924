"""The names of devices, and the devices of this machine; torch is loaded only to look for these."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["best_device", "check_device_name", "resolve_device"]


def check_device_name(name: str) -> None:
    """Raise a ValueError unless `name` is "auto", "cpu", "cuda", "cuda:N" or "mps"."""
    if not isinstance(name, str) or not re.fullmatch("auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,3}))?", name):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")


def best_device() -> str:
    """The kind of device that "auto" stands for: "cuda" or "mps" where there is one, else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(name: str, *, advice: str | None = None) -> torch.device:
    """The device of a name that passes `check_device_name`.

    Args:
        name: the name.
        advice: what to do where this machine has no such device; None names the best one it has.

    Raises:
        ValueError: this machine has no such device.
    """
    check_device_name(name)
    import torch

    there = best_device() if name == "auto" else name
    kind, _, index = there.partition(":")
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if int(index or 0) >= counts[kind]:  # torch itself cannot say cuda:128
        raise ValueError(
            f"device {name} is not on this machine: {advice or f'take {best_device()}, or auto'}"
        )
    return torch.device(there)
