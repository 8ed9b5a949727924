"""Time several ways to do one thing in turns, so that whatever else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from salnb._common.tables import markdown_table


def medians(
    contenders: Mapping[str, Callable[[], object]], *, seconds: float = 8.0, least: int = 3
) -> dict[str, float]:
    """Median seconds of one call of each contender; see `durations`."""
    spent = durations(contenders, seconds=seconds, least=least)
    return {name: statistics.median(times) for name, times in spent.items()}


def durations(
    contenders: Mapping[str, Callable[[], object]], *, seconds: float, least: int
) -> dict[str, list[float]]:
    """Seconds of each call of each contender, the device's work included, round by round.

    Args:
        contenders: what to call, by name. Each is called once before the clock runs.
        seconds: time to spend on all of them together.
        least: rounds that are run however long they take.
    """
    for call in contenders.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    start = _clock()
    rounds = 0
    while rounds < least or _clock() - start < seconds:
        for name, call in contenders.items():
            begin = _clock()
            call()
            spent[name].append(_clock() - begin)
        rounds += 1
    return spent


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table under a title."""
    print(f"\n## {title}\n\n{markdown_table(header, rows, rule='---')}", flush=True)
