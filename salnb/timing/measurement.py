"""One row: a step is run as often as the paper's protocol asks for, then profiled and counted.

Originals and augmented images lie on the device; a step is run 200 times, and the mean of the second 100
counts. The baseline is forward pass, cross-entropy and gradient of the whole batch; the step with saliency is
forward pass, saliency maps, transforming them back, their difference, and gradient. There is no optimiser in
either.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from salnb.timing.cases import Case, counted
from salnb.timing.clock import Stopwatch, clock_of, distribution, run_protocol
from salnb.timing.profiler import clocks, peak_flops, profiled
from salnb.timing.records import Measured
from salnb.timing.steps import arithmetic, count_flops, step_of

__all__ = ["measure", "measure_case"]


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

    Raises:
        OutOfBudgetError: it would take longer than is left.
        torch.OutOfMemoryError: the device is too small for it.
    """
    return asdict(case) | asdict(measure_case(case, torch.device(device), iterations=iterations, left=left))


def measure_case(case: Case, device: torch.device, *, iterations: int, left: Callable[[], float]) -> Measured:
    """What `measure` finds out about a case."""
    iterations, averaged = counted(iterations, case.every)
    watch = Stopwatch(clock_of(device))
    with arithmetic(case, device):
        step = step_of(case, device, watch.mark)
        run_protocol(step, watch, iterations, averaged, left)
        speed = clocks(device)  # just after the work, before the device slows down
        times, first = watch.times(averaged), watch.times(iterations)[0]
        parts = watch.parts(averaged) if case.every == 1 and not case.compiled else None
        watch.laps.append([])  # what follows is none of the protocol's
        kinds, peak = profiled(step, device)
    flops, convolutions = count_flops(case)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    possible, spent = peak_flops(name, case.precision), kinds["convolution"]
    return Measured(
        iterations=iterations,
        averaged=averaged,
        seconds=_nanoseconds(distribution(times)),
        parts=_nanoseconds(parts) if parts else None,
        kinds=_nanoseconds(kinds) if case.every == 1 else None,
        first_step_seconds=round(first, 9),
        held_bytes=step.held_bytes,
        peak_bytes=step.held_bytes + peak,
        flops=flops,
        convolution_flops=convolutions,
        peak_share=convolutions / spent / possible if possible and spent else None,
        clocks_mhz=speed,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _nanoseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Without digits that no clock has."""
    return {name: round(value, 9) for name, value in seconds.items()}
