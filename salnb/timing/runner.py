"""What a training step with the saliency loss costs: the paper's Table 4, on the device at hand.

The paper's protocol: originals and augmented images lie on the device; a step is run 200 times, and the mean
of the second 100 counts. The baseline is forward pass, cross-entropy and gradient of the whole batch; the
step with saliency is forward pass, saliency maps, transforming them back, their difference, and gradient.
There is no optimiser in either. `salnb time` runs the study and writes the record that chapter 15 reads.
"""

import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from salnb import results
from salnb.timing.cases import TABLE_4, Case, Settings, counted, plan
from salnb.timing.clock import OutOfBudgetError, Stopwatch, clock_of, distribution, run_protocol
from salnb.timing.profiler import clocks, device_facts, peak_flops, profiled
from salnb.timing.records import (
    MEASURED,
    PAPER,
    SCHEMA,
    case_of,
    check_record,
    compare,
    ratios,
    read_timing,
)
from salnb.timing.steps import AUGMENTATION, NUM_CLASSES, Step, arithmetic, count_flops

__all__ = [
    "PAPER",
    "TABLE_4",
    "Case",
    "Settings",
    "case_of",
    "check_record",
    "compare",
    "measure",
    "plan",
    "read_timing",
    "study",
]

# seconds that compiling is taken to need before any was seen: of a baseline, of a step with saliency
_COMPILING = (30.0, 90.0)


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
    device = torch.device(device)
    iterations, averaged = counted(iterations, case.every)
    watch = Stopwatch(clock_of(device))
    with arithmetic(case, device):
        step = Step(case, device, watch.mark)
        run_protocol(step, watch, iterations, averaged, left)
        speed = clocks(device)  # just after the work, before the device slows down
        times, first = watch.times(averaged), watch.times(iterations)[0]
        parts = watch.parts(averaged) if case.every == 1 and not case.compiled else None
        watch.laps.append([])  # what follows is none of the protocol's
        kinds, peak = profiled(step, device)
    flops, convolutions = count_flops(case)
    share = None
    possible = (
        peak_flops(torch.cuda.get_device_name(device), case.precision) if device.type == "cuda" else None
    )
    if possible and kinds and kinds["convolution"]:
        share = convolutions / kinds["convolution"] / possible
    return case.to_dict() | {
        "iterations": iterations,
        "averaged": averaged,
        "seconds": _nanoseconds(distribution(times)),
        "parts": _nanoseconds(parts) if parts else None,
        "kinds": _nanoseconds(kinds) if case.every == 1 else None,
        "first_step_seconds": round(first, 9),
        "held_bytes": step.held_bytes,
        "peak_bytes": step.held_bytes + peak,
        "flops": flops,
        "convolution_flops": convolutions,
        "peak_share": share,
        "clocks_mhz": speed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _nanoseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Without digits that no clock has."""
    return {name: round(value, 9) for name, value in seconds.items()}


def study(
    settings: Settings | None = None,
    out: str | Path | None = None,
    *,
    log: Callable[[str], object] = print,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure rows, the most important first, for as long as the budget lasts.

    After every row the record is written, with ``.partial`` behind its name until all rows have had their
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
    device = _device(settings.device)
    settings = settings.on(device.type)
    cases = plan(settings)
    if not cases:
        raise ValueError(
            "networks, precisions and modes leave no row: the study of this device has none with all of them"
        )
    path = Path(out) if out is not None else default_path(device)
    partial = path.with_name(f"{path.name}.partial")
    budget, iterations = settings.budget, settings.iterations
    assert budget is not None  # filled in by on(), as all the others
    assert iterations is not None
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": results.provenance(str(device)),
        "facts": device_facts(device),
        "protocol": {
            "iterations": iterations,
            "batch": settings.batch,
            "size": settings.size,
            "num_classes": NUM_CLASSES,
            "augmentation": AUGMENTATION,
            "budget_seconds": budget,
            "spent_seconds": 0.0,
        },
        "rows": [_empty(case, "not run", "the study ended before its turn") for case in cases],
    }
    place = {case: i for i, case in enumerate(cases)}

    def left() -> float:
        return budget - (now() - begin)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, case in enumerate(cases):
            row = _attempt(case, device, iterations, left, record["rows"][:i])
            if row["status"] == "ok" and case.method:
                row["ratio"], row["flops_ratio"] = ratios(row, record["rows"][place[case.baseline]])
            record["rows"][i] = row
            if row["status"] != "not run":
                record["protocol"]["spent_seconds"] = now() - begin
                results.write_record(partial, record)
                log(describe(row))
    results.write_record(path, record)
    partial.unlink(missing_ok=True)
    waiting = sum(row["status"] == "not run" for row in record["rows"])
    spent = record["protocol"]["spent_seconds"]
    log(f"{len(cases) - waiting} rows in {spent:.0f} s, {waiting} not run: {path}")
    return check_record(record)


def default_path(device: torch.device | str) -> Path:
    """``results/timing-<device>.json``, with the name of a GPU."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path("results") / f"timing-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def describe(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    label = case_of(row).label
    if row["status"] != "ok":
        return f"{label}: {row['status']} ({row['reason']})"
    mean, low, high = (1000 * row["seconds"][name] for name in ("mean", "p5", "p95"))
    text = f"{label}: {mean:.2f} ms ({low:.2f} to {high:.2f}), {row['peak_bytes'] / 2**20:.0f} MiB"
    if row["ratio"]:
        text += f", {row['ratio']:.2f} times the baseline, {row['flops_ratio']:.2f} its arithmetic"
    return text


def _attempt(
    case: Case, device: torch.device, iterations: int, left: Callable[[], float], before: Sequence[Mapping]
) -> dict[str, Any]:
    """A row of the record, whatever happens to it."""
    status, reason = _foreseen(case, device, iterations, left(), before)
    row: dict[str, Any] | None = None
    if status is None:
        try:
            row = measure(case, device, iterations=iterations, left=left)
        except OutOfBudgetError as error:
            status, reason = "not run", str(error)
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            status = "out of memory" if _is_out_of_memory(error) else "failed"
            reason = f"{type(error).__name__}: {first_line}"[:300]
        # only here, where no exception holds on to its tensors any more
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if case.compiled:
            torch.compiler.reset()
    if row is None:
        return _empty(case, status or "failed", reason)
    return row | {"status": "ok", "reason": None, "ratio": None, "flops_ratio": None}


def _foreseen(
    case: Case, device: torch.device, iterations: int, left: float, before: Sequence[Mapping]
) -> tuple[str | None, str]:
    """The status of a row that need not be tried, and why; None where it must be."""
    lacking = _lacking(case, device)
    if lacking:
        return "not available", lacking
    for row in before:
        other = case_of(row)
        if (
            row["status"] == "out of memory"
            and _at_batch(other, case.batch) == case
            and other.batch < case.batch
        ):
            return "out of memory", f"a batch of {other.batch}+{other.batch} was too large already"
    needed = _expected_seconds(case, iterations, before)
    if left <= 0 or needed > left:
        return "not run", f"about {needed:.0f} s were needed, {max(left, 0):.0f} s were left"
    return None, ""


def _at_batch(case: Case, batch: int) -> Case:
    return Case(**case.to_dict() | {"batch": batch})


def _expected_seconds(case: Case, iterations: int, before: Sequence[Mapping]) -> float:
    """At least what a row takes, as far as the rows before it tell."""
    done = [(case_of(row), row) for row in before if row["status"] == "ok"]
    compiling = 0.0
    if case.compiled:
        seen = [
            row["first_step_seconds"]
            for other, row in done
            if other.compiled and bool(other.method) == bool(case.method)
        ]
        compiling = max(seen, default=_COMPILING[bool(case.method)])
    base = next((row["seconds"]["mean"] for other, row in done if other == case.baseline), 0.0)
    # the arithmetic of a step with saliency is twice that of its baseline, and again for each noisy copy
    steps = counted(iterations, case.every)[0] * (1 + max(1, case.samples) / case.every if case.method else 1)
    return compiling + steps * base


def _lacking(case: Case, device: torch.device) -> str:
    """What the device lacks for a row; empty where nothing."""
    if device.type != "cuda":
        return "TF32 is for NVIDIA's GPUs" if case.precision == "tf32" else ""
    capability = torch.cuda.get_device_capability(device)
    if case.precision == "tf32" and capability < (8, 0):
        return f"TF32 needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if case.precision == "bf16" and capability < (8, 0):
        return f"bfloat16 needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if case.compiled and capability < (7, 0):
        return f"the compiler needs compute capability 7.0, this device has {capability[0]}.{capability[1]}"
    return ""


def _is_out_of_memory(error: Exception) -> bool:
    # CPUs, Apple's GPUs and NVIDIA's libraries have no class of their own for it
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words)


def _empty(case: Case, status: str, reason: str) -> dict[str, Any]:
    return case.to_dict() | dict.fromkeys(MEASURED) | {"status": status, "reason": reason}


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} is not on this machine: take cpu, or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not on this machine: it has {torch.cuda.device_count()} GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not on this machine: take cpu, or auto")
    return device
