"""The timing study: rows are measured in their order, for as long as the budget lasts.

`salnb time` runs it and writes the record that chapter 15 reads.
"""

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from salnb import results
from salnb._common.devices import resolve_device
from salnb.timing.cases import Case, Settings, plan
from salnb.timing.clock import OutOfBudgetError
from salnb.timing.foresight import foreseen
from salnb.timing.measurement import measure_case
from salnb.timing.profiler import device_facts
from salnb.timing.records import SCHEMA, Row, check_record
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
    turn: an interruption loses none, and does not replace an older record that is whole.

    Args:
        settings: what to measure; None is the default table of the best device there is.
        out: where the record goes; None is `default_path`.
        log: told a line for each row.
        now: seconds of a clock that the budget is counted by.

    Returns:
        The record, which `read_timing` reads again.

    Raises:
        ValueError: the device is not there, or no row is left of those that were asked for.
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
    path = Path(out) if out is not None else default_path(device)
    partial = path.with_name(f"{path.name}.partial")
    rows = [Row(case, "not run", "the study ended before its turn") for case in cases]
    record = _record(settings, device, rows)

    def left() -> float:
        return (settings.budget or 0) - (now() - begin)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, case in enumerate(cases):
            row = _attempt(case, device, settings.iterations or 0, left, rows[:i])
            ratio, flops_ratio = row.over(rows[cases.index(case.baseline)])
            rows[i] = replace(row, ratio=ratio, flops_ratio=flops_ratio)
            record["rows"][i] = rows[i].to_dict()
            if row.status != "not run":
                record["protocol"]["spent_seconds"] = now() - begin
                results.write_record(partial, record)
                log(describe(record["rows"][i]))
    results.write_record(path, record)
    partial.unlink(missing_ok=True)
    waiting = sum(row.status == "not run" for row in rows)
    spent = record["protocol"]["spent_seconds"]
    log(f"{len(cases) - waiting} rows in {spent:.0f} s, {waiting} not run: {path}")
    return check_record(record)


def default_path(device: torch.device | str) -> Path:
    """`results/timing-<device>.json`, with the name of a GPU."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path("results") / f"timing-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def _record(settings: Settings, device: torch.device, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "provenance": results.provenance(str(device)),
        "facts": device_facts(device),
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


def _attempt(
    case: Case, device: torch.device, iterations: int, left: Callable[[], float], before: Sequence[Row]
) -> Row:
    """A row, whatever happens to it."""
    status, reason = foreseen(case, device, iterations, left(), before)
    if status is not None:
        return Row(case, status, reason)
    try:
        row = Row(case, "ok", measured=measure_case(case, device, iterations=iterations, left=left))
    except OutOfBudgetError as error:
        row = Row(case, "not run", str(error))
    except Exception as error:
        status = "out of memory" if _is_out_of_memory(error) else "failed"
        first_line = str(error).strip().split("\n")[0]
        row = Row(case, status, f"{type(error).__name__}: {first_line}"[:300])
    # only here, where no exception holds on to its tensors any more
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if case.compiled:
        torch.compiler.reset()
    return row


def _is_out_of_memory(error: Exception) -> bool:
    # CPUs, Apple's GPUs and NVIDIA's libraries have no class of their own for it
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words)
