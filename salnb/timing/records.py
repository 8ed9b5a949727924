"""Records of the timing study: what they must hold; free of torch."""

import math
from collections.abc import Callable, Mapping
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
        measured = Measured(**{name: row[name] for name in _FOUND}) if row["status"] == "ok" else None
        return cls(case_of(row), row["status"], row["reason"], measured, row["ratio"], row["flops_ratio"])

    def to_dict(self) -> dict[str, Any]:
        """The row as a record holds it."""
        verdict = {"status": self.status, "reason": self.reason}
        if self.measured is None:
            return asdict(self.case) | dict.fromkeys(_UNMEASURED) | verdict
        ratios = {"ratio": self.ratio, "flops_ratio": self.flops_ratio}
        return asdict(self.case) | asdict(self.measured) | verdict | ratios

    def over(self, baseline: "Row | None") -> tuple[float | None, float | None]:
        """Time and arithmetic over those of the baseline, where both were measured."""
        if self.case.method is None or baseline is None or not (self.measured and baseline.measured):
            return None, None
        ours, theirs = self.measured, baseline.measured
        return ours.seconds["mean"] / theirs.seconds["mean"], ours.flops / theirs.flops


_CASE, _FOUND = (tuple(field.name for field in fields(kind)) for kind in (Case, Measured))
_RATIOS = ("ratio", "flops_ratio")
# null in rows that were not measured, in this order
_UNMEASURED = (*_FOUND[:-2], *_RATIOS, *_FOUND[-2:])


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row of a record measures."""
    return Case(**{name: row[name] for name in _CASE})


def read_timing(path: str | Path) -> dict[str, Any]:
    """Read a record of the timing study.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not such a record, or it is damaged; the message names the place.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no timing record {path}")
    record = read_record(path)
    try:
        return check_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_MEANS = ("mean", "median", "p5", "p95", "min", "max")
# what the fields of a record must be, by their types
_TESTS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    int: ("a positive integer", lambda value: isinstance(value, int) and _is_number(value) and value > 0),
    float: ("a number of seconds", _is_number),
    float | None: ("null or a number", lambda value: value is None or _is_number(value)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str)),
    str | None: ("null or a text", lambda value: isinstance(value, str | None)),
    Mapping[str, float]: (
        f"positive numbers {', '.join(_MEANS)}",
        lambda value: _are_numbers(value) and value.keys() == set(_MEANS) and all(value.values()),
    ),
    Mapping[str, float] | None: (
        "null or seconds by name",
        lambda value: value is None or _are_numbers(value),
    ),
    Mapping[str, float | None] | None: ("null or an object", lambda value: isinstance(value, dict | None)),
}
_PROTOCOL = {"iterations": int, "batch": int, "size": int, "budget_seconds": float, "spent_seconds": float}


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
    for name, kind in _PROTOCOL.items():
        _expect_kind(record["protocol"].get(name), kind, f"protocol.{name}")
    rows: Any = record.get("rows")
    _expect(isinstance(rows, list) and rows, "rows", "a list that is not empty", rows)
    found: dict[Case, Row] = {}
    for i, each in enumerate(rows):
        _check_row(each, f"rows[{i}]")
        row = Row.from_dict(each)
        _expect(row.case not in found, f"rows[{i}]", "a case of its own", row.case.label)
        found[row.case] = row
    for case, row in found.items():
        expected = row.over(found.get(case.baseline))
        for name, got, value in zip(_RATIOS, (row.ratio, row.flops_ratio), expected, strict=True):
            same = got == value or (
                value and isinstance(got, int | float) and math.isclose(got, value, rel_tol=1e-6)
            )
            _expect(same, f"{name} of {case.label}", f"{value}, as its baseline says", got)
    return record


def _check_row(row: Any, place: str) -> None:
    def expect(name: str, condition: Any, what: str, got: Any = None) -> None:
        _expect(condition, f"{place}.{name}", what, row[name] if got is None else got)

    _expect(isinstance(row, dict), place, "an object", row)
    names = {*_CASE, *_UNMEASURED, "status", "reason"}
    different = sorted(names ^ row.keys())
    _expect(not different, place, f"an object of the fields {', '.join(sorted(names))}", different)
    for name, known in (("status", STATUSES), ("precision", PRECISIONS)):
        expect(name, row[name] in known, "one of " + ", ".join(known))
    measured = row["status"] == "ok"
    for field in (*fields(Case), *(fields(Measured) if measured else ())):
        if field.name != "samples" or row["samples"] != 0:
            _expect_kind(row[field.name], field.type, f"{place}.{field.name}")
    expect("reason", (row["reason"] is None) == measured, "a text unless the status is ok")
    if not measured:
        for name in _UNMEASURED:
            expect(name, row[name] is None, "null where nothing was measured")
        return
    expect("averaged", 2 * row["averaged"] <= row["iterations"], "at most half of the iterations")
    seconds = row["seconds"]
    ordered = [seconds[name] for name in ("min", "p5", "median", "p95", "max")]
    inside = seconds["min"] <= seconds["mean"] * (1 + 1e-9) and seconds["mean"] <= seconds["max"] * (1 + 1e-9)
    expect("seconds", ordered == sorted(ordered) and inside, "in order")
    total = sum((row["parts"] or {"all": seconds["mean"]}).values())
    expect("parts", math.isclose(total, seconds["mean"], rel_tol=1e-3), "as long as the mean", total)


def _expect_kind(value: Any, kind: Any, place: str) -> None:
    what, test = _TESTS[kind]
    _expect(test(value), place, what, value)


def _expect(condition: Any, place: str, what: str, got: Any) -> None:
    if not condition:
        shown = repr(got)
        shown = shown[:80] + "…" * (len(shown) > 80)
        raise ValueError(f"not a timing record: {place} must be {what}, got {shown}")
