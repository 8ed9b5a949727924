"""Records of single steps under the profiler, kernels by name; free of torch.

They are shorter than those of `salnb time`: of the times there is the median only.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salnb._common.tables import markdown_table
from salnb.results import read_record
from salnb.timing.records import case_of

__all__ = ["PROFILE_SCHEMA", "check_profile", "profile_table", "read_profile"]

PROFILE_SCHEMA = "salnb profile 1"
_SECONDS = ("median_seconds", "host_seconds", "first_step_seconds", "kernel_seconds")
_COUNTS = ("peak_bytes", "launches")


def read_profile(path: str | Path) -> dict[str, Any]:
    """Read a record of profiled steps.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a record; the message names the place.
    """
    record = read_record(path)
    try:
        return check_profile(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_profile(record: Any) -> dict[str, Any]:
    """Raise a ValueError, which names the place, unless this is a whole and consistent record; return it.

    A record has `provenance`, `protocol`, `lacks` (what it does not hold, and why), and `rows`: the fields of
    a `salnb.timing.Case`, the median of a step, what the host took to start it, the first step, the sum of
    its kernels (all in seconds), the peak of memory in bytes (null for a captured one, if it was not seen
    while that was captured), the number of launches, and `kernels`, the dearest first, each as name, seconds
    and launches.
    """
    _expect(isinstance(record, dict) and record.get("schema") == PROFILE_SCHEMA, f"schema {PROFILE_SCHEMA!r}")
    for name in ("provenance", "protocol", "lacks"):
        _expect(isinstance(record.get(name), dict), name)
    for name in ("time", "commit", "versions", "device", "device_name"):
        _expect(record["provenance"].get(name), f"provenance.{name}")
    for name in ("protocol", "lacks"):
        _expect(record[name] and all(isinstance(text, str) for text in record[name].values()), name)
    rows = record.get("rows")
    _expect(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), "rows")
    for i, row in enumerate(rows):
        _expect(isinstance(row.get("network"), str), f"rows[{i}].network")
        odd = [name for name, value in row.items() if isinstance(value, list | dict) and name != "kernels"]
        _expect(not odd, f"a single value of {', '.join(odd)} in rows[{i}]")
    cases = [case_of(row) for row in rows]
    _expect(cases and len(set(cases)) == len(cases), "rows, each of a case of its own")
    for case, row in zip(cases, record["rows"], strict=True):
        _expect(case.baseline in cases, f"the baseline of {case.label}")
        unseen = ["peak_bytes"] if case.captured and row.get("peak_bytes", 0) is None else []
        for name in sorted({*_SECONDS, *_COUNTS}.difference(unseen)):
            kind = float if name in _SECONDS else int
            _expect(type(row.get(name)) is kind and 0 < row[name] < math.inf, f"{name} of {case.label}")
        kernels = row.get("kernels")
        _expect(isinstance(kernels, list) and all(map(_is_kernel, kernels)), f"kernels of {case.label}")
        spent = [seconds for _, seconds, _ in kernels]
        ordered = spent == sorted(spent, reverse=True) and sum(spent) <= row["kernel_seconds"] * 1.001
        _expect(spent and ordered, f"kernels of {case.label}, the dearest first")
    return record


def _is_kernel(entry: Any) -> bool:
    """Whether this is name, seconds and launches."""
    kinds = (str, float, int)
    return isinstance(entry, list) and len(entry) == 3 and all(map(isinstance, entry, kinds))


def _expect(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"not a record of profiled steps: there must be {what}")


def profile_table(record: Mapping[str, Any]) -> str:
    """Each step with saliency beside its baseline, as a Markdown table: times in ms, launches, memory."""
    rows = {case_of(row): row for row in record["rows"]}
    cells = []
    for case, row in rows.items():
        if case.method is not None:
            base = rows[case.baseline]
            words = [case.arithmetic, case.mode, *["fused"] * case.fused]
            kind = " ".join(words + ["channels_last"] * case.channels_last)
            memory = [each["peak_bytes"] for each in (row, base)]
            cells.append(
                [
                    f"{case.network}, {kind}",
                    *(f"{1000 * each['median_seconds']:.1f}" for each in (base, row)),
                    f"{row['median_seconds'] / base['median_seconds']:.2f}",
                    *(f"{1000 * each['kernel_seconds']:.1f}" for each in (base, row)),
                    *(str(each["launches"]) for each in (base, row)),
                    "–" if None in memory else f"{memory[0] / memory[1]:.2f}",
                ]
            )
    header = ["step", "base ms", "saliency ms", "ratio"]
    header += ["base kernels", "saliency kernels", "base launches", "saliency launches", "memory"]
    return markdown_table(header, cells, rule="---")
