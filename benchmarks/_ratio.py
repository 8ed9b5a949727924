"""Time several ways to do one thing in turns, so that whatever else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable


def medians(
    contenders: dict[str, Callable[[], object]], *, seconds: float = 8.0, least: int = 3
) -> dict[str, float]:
    """Median seconds of one call of each contender.

    Args:
        contenders: what to call, by name. Each is called once before the clock runs.
        seconds: time to spend on all of them together.
        least: rounds that are run however long they take.
    """
    for call in contenders.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: statistics.median(times) for name, times in spent.items()}


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table under a title."""
    print(f"\n## {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
