"""Records of the timing study: what they must hold; free of torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from salnb.results import read_record
from salnb.timing.cases import PRECISIONS, Case

__all__ = ["ACCESSORIES", "SCHEMA", "STATUSES", "Measured", "Row", "case_of", "check_record", "read_timing"]

SCHEMA = "salnb timing 2"
_BEFORE_BYTES = "salnb timing 1"
STATUSES = ("ok", "out of memory", "failed", "not run", "not available")
_RATIOS = ("ratio", "flops_ratio")
# what a row that has its times can do without: the name of each in `lacks`, and the fields that are null then
ACCESSORIES = {
    name: (name,)
    for name in ("parts", "kinds", "held_bytes", "peak_bytes", "bytes", "peak_share", "clocks_mhz")
} | {"flops": ("flops", "convolution_flops"), "peaks": ("peaks", "peaks_source"), "ratio": _RATIOS}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a case; times are in seconds.

    All but the times may be missing, if it could not be found out: `lacks` then says why.

    Attributes:
        iterations: how often the step was run.
        averaged: how many of the last iterations count.
        seconds: mean, median, percentiles and extremes of a step.
        parts: mean of each part of a step; None where it has none, or where not all steps are alike.
        kinds: of a step, by kind of operation; None where not all steps are alike, or captured.
        first_step_seconds: of the first step, in which a compiled one is compiled.
        held_bytes: memory of parameters, buffers and the batch.
        peak_bytes: the most memory in use during a step, with what is held.
        flops: floating-point operations of a step on average.
        convolution_flops: those of its convolutions.
        bytes: that the operators of a step read and write on average, by kind of operation.
        peaks: the device's peaks in the case's precision, `flops` and `bytes` a second.
        peaks_source: where the peaks come from.
        peak_share: speed of its convolutions over the device's peak; None where that is not known.
        clocks_mhz: of the device just after the last step; None where they cannot be read.
        time: when, in UTC.
        lacks: which of `ACCESSORIES` are missing, and why each is.
    """

    iterations: int
    averaged: int
    seconds: Mapping[str, float]
    parts: Mapping[str, float] | None = None
    kinds: Mapping[str, float] | None = None
    first_step_seconds: float
    held_bytes: int | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    convolution_flops: int | None = None
    bytes: Mapping[str, float] | None = None
    peaks: Mapping[str, float] | None = None
    peaks_source: str | None = None
    peak_share: float | None = None
    clocks_mhz: Mapping[str, float | None] | None = None
    time: str
    lacks: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a record holds them; `lacks` only where something is missing."""
        found = asdict(self)
        return found if self.lacks else {name: found[name] for name in _FOUND}


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
        found = {name: row[name] for name in (*_FOUND, "lacks") if name in row}
        measured = Measured(**found) if row["status"] == "ok" else None
        return cls(case_of(row), row["status"], row["reason"], measured, row["ratio"], row["flops_ratio"])

    def to_dict(self) -> dict[str, Any]:
        """The row as a record holds it."""
        verdict = {"status": self.status, "reason": self.reason}
        if self.measured is None:
            return asdict(self.case) | dict.fromkeys(_UNMEASURED) | verdict
        ratios = {"ratio": self.ratio, "flops_ratio": self.flops_ratio}
        return asdict(self.case) | self.measured.to_dict() | verdict | ratios

    def check(self) -> "Row":
        """Raise a ValueError, which names the field, unless a record may hold this row; return it."""
        _check_row(self.to_dict(), self.case.label)
        return self

    def over(self, baseline: "Row | None") -> tuple[float | None, float | None]:
        """Time and arithmetic over those of the baseline, where both were measured."""
        if self.case.method is None or baseline is None or not (self.measured and baseline.measured):
            return None, None
        ours, theirs = self.measured, baseline.measured
        arithmetic = ours.flops / theirs.flops if ours.flops and theirs.flops else None
        return ours.seconds["mean"] / theirs.seconds["mean"], arithmetic


_CASE, (*_FOUND, _) = ([each.name for each in fields(kind)] for kind in (Case, Measured))
# null in rows that were not measured, in this order
_UNMEASURED = (*_FOUND[:-2], *_RATIOS, *_FOUND[-2:])


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row of a record measures."""
    return Case(**{name: row[name] for name in _CASE if name in row})


def read_timing(path: str | Path) -> dict[str, Any]:
    """Read a record of the timing study; one of the first schema says what it lacks.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not such a record, or it is damaged; the message names the place.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no timing record {path}")
    record = read_record(path)
    if isinstance(record.get("rows"), list):
        if record.get("schema") == _BEFORE_BYTES:
            record |= {"schema": SCHEMA, "rows": [_with_bytes(row) for row in record["rows"]]}
        record["rows"] = [_with_modes(row) for row in record["rows"]]
    try:
        return check_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _with_modes(row: Any) -> Any:
    """A row of before there were captured and fused steps in the form of today's."""
    if not isinstance(row, dict):
        return row
    known = {name: row[name] for name in _CASE if name in row}
    return known | dict.fromkeys(("captured", "fused"), False) | row


