"""Rows in words, and two records side by side; free of torch."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from salnb._common.tables import markdown_table
from salnb.timing.cases import Case
from salnb.timing.records import Row

__all__ = ["compare", "describe"]


def describe(row: Mapping[str, Any]) -> str:
    """A row of a record in a line."""
    found = Row.from_dict(row)
    label, measured = found.case.label, found.measured
    if measured is None:
        return f"{label}: {found.status} ({found.reason})"
    mean, low, high = (1000 * measured.seconds[name] for name in ("mean", "p5", "p95"))
    text = f"{label}: {mean:.2f} ms ({low:.2f} to {high:.2f}), {measured.peak_bytes / 2**20:.0f} MiB"
    if found.ratio:
        text += f", {found.ratio:.2f} times the baseline, {found.flops_ratio:.2f} its arithmetic"
    return text


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Two records side by side, as a Markdown table of the rows that either of them measured.

    Rows belong together where all but the batch and the size of the images agree and the batches are the
    same multiple of the record's usual batch.
    """
    lines = []
    for letter, record in zip("AB", (first, second), strict=True):
        origin, protocol = record["provenance"], record["protocol"]
        batch, size = protocol["batch"], protocol["size"]
        lines.append(
            f"{letter}: {origin['device_name']}, torch {origin['versions']['torch']}, {origin['time']}, "
            f"batches of {batch}+{batch} at {size}×{size}, {protocol['iterations']} iterations"
        )
    ours, theirs = _keyed(first), _keyed(second)
    cells = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if (a and a.measured) or (b and b.measured):
            cells.append([_label(*key), *_cells(a, b)])
    header = ["step", "A ms", "B ms", "A / B", "ratio A", "ratio B", "arithmetic"]
    return "\n".join([*lines, "", markdown_table(header, cells, rule="---")])


def _keyed(record: Mapping[str, Any]) -> dict[tuple[Case, Fraction], Row]:
    """Rows by what they have in common with those of another device."""
    usual, rows = record["protocol"]["batch"], [Row.from_dict(row) for row in record["rows"]]
    return {
        (replace(row.case, batch=0, size=0, samples=0), Fraction(row.case.batch, usual)): row for row in rows
    }


def _label(case: Case, batches: Fraction) -> str:
    return case.label.replace(", 0+0", "") + (f", {batches} × the batch" if batches != 1 else "")


def _cells(a: Row | None, b: Row | None) -> list[str]:
    times = [row.measured.seconds["mean"] if row and row.measured else None for row in (a, b)]
    speedup = times[0] / times[1] if times[0] and times[1] else None
    limits = [row.flops_ratio if row else None for row in (a, b)]
    return [
        *(
            _number(time and 1000 * time, row.status if row and not row.measured else "–")
            for time, row in zip(times, (a, b), strict=True)
        ),
        _number(speedup),
        *(_number(row.ratio if row else None) for row in (a, b)),
        _number(limits[0] or limits[1]),
    ]


def _number(value: float | None, missing: str = "–") -> str:
    return missing if value is None else f"{value:.2f}"
