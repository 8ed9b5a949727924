"""What chapter 15 reads from records: rows that belong together, and tables of them in plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from salnb.timing.cases import PAPER
from salnb.timing.records import case_of

__all__ = [
    "batches_of",
    "describe_record",
    "memory_table",
    "method_label",
    "method_rows",
    "method_table",
    "pair",
    "pairs",
    "paper_table",
    "part_table",
    "ratio_series",
    "rows_of",
    "unfinished_batches",
]

Record = Mapping[str, Any]
TimingRow = dict[str, Any]
Pair = tuple[TimingRow, TimingRow]

METHOD = "vanilla_gradient"


def rows_of(record: Record, **wanted: Any) -> list[TimingRow]:
    """The measured rows of a record in which the fields of the case have the given values.

    Args:
        record: see `read_timing`.
        wanted: fields of `Case`; those that are not given are as in the paper: a saliency loss in every step,
            fp32, eager, the usual layout, the record's usual batch.
    """
    usual = {"every": 1, "compiled": False, "channels_last": False, "precision": "32"}
    usual |= {"batch": record["protocol"]["batch"]} | wanted
    return _matching(record["rows"], status="ok", **usual)


def _matching(rows: Sequence[TimingRow], **wanted: Any) -> list[TimingRow]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def pair(record: Record, network: str, **wanted: Any) -> Pair | None:
    """A network's baseline and its step with saliency; None where one was not measured. See `rows_of`."""
    base, salient = (rows_of(record, network=network, method=method, **wanted) for method in (None, METHOD))
    return (base[0], salient[0]) if base and salient else None


def pairs(record: Record) -> dict[str, Pair]:
    """The `pair` of each network that has one, by its name."""
    found = {row["network"]: pair(record, row["network"]) for row in record["rows"]}
    return {network: rows for network, rows in found.items() if rows}


def ratio_series(record: Record) -> dict[str, dict[str, float]]:
    """For each precision and mode, such as "fp32 eager", the ratios of the networks."""
    found: dict[str, dict[str, float]] = {}
    batch = record["protocol"]["batch"]
    for row in _matching(record["rows"], method=METHOD, every=1, channels_last=False, batch=batch):
        if row["ratio"]:
            precision = {"32": "fp32"}.get(row["precision"], row["precision"])
            series = found.setdefault(f"{precision} {case_of(row).mode}", {})
            series[row["network"]] = row["ratio"]
    return found


def batches_of(record: Record) -> tuple[str, dict[int, dict[str | None, TimingRow]]]:
    """The network with most sizes of batches; its rows by originals in a batch, then by method or None."""
    found: dict[tuple[str, str], dict[int, dict[str | None, TimingRow]]] = {}
    for row in _matching(record["rows"], every=1, compiled=False, channels_last=False):
        if row["method"] in (None, METHOD):
            sizes = found.setdefault((row["network"], row["precision"]), {})
            sizes.setdefault(row["batch"], {})[row["method"]] = row
    (network, _), sizes = max(found.items(), key=lambda item: len(item[1]))
    return network, dict(sorted(sizes.items()))


def unfinished_batches(records: Mapping[str, Record]) -> list[str]:
    """A line for each row of `batches_of` without a time, such as one whose batch was too large."""
    lines = []
    for name, record in records.items():
        network, batches = batches_of(record)
        for size, found in batches.items():
            states = [row["status"] for row in found.values() if row["status"] != "ok"]
            lines += [f"{name}, {network}, {size}+{size}: {status}" for status in states]
    return lines


def method_rows(record: Record) -> list[TimingRow]:
    """Rows of the network whose methods were compared: less than every step first, then method by method."""
    network = next(row["network"] for row in record["rows"] if row["method"] == "grad_cam")
    wanted = {"network": network, "batch": record["protocol"]["batch"]}
    found = _matching(record["rows"], compiled=False, channels_last=False, **wanted)
    return sorted((row for row in found if row["ratio"]), key=lambda row: row["every"] == 1)


def method_label(row: TimingRow) -> str:
    """What sets one of `method_rows` apart: how often, or by which method."""
    if row["every"] > 1:
        return f"every {row['every']}th step"
    return row["method"].replace("_", " ") + (f", {row['samples']} copies" if row["samples"] else "")


def describe_record(name: str, record: Record) -> str:
    """A record in eight lines: on what it was measured, how, and how much of it there is."""
    protocol, rows = record["protocol"], record["rows"]
    batch, size = protocol["batch"], protocol["size"]
    told = {
        "device": record["provenance"]["device_name"],
        "processor": record["facts"]["processor"],
        "driver": record["facts"]["driver"],
        "torch": record["provenance"]["versions"]["torch"],
        "batch": f"{batch} + {batch} images of {size}×{size}",
        "iterations": f"{protocol['iterations']}, the second half counts",
        "rows": f"{sum(row['status'] == 'ok' for row in rows)} measured of {len(rows)}",
    }
    return "\n".join([f"record {name!r}", *(f"  {key:11} {value}" for key, value in told.items())])


def paper_table(records: Mapping[str, Record]) -> str:
    """The paper's Table 4, and below each network what the records say of it."""
    lines = ["                 baseline  with saliency   ratio   arithmetic"]
    for network, (base, salient) in PAPER.items():
        lines.append(_times(network, base, salient) + "            the paper")
        for name, record in records.items():
            found = pair(record, network)
            if found is None:
                lines.append(f"{'':12} {'not measured':>45}      {name}")
            else:
                a, b = (1000 * row["seconds"]["mean"] for row in found)
                lines.append(f"{_times('', a, b)} {found[1]['flops_ratio']:9.2f}  {name}")
    return "\n".join(lines)


def _times(network: str, base: float, salient: float) -> str:
    return f"{network:12} {base:9.1f} ms {salient:11.1f} ms {salient / base:7.2f}"


def part_table(found: Mapping[str, Pair]) -> str:
    """Shares of the parts of each network's step with saliency, and what convolutions reach of the peak.

    Args:
        found: see `pairs`.
    """
    lines = ["share of the step with saliency     forward  input gradient     loss  backward"]
    widths = {"forward": 8, "input gradient": 15, "loss": 8, "backward": 9}
    for network, (_, row) in found.items():
        mean = row["seconds"]["mean"]
        shares = (f"{row['parts'][part] / mean:{width}.0%}" for part, width in widths.items())
        lines.append(" ".join([f"{network:34}", *shares]))
    for network, (_, row) in found.items():
        if row["peak_share"] is not None:
            lines.append(f"{network}: convolutions reach {row['peak_share']:.0%} of the peak")
    return "\n".join(lines)


def memory_table(found: Mapping[str, Pair]) -> str:
    """How much more memory the step with saliency takes, beyond what is held anyway; see `pairs`."""
    lines = []
    for network, rows in found.items():
        a, b = (row["peak_bytes"] - row["held_bytes"] for row in rows)
        lines.append(f"{network:12} {b / a:.1f} times the memory beyond parameters and batch")
    return "\n".join(lines)


def method_table(rows: Sequence[TimingRow]) -> str:
    """What each of `method_rows` costs, and its arithmetic, in units of the baseline."""
    return "\n".join(
        f"{method_label(row):22} {row['ratio']:6.2f} measured {row['flops_ratio']:6.2f} arithmetic"
        for row in rows
    )
