"""Records of the timing study: what they must hold; free of torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from salnb.results import read_record
from salnb.timing.cases import PRECISIONS, Case

__all__ = ["SCHEMA", "STATUSES", "Measured", "Row", "case_of", "check_record", "read_timing"]

SCHEMA = "salnb timing 1"
STATUSES = ("ok", "out of memory", "failed", "not run", "not available")


@dataclass(frozen=True)
class Measured:
    """What was measured of a case; times are in seconds.

    Attributes:
        iterations: how often the step was run.
        averaged: how many of the last iterations count.
        seconds: mean, median, percentiles and extremes of a step.
        parts: mean of each part of a step; None where it has none, or where not all steps are alike.
        kinds: of a step, by kind of operation; None where not all steps are alike.
        first_step_seconds: of the first step, in which a compiled one is compiled.
        held_bytes: memory of parameters, buffers and the batch.
        peak_bytes: the most memory in use during a step, with what is held.
        flops: floating-point operations of a step on average.
        convolution_flops: those of its convolutions.
        peak_share: speed of its convolutions over the device's peak; None where that is not known.
        clocks_mhz: of the device just after the last step; None where they cannot be read.
        time: when, in UTC.
    """

    iterations: int
    averaged: int
    seconds: Mapping[str, float]
    parts: Mapping[str, float] | None
    kinds: Mapping[str, float] | None
    first_step_seconds: float
    held_bytes: int
    peak_bytes: int
    flops: int
    convolution_flops: int
    peak_share: float | None
    clocks_mhz: Mapping[str, float | None] | None
    time: str


CASE_FIELDS = tuple(field.name for field in fields(Case))
_FOUND = tuple(field.name for field in fields(Measured))
_SECONDS = ("mean", "median", "p5", "p95", "min", "max")
# null in rows that were not measured, in this order
MEASURED = (*_FOUND[:-2], "ratio", "flops_ratio", *_FOUND[-2:])


@dataclass(frozen=True)
class Row:
    """A case, and what became of it.

    Attributes:
        case: what was to be measured.
        status: one of `STATUSES`.
        reason: why nothing was measured; None where something was.
        measured: None unless the status is "ok".
        ratio: time over that of the baseline; None for a baseline, and where that was not measured.
        flops_ratio: arithmetic over that of the baseline.
    """

    case: Case
    status: str
    reason: str | None = None
    measured: Measured | None = None
    ratio: float | None = None
    flops_ratio: float | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Row":
        """A row of a record."""
        done = row["status"] == "ok"
        measured = Measured(**{name: row[name] for name in _FOUND}) if done else None
        return cls(case_of(row), row["status"], row["reason"], measured, row["ratio"], row["flops_ratio"])

    def to_dict(self) -> dict[str, Any]:
        """The row as a record holds it."""
        verdict = {"status": self.status, "reason": self.reason}
        if self.measured is None:
            return self.case.to_dict() | dict.fromkeys(MEASURED) | verdict
        ratios = {"ratio": self.ratio, "flops_ratio": self.flops_ratio}
        return self.case.to_dict() | asdict(self.measured) | verdict | ratios

    def over(self, baseline: "Row | None") -> tuple[float | None, float | None]:
        """Time and arithmetic over those of the baseline, where both were measured."""
        if self.case.method is None or baseline is None or not (self.measured and baseline.measured):
            return None, None
        ours, theirs = self.measured, baseline.measured
        return ours.seconds["mean"] / theirs.seconds["mean"], ours.flops / theirs.flops


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row of a record measures."""
    return Case(**{name: row[name] for name in CASE_FIELDS})


