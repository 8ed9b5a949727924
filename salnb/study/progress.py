"""How far a study is."""

import time
from collections.abc import Mapping
from typing import Any, TextIO

from salnb._common.progress import log_line, progress
from salnb.study.grids import Training

__all__ = ["Progress"]


class Progress:
    """How far a study is: a bar on a terminal, elsewhere a line for each training run that ends.

    Args:
        study: its name.
        total: number of its training runs.
        done: how many were finished before.
        display: where it is shown.
    """

    def __init__(self, study: str, total: int, done: int, display: TextIO):
        self.study, self.total, self.done, self.failed = study, total, done, 0
        self.display = display
        self.running: dict[str, float] = {}
        self.begun, self.before = time.monotonic(), done
        self.bar = progress(what=study, total=total, initial=done, file=display)

    def __enter__(self) -> "Progress":
        if self.bar.disable and self.done:
            log_line(f"{self.study}: {self.done}/{self.total} were done before", self.display)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def started(self, training: Training) -> None:
        """Note that a run begins."""
        self.running[training.name] = time.monotonic()
        self._show()

    def finished(self, training: Training, record: Mapping[str, Any]) -> None:
        """Note how a run ended."""
        seconds = time.monotonic() - self.running.pop(training.name, time.monotonic())
        failed = record["status"] != "done"
        self.failed += failed
        self.done += not failed
        self.bar.update()
        self._show()
        if self.bar.disable:
            found = record["error"] if failed else f"test accuracy {record['result']['test_accuracy']:.4f}"
            ended = f"{training.name}: {found}, {seconds:.0f} s"
            log_line(f"{self.study}: {ended}; {self.summary()}", self.display)

    def summary(self) -> str:
        """Done, failed, running, and the time left, from the pace so far."""
        ended = self.done + self.failed
        left = "time left unknown"
        if ended > self.before:
            pace = (time.monotonic() - self.begun) / (ended - self.before)
            seconds = pace * (self.total - ended)
            left = f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"
        return f"{self.done} of {self.total} done, {self.failed} failed, {len(self.running)} running, {left}"

    def _show(self) -> None:
        self.bar.set_postfix_str(f"{self.failed} failed, running: {', '.join(self.running) or 'none'}")
