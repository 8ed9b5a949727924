"""Records of the timing study: what they must hold, and two of them side by side; free of torch."""

import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from salnb.results import read_record
from salnb.timing.cases import PRECISIONS, Case

SCHEMA = "salnb timing 1"
STATUSES = ("ok", "out of memory", "failed", "not run", "not available")

# Table 4 of the paper: milliseconds of an iteration on an RTX 2080 Ti, without and with the saliency loss
PAPER = {
    "vgg16": (152.23, 1176.71),
    "vgg19": (163.73, 1194.62),
    "resnet50": (307.57, 2156.14),
    "densenet121": (312.52, 2685.33),
    "densenet169": (406.54, 3789.62),
}

CASE_FIELDS = tuple(Case.__dataclass_fields__)
_SECONDS = ("mean", "median", "p5", "p95", "min", "max")
# filled in for rows that were measured; null otherwise
MEASURED = (
    *("iterations", "averaged", "seconds", "parts", "kinds", "first_step_seconds", "held_bytes"),
    *("peak_bytes", "flops", "convolution_flops", "peak_share", "ratio", "flops_ratio", "clocks_mhz", "time"),
)


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row measures."""
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
        _expect(_is_count(value) and value > 0, f"protocol.{name}", "a positive integer", value)
    for name in ("budget_seconds", "spent_seconds"):
        value = record["protocol"].get(name)
        _expect(_is_positive(value) or value == 0, f"protocol.{name}", "a number of seconds", value)
    rows = record.get("rows")
    _expect(isinstance(rows, list) and rows, "rows", "a list that is not empty", rows)
    cases: dict[Case, dict] = {}
    for i, row in enumerate(rows or []):
        _check_row(row, f"rows[{i}]")
        case = case_of(row)
        _expect(case not in cases, f"rows[{i}]", "a case of its own", case.label)
        cases[case] = row
    for case, row in cases.items():
        _check_ratio(case, row, cases.get(case.baseline))
    return record


def _check_row(row: Any, place: str) -> None:
    _expect(isinstance(row, dict), place, "an object", row)
    names = {*CASE_FIELDS, *MEASURED, "status", "reason"}
    different = sorted(names ^ row.keys())
    _expect(not different, place, f"an object of the fields {', '.join(sorted(names))}", different)
    for name, known in (("status", STATUSES), ("precision", PRECISIONS)):
        _expect(row[name] in known, f"{place}.{name}", "one of " + ", ".join(known), row[name])
    for name in ("every", "batch", "size"):
        _expect(_is_count(row[name]) and row[name] > 0, f"{place}.{name}", "a positive integer", row[name])
    measured = row["status"] == "ok"
    _expect(
        (row["reason"] is None) == measured,
        f"{place}.reason",
        "a text unless the status is ok",
        row["reason"],
    )
    if not measured:
        for name in MEASURED:
            _expect(row[name] is None, f"{place}.{name}", "null where nothing was measured", row[name])
        return
    for name in ("iterations", "averaged", "held_bytes", "peak_bytes", "flops", "convolution_flops"):
        value = row[name]
        _expect(_is_count(value) and value > 0, f"{place}.{name}", "a positive integer", value)
    _expect(
        2 * row["averaged"] <= row["iterations"],
        f"{place}.averaged",
        "at most half of the iterations",
        row["averaged"],
    )
    seconds = row["seconds"]
    _expect(
        isinstance(seconds, dict)
        and set(seconds) == set(_SECONDS)
        and all(map(_is_positive, seconds.values())),
        f"{place}.seconds",
        f"positive numbers {', '.join(_SECONDS)}",
        seconds,
    )
    ordered = [seconds[name] for name in ("min", "p5", "median", "p95", "max")]
    inside = seconds["min"] <= seconds["mean"] * (1 + 1e-9) and seconds["mean"] <= seconds["max"] * (1 + 1e-9)
    _expect(ordered == sorted(ordered) and inside, f"{place}.seconds", "in order", seconds)
    for name in ("parts", "kinds"):
        value = row[name]
        good = value is None or (
            isinstance(value, dict) and all(_is_positive(v) or v == 0 for v in value.values())
        )
        _expect(good, f"{place}.{name}", "null or seconds by name", value)
    if row["parts"]:
        total = sum(row["parts"].values())
        _expect(
            math.isclose(total, seconds["mean"], rel_tol=1e-3), f"{place}.parts", "as long as the mean", total
        )


def _check_ratio(case: Case, row: dict, baseline: dict | None) -> None:
    if row["status"] != "ok":
        return
    expected = ratios(row, baseline) if case.method else (None, None)
    for name, value in zip(("ratio", "flops_ratio"), expected, strict=True):
        same = row[name] == value or (value and row[name] and math.isclose(row[name], value, rel_tol=1e-6))
        _expect(bool(same), f"{name} of {case.label}", f"{value}, as its baseline says", row[name])


def ratios(row: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """Time and arithmetic of a row over those of its baseline, where that was measured."""
    if baseline is None or baseline["status"] != "ok":
        return None, None
    return row["seconds"]["mean"] / baseline["seconds"]["mean"], row["flops"] / baseline["flops"]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _expect(condition: Any, place: str, what: str, got: Any) -> None:
    if not condition:
        shown = repr(got)
        raise ValueError(
            f"not a timing record: {place} must be {what}, got {shown[:80]}{'…' * (len(shown) > 80)}"
        )


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
    keyed = [{_key(row, record): row for row in record["rows"]} for record in (first, second)]
    lines += ["", "| step | A ms | B ms | A / B | ratio A | ratio B | arithmetic |", "|---" * 7 + "|"]
    for key in dict.fromkeys([*keyed[0], *keyed[1]]):
        a, b = (rows.get(key) for rows in keyed)
        if any(row is not None and row["status"] == "ok" for row in (a, b)):
            lines.append("| " + " | ".join([_key_label(key), *_cells(a, b)]) + " |")
    return "\n".join(lines)


def _key(row: Mapping[str, Any], record: Mapping[str, Any]) -> tuple:
    batches = Fraction(row["batch"], record["protocol"]["batch"])
    return (*(row[name] for name in CASE_FIELDS if name not in ("batch", "size", "samples")), batches)


def _key_label(key: tuple) -> str:
    network, method, every, precision, compiled, channels_last, batches = key
    case = Case(network, method, every, precision, compiled, channels_last, batch=0)
    size = f", {batches} × the batch" if batches != 1 else ""
    return case.label.replace(", 0+0", "") + size


def _cells(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[str]:
    def of(row: Mapping[str, Any] | None, name: str) -> float | None:
        if row is None or row["status"] != "ok":
            return None
        return row["seconds"]["mean"] if name == "seconds" else row[name]

    def shown(value: float | None, row: Mapping[str, Any] | None = None, factor: float = 1) -> str:
        if value is None:
            return "–" if row is None or row["status"] == "ok" else row["status"]
        return f"{factor * value:.2f}"

    times = [of(row, "seconds") for row in (a, b)]
    speedup = times[0] / times[1] if times[0] and times[1] else None
    limits = [of(row, "flops_ratio") for row in (a, b)]
    return [
        *(shown(time, row, 1000) for time, row in zip(times, (a, b), strict=True)),
        shown(speedup),
        *(shown(of(row, "ratio")) for row in (a, b)),
        shown(limits[0] or limits[1]),
    ]