def read_timing(path: str | Path) -> dict[str, Any]:
    """Read a record of the timing study.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not such a record, or it is damaged; the message names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no timing record {path}")
    try:
        return check_record(read_record(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def check_record(record: dict[str, Any]) -> dict[str, Any]:
    """Raise a ValueError, which names the place, unless this is a whole and consistent record; return it."""
    _expect(isinstance(record, dict), "record", "an object", record)
    _expect(record.get("schema") == SCHEMA, "schema", repr(SCHEMA), record.get("schema"))
    for name in ("provenance", "facts", "protocol"):
        _expect(isinstance(record.get(name), dict), name, "an object", record.get(name))
    for name in ("time", "versions", "device", "device_name", "commit"):
        _expect(name in record["provenance"], f"provenance.{name}", "there", None)
    for name in ("driver", "clocks_mhz", "processor"):
        _expect(name in record["facts"], f"facts.{name}", "there", None)
    for name in ("iterations", "batch", "size"):
        value = record["protocol"].get(name)
        _expect(_is_count(value), f"protocol.{name}", "a positive integer", value)
    for name in ("budget_seconds", "spent_seconds"):
        value = record["protocol"].get(name)
        _expect(_is_positive(value) or value == 0, f"protocol.{name}", "a number of seconds", value)
    _check_rows(record.get("rows"))
    return record


def _check_rows(rows: Any) -> None:
    _expect(isinstance(rows, list) and rows, "rows", "a list that is not empty", rows)
    found: dict[Case, Row] = {}
    for i, each in enumerate(rows):
        _check_row(each, f"rows[{i}]")
        row = Row.from_dict(each)
        _expect(row.case not in found, f"rows[{i}]", "a case of its own", row.case.label)
        found[row.case] = row
    for case, row in found.items():
        if row.measured:
            expected = row.over(found.get(case.baseline))
            names = ("ratio", "flops_ratio")
            for name, got, value in zip(names, (row.ratio, row.flops_ratio), expected, strict=True):
                same = got == value or (value and got and math.isclose(got, value, rel_tol=1e-6))
                _expect(same, f"{name} of {case.label}", f"{value}, as its baseline says", got)


def _check_row(row: Any, place: str) -> None:
    def expect(name: str, condition: Any, what: str) -> None:
        _expect(condition, f"{place}.{name}", what, row[name])

    _expect(isinstance(row, dict), place, "an object", row)
    names = {*CASE_FIELDS, *MEASURED, "status", "reason"}
    different = sorted(names ^ row.keys())
    _expect(not different, place, f"an object of the fields {', '.join(sorted(names))}", different)
    for name, known in (("status", STATUSES), ("precision", PRECISIONS)):
        expect(name, row[name] in known, "one of " + ", ".join(known))
    for name in ("every", "batch", "size"):
        expect(name, _is_count(row[name]), "a positive integer")
    measured = row["status"] == "ok"
    expect("reason", (row["reason"] is None) == measured, "a text unless the status is ok")
    if not measured:
        for name in MEASURED:
            expect(name, row[name] is None, "null where nothing was measured")
        return
    for name in ("iterations", "averaged", "held_bytes", "peak_bytes", "flops", "convolution_flops"):
        expect(name, _is_count(row[name]), "a positive integer")
    expect("averaged", 2 * row["averaged"] <= row["iterations"], "at most half of the iterations")
    seconds = row["seconds"]
    right = _are_amounts(seconds) and set(seconds) == set(_SECONDS) and all(seconds.values())
    expect("seconds", right, f"positive numbers {', '.join(_SECONDS)}")
    ordered = [seconds[name] for name in ("min", "p5", "median", "p95", "max")]
    inside = seconds["min"] <= seconds["mean"] * (1 + 1e-9) and seconds["mean"] <= seconds["max"] * (1 + 1e-9)
    expect("seconds", ordered == sorted(ordered) and inside, "in order")
    for name in ("parts", "kinds"):
        expect(name, row[name] is None or _are_amounts(row[name]), "null or seconds by name")
    if row["parts"]:
        total = sum(row["parts"].values())
        close = math.isclose(total, seconds["mean"], rel_tol=1e-3)
        _expect(close, f"{place}.parts", "as long as the mean", total)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _are_amounts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_positive(v) or v == 0 for v in value.values())


def _expect(condition: Any, place: str, what: str, got: Any) -> None:
    if not condition:
        shown = repr(got)
        raise ValueError(
            f"not a timing record: {place} must be {what}, got {shown[:80]}{'…' * (len(shown) > 80)}"
        )
