"""What a device can do at most: operations and bytes a second."""

import functools
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from salnb.timing.cases import PRECISIONS
from salnb.timing.clock import clock_of

__all__ = ["peak_flops", "peaks_of"]


class _Sheet(NamedTuple):
    """Dense peaks of a data sheet, in 10^12 a second; None where the device, or the sheet, has none."""

    fp32: float  # without tensor cores
    tf32: float | None
    bf16: float | None
    bytes: float | None  # None where devices of one name have several memories
    source: str


# by torch's name of the device; the first that fits
_SHEETS = {
    r"H100 PCIe": _Sheet(51.2, 378.0, 756.0, 2.0, "NVIDIA H100 data sheet"),
    r"H100.*HBM3": _Sheet(66.9, 494.7, 989.4, 3.35, "NVIDIA H100 data sheet"),
    r"H200": _Sheet(66.9, 494.7, 989.4, 4.8, "NVIDIA H200 data sheet"),
    r"A100.*40GB": _Sheet(19.5, 156.0, 312.0, 1.555, "NVIDIA A100 data sheet"),
    r"A100.*80GB PCIe": _Sheet(19.5, 156.0, 312.0, 1.935, "NVIDIA A100 data sheet"),
    r"A100-SXM4-80GB": _Sheet(19.5, 156.0, 312.0, 2.039, "NVIDIA A100 data sheet"),
    r"A100": _Sheet(19.5, 156.0, 312.0, None, "NVIDIA A100 data sheet"),
    r"\bL4$": _Sheet(30.3, 60.0, 121.0, 0.3, "NVIDIA L4 data sheet"),
    r"\bT4$": _Sheet(8.1, None, None, 0.32, "NVIDIA T4 data sheet"),
    r"V100-SXM2": _Sheet(15.7, None, None, 0.9, "NVIDIA V100 data sheet"),
    r"RTX 2080 Ti": _Sheet(13.4, None, None, 0.616, "NVIDIA Turing white paper"),
}


def _sheet(device_name: str) -> _Sheet | None:
    return next((sheet for pattern, sheet in _SHEETS.items() if re.search(pattern, device_name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second that a device can do at most; None where that is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops("Tesla T4", "bf16")
    (989400000000000.0, None)
    """
    sheet = _sheet(device_name)
    peak = sheet[PRECISIONS.index(precision)] if sheet else None
    return float(peak) * 1e12 if peak else None


def peaks_of(device: torch.device, precision: str) -> tuple[dict[str, float], str]:
    """The peaks of a device, `flops` and `bytes` a second, and where they come from.

    Published figures where the table above has both, else what a large product of matrices and a copy reach
    in this process, which is measured once. Call it with TF32 allowed where the precision is "tf32".
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    sheet, flops = _sheet(name), peak_flops(name, precision)
    if sheet and flops and sheet.bytes:
        return {"flops": flops, "bytes": sheet.bytes * 1e12}, sheet.source
    return _measured(device, precision), "a product of matrices and a copy, measured in the same run"


@functools.cache
def _measured(device: torch.device, precision: str) -> dict[str, float]:
    on_cpu = device.type == "cpu"
    n, size = (1024, 2**26) if on_cpu else (8192, 2**28)  # a copy must not fit into any cache
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.rand(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    source, copy = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "flops": 2 * n**3 / _fastest(lambda: matrix @ matrix, device),
        "bytes": 2 * size / _fastest(lambda: copy.copy_(source), device),
    }


def _fastest(run: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """The shortest time of a call in at least two, and in as many as a third of a second has room for."""
    clock, begin = clock_of(device), time.perf_counter()
    times: list[float] = []
    run()
    while len(times) < 2 or (len(times) < 20 and time.perf_counter() - begin < seconds):
        start = clock.mark()
        run()
        end = clock.mark()
        clock.wait()
        times.append(clock.seconds(start, end))
    return min(times)
