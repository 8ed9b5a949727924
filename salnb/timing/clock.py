"""The protocol of the paper's Table 4: how often a step is run, what of it counts, and by which clock."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["HostClock", "OutOfBudgetError", "Stopwatch", "clock_of", "distribution", "run_protocol"]


class OutOfBudgetError(RuntimeError):
    """A row would take longer than what is left of the budget."""


class HostClock:
    """Marks moments of the host; for devices that have done what they were told when a call returns."""

    def mark(self) -> Any:
        """This moment; on a device with a clock of its own, when it has done what it was told so far."""
        return time.perf_counter()

    def wait(self) -> None:
        """Until the device has done all its work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments, after `wait`."""
        return end - start


class _CudaClock(HostClock):
    """Marks moments of a GPU by events in its stream, so that nothing has to wait between two steps."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000


class _MpsClock(HostClock):
    def mark(self) -> Any:
        torch.mps.synchronize()
        return time.perf_counter()


def clock_of(device: torch.device) -> HostClock:
    """The clock that measures the device's own time."""
    if device.type == "cuda":
        return _CudaClock(device)
    return _MpsClock() if device.type == "mps" else HostClock()


class Stopwatch:
    """Takes the time of steps and of their parts, by a clock."""

    def __init__(self, clock: HostClock):
        self.clock = clock
        self.laps: list[list[tuple[str, Any]]] = []

    def mark(self, part: str) -> None:
        """The part of a step that begins now."""
        self.laps[-1].append((part, self.clock.mark()))

    def run(self, step: Callable[[], None]) -> None:
        """Run a step and take its time."""
        self.laps.append([])
        self.mark("other")
        step()
        self.mark("end")

    def times(self, last: int) -> list[float]:
        """Seconds of each of the last laps; the clock must have been waited for."""
        return [self.clock.seconds(lap[0][1], lap[-1][1]) for lap in self.laps[-last:]]

    def parts(self, last: int) -> dict[str, float]:
        """Mean seconds of each part in the last laps."""
        found: dict[str, float] = {}
        for lap in self.laps[-last:]:
            for (part, start), (_, end) in itertools.pairwise(lap):
                found[part] = found.get(part, 0.0) + self.clock.seconds(start, end) / last
        return found


def run_protocol(
    step: Callable[[], None],
    watch: Stopwatch,
    iterations: int,
    averaged: int,
    left: Callable[[], float] = lambda: float("inf"),
    *,
    shrink: bool = False,
) -> tuple[int, int]:
    """Run a step so often, with the device idle at the start and before the iterations that count.

    Args:
        step: what to run.
        watch: what takes the time.
        iterations: how often, at least 4.
        averaged: how many of the last ones count.
        left: tells how many seconds are left.
        shrink: run as often as there is time for, but 5 times at least.

    Returns:
        How often it was run, and how many of the last times count.

    Raises:
        OutOfBudgetError: after three iterations it is plain that the rest would take longer than is left.
    """
    while len(watch.laps) < iterations:
        i = len(watch.laps)
        if i in (0, 1, 3, iterations - averaged):
            watch.clock.wait()
        if i == 3:
            each, rest = statistics.mean(watch.times(2)), max(left(), 0)
            needed = (iterations - i) * each
            if needed > rest and not shrink:
                raise OutOfBudgetError(f"{needed:.0f} s more were needed, {rest:.0f} s were left")
            if needed > rest:
                iterations = min(iterations, max(5, i + int(rest / each)))
                averaged = iterations // 2
        watch.run(step)
    watch.clock.wait()
    return iterations, averaged


def distribution(times: Sequence[float]) -> dict[str, float]:
    """Mean, median, percentiles and extremes of at least two numbers.

    >>> distribution([1.0, 3.0, 2.0])["median"]
    2.0
    """
    steps = statistics.quantiles(times, n=20, method="inclusive")
    found = {"mean": statistics.fmean(times), "median": statistics.median(times)}
    return found | {"p5": steps[0], "p95": steps[-1], "min": min(times), "max": max(times)}
