"""A study without a device: rows that are made up, in records as `salnb time` writes them."""

import dataclasses
import os

import torch

from salnb import timing
from salnb.timing import runner
from salnb.timing.records import SCHEMA, Measured, Row

SECONDS = {"mean": 0.02, "median": 0.02, "p5": 0.018, "p95": 0.022, "min": 0.017, "max": 0.023}
PARTS = {"forward": 0.004, "input gradient": 0.002, "loss": 0.001, "backward": 0.013}


def made_up(case, device="cpu", *, iterations=8, factor=1.0, **options):
    """What `measure_case` might return: a step with saliency takes three times its baseline."""
    factor *= 3 if case.method else 1
    flops = 1000 * case.batch * (2 if case.method else 1)
    return Measured(
        iterations=iterations,
        averaged=iterations // 2,
        seconds={name: factor * value for name, value in SECONDS.items()},
        parts={name: share * factor for name, share in PARTS.items()},
        kinds={"convolution": 0.01, "batch norm": 0.0},
        first_step_seconds=1.0,
        held_bytes=1000,
        peak_bytes=5000,
        flops=flops,
        convolution_flops=flops // 2,
        bytes={"convolution": 1000 * case.batch, "elementwise": 3000 * case.batch},
        peaks={"flops": 1e6, "bytes": 1e6},
        peaks_source="made up",
        peak_share=None,
        clocks_mhz=None,
        time="2026-01-01T00:00:00+00:00",
    )


def made_up_record(**changes):
    """A record of rows that are made up, each a little slower than the one before."""
    chosen = settings(**changes).on("cpu")
    rows = {}
    for i, case in enumerate(timing.plan(chosen)):
        row = Row(case, "ok", measured=made_up(case, factor=1 + i / 10))
        ratio, flops_ratio = row.over(rows.get(case.baseline))
        rows[case] = dataclasses.replace(row, ratio=ratio, flops_ratio=flops_ratio)
    origin = {"time": "", "commit": None, "versions": {"torch": "2"}, "device": "cpu", "device_name": "a CPU"}
    protocol = {"iterations": 8, "batch": chosen.batch, "size": chosen.size}
    return timing.check_record(
        {
            "schema": SCHEMA,
            "provenance": origin,
            "facts": {"driver": None, "clocks_mhz": None, "processor": "fast"},
            "protocol": protocol | {"budget_seconds": 60, "spent_seconds": 1.0},
            "rows": [row.to_dict() for row in rows.values()],
        }
    )


def settings(**changes):
    """A study of a small network on the CPU, with nothing compiled."""
    usual = {"device": "cpu", "networks": ["small"], "size": 32, "batch": 2, "budget": 60, "modes": ["eager"]}
    return timing.Settings(**usual | changes)


def silent(line):
    """A log that nobody reads."""


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nSee the manual")


def without_waiting(monkeypatch):
    """Rows that are made up leave nothing to free, and need not reach the disk; gives what would be freed."""
    freed = []
    monkeypatch.setattr(runner.gc, "collect", lambda: freed.append(True))
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return freed


def small_study(path, **changes):
    """Of real rows, as small as can be."""
    return timing.study(settings(size=16, iterations=4, budget=600, **changes), path, log=silent)


def broken(*args, **kwargs):
    """Stands for what fails."""
    raise RuntimeError("it is broken\nin many ways")
