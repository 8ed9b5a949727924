"""One row: a step is run as often as the paper's protocol asks for, then profiled and counted.

Originals and augmented images lie on the device; a step is run 200 times, and the mean of the second 100
counts. The baseline is forward pass, cross-entropy and gradient of the whole batch; the step with saliency is
forward pass, saliency maps, transforming them back, their difference, and gradient. There is no optimiser in
either.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch

from salnb.timing.cases import Case, counted
from salnb.timing.clock import Stopwatch, clock_of, distribution, run_protocol
from salnb.timing.peaks import peak_flops, peaks_of
from salnb.timing.profiler import MemoryOfAll, StepProfile, clocks
from salnb.timing.records import ACCESSORIES, Measured, Row
from salnb.timing.steps import arithmetic, step_of
from salnb.timing.work import count_bytes, count_flops

__all__ = ["measure", "measure_case", "reason_of"]


def measure(
    case: Case,
    device: torch.device | str = "cpu",
    *,
    iterations: int = 200,
    left: Callable[[], float] = lambda: float("inf"),
) -> dict[str, Any]:
    """Measure one row.

    Args:
        case: the step.
        device: where to run it.
        iterations: how often; the second half counts.
        left: tells how many seconds the row may take from now.

    Returns:
        The case's fields and what was measured, without the ratios to its baseline. Times are in seconds.
        What could not be found out beside them is null, and `lacks` says why.

    Raises:
        OutOfBudgetError: it would take longer than is left.
        torch.OutOfMemoryError: the device is too small for it.
    """
    measured = measure_case(case, torch.device(device), iterations=iterations, left=left)
    return asdict(case) | measured.to_dict()


def measure_case(
    case: Case,
    device: torch.device,
    *,
    iterations: int,
    left: Callable[[], float],
    shrink: bool = False,
    keep: Callable[[Measured], object] = lambda measured: None,
) -> Measured:
    """What `measure` finds out about a case.

    Args:
        case: see `measure`.
        device: see `measure`.
        iterations: see `measure`.
        left: see `measure`.
        shrink: where time is short, run fewer iterations, and leave out what takes long beside them.
        keep: told the times as soon as they are there.
    """
    wanted, averaged = counted(iterations, case.every)
    watch = Stopwatch(clock_of(device))
    if device.type == "cpu":
        _let_memory_be_kept()
    with arithmetic(case, device):
        memory = MemoryOfAll(device)
        step = step_of(case, device, watch.mark)
        iterations, averaged = run_protocol(step, watch, wanted, averaged, left, shrink=shrink)
        most = memory.peak_bytes
        measured = Measured(
            iterations=iterations,
            averaged=averaged,
            seconds=_nanoseconds(distribution(watch.times(averaged))),
            first_step_seconds=round(watch.times(iterations)[0], 9),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            lacks={name: "there was no time for it" for name in ACCESSORIES if name != "ratio"},
        )
        keep(measured)
        profile = StepProfile(step, device)
        # in this order: the clocks just after the work, before the device slows down
        accessories: dict[str, Callable[[], Any]] = {
            "clocks_mhz": lambda: clocks(device),
            "parts": lambda: _parts(case, watch, averaged),
            "held_bytes": lambda: step.held_bytes,
            # what a captured graph starts does not say which operator it is of
            "kinds": lambda: _nanoseconds(profile.kinds) if case.every == 1 and not case.captured else None,
            # and lies in memory that was taken while it was captured
            "peak_bytes": lambda: most if case.captured else step.held_bytes + profile.peak_bytes,
            "flops": lambda: count_flops(case),
            "bytes": lambda: count_bytes(case),
            "peaks": lambda: peaks_of(device, case.precision),
            "peak_share": lambda: _peak_share(case, device, measured, profile),
        }
        for name, find in accessories.items():
            if name not in _SLOW or iterations == wanted or left() > 0:
                measured = _with(case, measured, name, find)
    return measured


# what takes about as long as a few steps
_SLOW = ("kinds", "peak_bytes", "flops", "bytes", "peaks")


def _let_memory_be_kept() -> None:
    """Have glibc keep the memory that is freed, as it does anyway once a large block has been freed.

    Until then it gives memory back and fetches it anew in every step, which takes a quarter of a small step:
    the rows that happen to be measured first would look slow.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # 32 MiB is as far as its threshold goes


def _with(case: Case, measured: Measured, name: str, find: Callable[[], Any]) -> Measured:
    """What was measured and one of `ACCESSORIES`, or why that is lacking."""
    others = {other: why for other, why in measured.lacks.items() if other != name}
    try:
        value = find()
        values = value if isinstance(value, tuple) else (value,)
        found = replace(measured, **dict(zip(ACCESSORIES[name], values, strict=True)), lacks=others)
        Row(case, "ok", measured=found).check()
    except Exception as error:
        return replace(measured, lacks=others | {name: reason_of(error)})
    return found


def _parts(case: Case, watch: Stopwatch, averaged: int) -> dict[str, float] | None:
    parts = _nanoseconds(watch.parts(averaged)) if case.every == 1 and case.mode == "eager" else None
    watch.laps.append([])  # what follows is none of the protocol's
    return parts


def _peak_share(case: Case, device: torch.device, measured: Measured, profile: StepProfile) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    possible = peak_flops(name, case.precision)
    if possible is None or case.captured:
        return None
    if measured.convolution_flops is None:
        raise ValueError("the operations of the convolutions were not counted")
    spent = profile.kinds["convolution"]
    return measured.convolution_flops / spent / possible if spent else None


def reason_of(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def _nanoseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Without digits that no clock has."""
    return {name: round(value, 9) for name, value in seconds.items()}
