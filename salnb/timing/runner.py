"""The timing study: rows are measured in their order, for as long as the budget lasts.

`salnb time` runs it and writes the record that chapter 15 reads.
"""

import contextlib
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from salnb import results
from salnb._common.devices import resolve_device
from salnb.timing.cases import Case, Settings, plan
from salnb.timing.clock import OutOfBudgetError
from salnb.timing.foresight import foreseen, guaranteed
from salnb.timing.measurement import measure_case, reason_of
from salnb.timing.profiler import device_facts
from salnb.timing.record_file import RecordFile
from salnb.timing.records import SCHEMA, Measured, Row, check_record
from salnb.timing.steps import AUGMENTATION, NUM_CLASSES
from salnb.timing.tables import describe

__all__ = ["default_path", "study"]


def study(
    settings: Settings | None = None,
    out: str | Path | None = None,
    *,
    log: Callable[[str], object] = print,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure rows, the most important first, for as long as the budget lasts.

    After every row the record is written, with `.partial` behind its name until all rows have had their
    turn: an interruption loses none, and does not replace an older record that is whole. A row keeps its
    times whatever fails beside them, and says what it lacks. One pair, of a baseline and its step with
    saliency, is measured however short the time is, in fewer iterations if need be.

    Args:
        settings: what to measure; None is the default table of the best device there is.
        out: where the record goes; None is `default_path`.
        log: told a line for each row.
        now: seconds of a clock that the budget is counted by.

    Returns:
        The record, which `read_timing` reads again.

    Raises:
        ValueError: the device is not there, or no row is left of those that were asked for.
        OSError: `out` cannot be written. If that turns out at the end only, the message says where the record
            is instead.
        RuntimeError: no row could be measured.
    """
    begin = now()
    settings = settings or Settings()
    gpus = torch.cuda.device_count() if settings.device.startswith("cuda") else 0
    advice = f"it has {gpus} GPUs" if gpus else "take cpu, or auto"
    device = resolve_device(settings.device, advice=advice)
    settings = settings.on(device.type)
    cases = plan(settings)
    if not cases:
        raise ValueError(
            "networks, precisions and modes leave no row: the study of this device has none with all of them"
        )
    file = RecordFile(Path(out) if out is not None else default_path(device), log)
    under_way = _Study(settings, device, cases, file, lambda: now() - begin)
    lines: list[str] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), file.finished():
        for i in range(len(cases)):
            row = under_way.measure(i)
            lines += [describe(row.to_dict())] if row.status != "not run" else []
            while lines and under_way.anything:  # until then there may be no more than one line to say
                log(lines.pop(0))
        if not under_way.anything:
            lines += [describe(under_way.rows[0].to_dict())]
            raise RuntimeError(f"no row of {len(cases)} could be measured; the first: {lines[0]}")
        file.write(under_way.record)
    record = under_way.record
    waiting = sum(row.status == "not run" for row in under_way.rows)
    spent = record["protocol"]["spent_seconds"]
    log(f"{len(cases) - waiting} rows in {spent:.0f} s, {waiting} not run: {file.path}")
    return check_record(record)


def default_path(device: torch.device | str) -> Path:
    """`results/timing-<device>.json`, with the name of a GPU."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path("results") / f"timing-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@dataclass
class _Study:
    """A study under way: what became of each of its cases so far, also in the record and in its file."""

    settings: Settings
    device: torch.device
    cases: Sequence[Case]
    file: RecordFile
    spent: Callable[[], float]

    def __post_init__(self) -> None:
        self.rows = [Row(case, "not run", "the study ended before its turn") for case in self.cases]
        self.record = _record(self.settings, self.device, self.rows)

    @property
    def anything(self) -> bool:
        """Whether a row is measured."""
        return any(row.measured for row in self.rows)

    def left(self, reserved: float = 0.0) -> float:
        """Seconds that are left, apart from a share of the budget that is not to be touched."""
        return (self.settings.budget or 0) * (1 - reserved) - self.spent()

    def measure(self, i: int) -> Row:
        """Give a case its turn."""
        case, before = self.cases[i], self.rows[:i]
        certain = guaranteed(case, before, self.left())
        # a step with saliency takes about three times as long
        left = partial(self.left, 0.75 if certain and case.method is None else 0.0)
        self.put(i, self._attempt(i, left, certain))
        return self.rows[i]

    def put(self, i: int, row: Row) -> None:
        """Enter a row, with its ratios; write the record from the first row on that is measured."""
        self.rows[i] = row = _with_ratios(row, self.rows[self.cases.index(row.case.baseline)])
        self.record["rows"][i] = row.to_dict()
        if row.status != "not run" and self.anything:
            self.record["protocol"]["spent_seconds"] = self.spent()
            self.file.write(self.record)

    def _attempt(self, i: int, left: Callable[[], float], certain: bool) -> Row:
        """A row, whatever happens to it."""
        case, device, iterations = self.cases[i], self.device, self.settings.iterations or 0
        kept: list[Measured] = []

        def keep(measured: Measured) -> None:
            kept.append(measured)
            self.put(i, Row(case, "ok", measured=measured))

        try:
            time_left = float("inf") if certain else left()
            status, reason = foreseen(case, device, iterations, time_left, self.rows[:i])
            if status is not None:
                return Row(case, status, reason)
            measured = measure_case(case, device, iterations=iterations, left=left, shrink=certain, keep=keep)
            row = Row(case, "ok", measured=measured)
        except OutOfBudgetError as error:
            row = Row(case, "not run", str(error))
        except Exception as error:
            status, reason = "out of memory" if _is_out_of_memory(error) else "failed", reason_of(error)
            row = Row(case, status, reason)
            if kept:
                row = Row(case, "ok", measured=replace(kept[0], lacks=dict.fromkeys(kept[0].lacks, reason)))
        # only here, where no exception holds on to its tensors any more
        with contextlib.suppress(Exception):  # a device that is broken says so in the next row
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if case.compiled:
                torch.compiler.reset()
        return row


def _with_ratios(row: Row, baseline: Row) -> Row:
    if row.measured is None:
        return row
    try:
        ratio, flops_ratio = row.over(baseline)
        return replace(row, ratio=ratio, flops_ratio=flops_ratio)
    except Exception as error:
        lacks = {**row.measured.lacks, "ratio": reason_of(error)}
        return replace(row, measured=replace(row.measured, lacks=lacks))


def _record(settings: Settings, device: torch.device, rows: Sequence[Row]) -> dict[str, Any]:
    lacks: dict[str, str] = {}

    def found(name: str, find: Callable[[], dict[str, Any]], otherwise: dict[str, Any]) -> dict[str, Any]:
        try:
            return find()
        except Exception as error:
            lacks[name] = reason_of(error)
            return otherwise

    origin = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": None,
        "versions": {"torch": str(torch.__version__)},
        "device": str(device),
        "device_name": str(device),
    }
    record = {
        "schema": SCHEMA,
        "provenance": found("provenance", lambda: results.provenance(str(device)), origin),
        "facts": found(
            "facts",
            lambda: device_facts(device),
            dict.fromkeys(("processor", "driver", "clocks_mhz", "power_limit_w")),
        ),
        "protocol": {
            "iterations": settings.iterations,
            "batch": settings.batch,
            "size": settings.size,
            "num_classes": NUM_CLASSES,
            "augmentation": AUGMENTATION,
            "budget_seconds": settings.budget,
            "spent_seconds": 0.0,
        },
        "rows": [row.to_dict() for row in rows],
    }
    return record | ({"lacks": lacks} if lacks else {})


def _is_out_of_memory(error: Exception) -> bool:
    # CPUs, Apple's GPUs and NVIDIA's libraries have no class of their own for it
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words)
