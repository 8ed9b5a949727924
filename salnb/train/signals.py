"""Signals that ask a run to stop, noted so that it can save itself first."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

__all__ = ["noticed_signals"]

# seconds within which two signals are one request to stop
_ONE_REQUEST = 3.0


@contextlib.contextmanager
def noticed_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C are noted in; a second one acts at once, as without this.

    One that follows the first within seconds is the same: a scheduler and torchrun may both pass it on, and a
    terminal sends it to torchrun and to its processes alike.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may be told of signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    first = 0.0

    def notice(number: int, frame: object) -> None:
        nonlocal first
        if seen and time.monotonic() - first > _ONE_REQUEST:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        elif not seen:
            first = time.monotonic()
            seen.append(number)

    for number in before:
        signal.signal(number, notice)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