def _with_bytes(row: Any) -> Any:
    """A row of the first schema in the form of today's."""
    if not isinstance(row, dict):
        return row
    lacks = dict.fromkeys(("bytes", "peaks"), "it was not asked for when this was recorded")
    new = {"plain": False, "originals_only": False, **dict.fromkeys(("bytes", "peaks", "peaks_source"))}
    return {**row, **new} | ({"lacks": row.get("lacks", {}) | lacks} if row.get("status") == "ok" else {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_numbers(value: Any, *others: object) -> bool:
    return isinstance(value, dict) and all(each in others or _is_number(each) for each in value.values())


def _are_reasons(value: Any) -> bool:
    return isinstance(value, dict) and value != {} and all(isinstance(why, str) for why in value.values())


_MEANS = ("mean", "median", "p5", "p95", "min", "max")
_COUNT = ("a positive integer", lambda value: isinstance(value, int) and _is_number(value) and value > 0)
# what the fields of a record must be, by their types
_TESTS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    int: _COUNT,
    int | None: _COUNT,  # null only where `lacks` says why
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
        "null or numbers by name",
        lambda value: value is None or _are_numbers(value),
    ),
    Mapping[str, float | None] | None: (
        "null or numbers by name, some null",
        lambda value: value is None or _are_numbers(value, None),
    ),
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
    if "lacks" in record:
        _expect(_are_reasons(record["lacks"]), "lacks", "reasons by what is missing", record["lacks"])
    rows: Any = record.get("rows")
    _expect(isinstance(rows, list) and rows, "rows", "a list that is not empty", rows)
    found: dict[Case, Row] = {}
    for i, each in enumerate(rows):
        _check_row(each, f"rows[{i}]")
        row = Row.from_dict(each)
        _expect(row.case not in found, f"rows[{i}]", "a case of its own", row.case.label)
        found[row.case] = row
    for case, row in found.items():
        if row.measured is None or "ratio" in row.measured.lacks:
            continue
        expected = row.over(found.get(case.baseline))
        for name, got, value in zip(_RATIOS, (row.ratio, row.flops_ratio), expected, strict=True):
            _expect_kind(got, float | None, f"{name} of {case.label}")
            same = got == value or (value and got and math.isclose(got, value, rel_tol=1e-6))
            _expect(same, f"{name} of {case.label}", f"{value}, as its baseline says", got)
    return record


def _check_row(row: Any, place: str) -> None:
    def expect(name: str, condition: Any, what: str, got: Any = None) -> None:
        _expect(condition, f"{place}.{name}", what, row[name] if got is None else got)

    _expect(isinstance(row, dict), place, "an object", row)
    names = {*_CASE, *_UNMEASURED, "status", "reason"}
    different = sorted(names ^ (row.keys() - {"lacks"}))
    _expect(not different, place, f"an object of the fields {', '.join(sorted(names))}", different)
    for name, known in (("status", STATUSES), ("precision", PRECISIONS)):
        expect(name, row[name] in known, "one of " + ", ".join(known))
    measured = row["status"] == "ok"
    missing = _missing(row, place) if "lacks" in row else set()
    for each in (*fields(Case), *(fields(Measured)[:-1] if measured else ())):
        if each.name not in missing and (each.name, row[each.name]) != ("samples", 0):
            _expect_kind(row[each.name], each.type, f"{place}.{each.name}")
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
    peaks = row["peaks"] or {"flops": 1, "bytes": 1}
    expect("peaks", peaks.keys() == {"flops", "bytes"} and all(peaks.values()), "positive flops and bytes")
    total = sum((row["parts"] or {"all": seconds["mean"]}).values())
    expect("parts", math.isclose(total, seconds["mean"], rel_tol=1e-3), "as long as the mean", total)


def _missing(row: Mapping[str, Any], place: str) -> set[str]:
    """The fields that are null because the row lacks them."""
    lacks, known = row["lacks"], ", ".join(ACCESSORIES)
    right = row["status"] == "ok" and _are_reasons(lacks) and lacks.keys() <= ACCESSORIES.keys()
    _expect(right, f"{place}.lacks", f"why a row that was measured is without some of {known}", lacks)
    missing = {name for accessory in lacks for name in ACCESSORIES[accessory]}
    for name in missing:
        _expect(row[name] is None, f"{place}.{name}", "null where it is lacking", row[name])
    return missing


def _expect_kind(value: Any, kind: Any, place: str) -> None:
    what, test = _TESTS[kind]
    _expect(test(value), place, what, value)


def _expect(condition: Any, place: str, what: str, got: Any) -> None:
    if not condition:
        shown = repr(got)
        shown = shown[:80] + "…" * (len(shown) > 80)
        raise ValueError(f"not a timing record: {place} must be {what}, got {shown}")
