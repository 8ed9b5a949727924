"""Records in words: a row, two records side by side, and the tables of chapter 15; free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from salnb._common.tables import markdown_table
from salnb.timing.cases import PAPER, Case
from salnb.timing.records import case_of

__all__ = [
    "batches_of",
    "compare",
    "describe",
    "describe_record",
    "memory_table",
    "method_label",
    "method_rows",
    "method_table",
    "mode_table",
    "pair",
    "pairs",
    "paper_table",
    "part_table",
    "ratio_series",
    "roofline",
    "roofline_table",
    "rows_of",
    "unfinished_batches",
]

Record = Mapping[str, Any]
TimingRow = Mapping[str, Any]
Pair = tuple[TimingRow, TimingRow]

METHOD = "vanilla_gradient"


def describe(row: TimingRow) -> str:
    """A row of a record in a line."""
    label = case_of(row).label
    if row["status"] != "ok":
        return f"{label}: {row['status']} ({row['reason']})"
    mean, low, high = (1000 * row["seconds"][name] for name in ("mean", "p5", "p95"))
    words = [f"{label}: {mean:.2f} ms ({low:.2f} to {high:.2f})"]
    words += [f"{row['peak_bytes'] / 2**20:.0f} MiB"] if row["peak_bytes"] else []
    words += [f"{row['ratio']:.2f} times the baseline"] if row["ratio"] else []
    words += [f"{row['flops_ratio']:.2f} its arithmetic"] if row["flops_ratio"] else []
    if limit := roofline(row):
        words += [f"{row['seconds']['mean'] / limit[0]:.2f} times its roofline ({limit[1]})"]
    return ", ".join(words + [f"without {name} ({why})" for name, why in row.get("lacks", {}).items()])


def roofline(row: TimingRow) -> tuple[float, str] | None:
    """The least seconds that a row's work can take, and what needs them: "arithmetic" or "memory".

    The larger of operations over the device's peak and bytes over its bandwidth; None where one of these is
    not known. The bytes are those of the eager step's operators, of which fused kernels move fewer.
    """
    needed = _needed(row)
    return max((seconds, name) for name, seconds in needed.items()) if needed else None


def _needed(row: TimingRow) -> dict[str, float]:
    if None in (row["flops"], row["bytes"], row["peaks"]):
        return {}
    peaks = row["peaks"]
    return {
        "arithmetic": row["flops"] / peaks["flops"],
        "memory": sum(row["bytes"].values()) / peaks["bytes"],
    }


def compare(first: Record, second: Record) -> str:
    """Two records side by side, as a Markdown table of the rows that either of them measured.

    Rows belong together where all but the batch and the size of the images agree and the batches are the
    same multiple of the record's usual batch.
    """
    lines, keyed = [], []
    for letter, record in zip("AB", (first, second), strict=True):
        origin, protocol = record["provenance"], record["protocol"]
        batch, size = protocol["batch"], protocol["size"]
        lines.append(
            f"{letter}: {origin['device_name']}, torch {origin['versions']['torch']}, {origin['time']}, "
            f"batches of {batch}+{batch} at {size}×{size}, {protocol['iterations']} iterations"
        )
        keyed.append({_key(case_of(row), batch): row for row in record["rows"]})
    cells = []
    for case, batches in dict.fromkeys([*keyed[0], *keyed[1]]):
        rows = [rows.get((case, batches), {}) for rows in keyed]
        if "ok" in (row.get("status") for row in rows):
            label = case.label.replace(", 0+0", "") + (f", {batches} × the batch" if batches != 1 else "")
            cells.append([label, *_cells(*rows)])
    header = ["step", "A ms", "B ms", "A / B", "ratio A", "ratio B", "arithmetic"]
    return "\n\n".join([*lines, markdown_table(header, cells, rule="---")])


def _key(case: Case, usual_batch: int) -> tuple[Case, Fraction]:
    return replace(case, batch=0, size=0, samples=0), Fraction(case.batch, usual_batch)


def _cells(a: TimingRow, b: TimingRow) -> list[str]:
    times = [1000 * row["seconds"]["mean"] if row.get("seconds") else None for row in (a, b)]
    states = [time or row.get("status") for time, row in zip(times, (a, b), strict=True)]
    speedup = times[0] / times[1] if times[0] and times[1] else None
    found = [*states, speedup, a.get("ratio"), b.get("ratio"), a.get("flops_ratio") or b.get("flops_ratio")]
    return [f"{value:.2f}" if isinstance(value, float) else value or "–" for value in found]


def rows_of(record: Record, **wanted: Any) -> list[TimingRow]:
    """The measured rows of a record in which the fields of the case have the given values.

    Those that are not given are as in the paper: a saliency loss in every step, fp32, eager, the usual
    layout, the record's usual batch.
    """
    usual = {"status": "ok", "every": 1, "compiled": False, "precision": "32"}
    return _matching(record, **usual | {"batch": record["protocol"]["batch"]} | wanted)


def _matching(record: Record, **wanted: Any) -> list[TimingRow]:
    others = ("captured", "channels_last", "plain", "originals_only", "fused")
    wanted = dict.fromkeys(others, False) | wanted
    return [row for row in record["rows"] if wanted.items() <= row.items()]


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
    rows = _by_mode(record)
    return {mode: {network: row["ratio"] for network, row in found.items()} for mode, found in rows.items()}


def mode_table(record: Record) -> str:
    """Milliseconds of each network's step with saliency, and how many baselines these are, by mode.

    A Markdown table with a column for each precision, mode and memory format; a baseline is of the same.
    """
    rows = _by_mode(record)
    rows |= {f"{mode}, channels_last": found for mode, found in _by_mode(record, channels_last=True).items()}
    lines = []
    for network in dict.fromkeys(network for found in rows.values() for network in found):
        each = [found.get(network) for found in rows.values()]
        cells = (
            f"{1000 * row['seconds']['mean']:.1f} ms, {row['ratio']:.2f}" if row else "–" for row in each
        )
        lines.append([network, *cells])
    return markdown_table(["step", *rows], lines, rule="---")


def _by_mode(record: Record, **wanted: Any) -> dict[str, dict[str, TimingRow]]:
    """The steps with saliency that have a ratio, by precision and mode, then by network."""
    found: dict[str, dict[str, TimingRow]] = {}
    wanted |= {"method": METHOD, "every": 1, "batch": record["protocol"]["batch"]}
    for row in [row for captured in (False, True) for row in _matching(record, **wanted, captured=captured)]:
        if row["ratio"]:
            case = case_of(row)
            found.setdefault(f"{case.arithmetic} {case.mode}", {})[row["network"]] = row
    return found


def batches_of(record: Record) -> tuple[str, dict[int, dict[str | None, TimingRow]]]:
    """The network with most sizes of batches; its rows by originals in a batch, then by method or None.

    Rows that had no turn are left out.

    Raises:
        ValueError: the record has no eager row of a baseline or of the plain gradient.
    """
    found: dict[tuple[str, str], dict[int, dict[str | None, TimingRow]]] = {}
    for row in _matching(record, every=1, compiled=False):
        if row["method"] in (None, METHOD) and row["status"] != "not run":
            sizes = found.setdefault((row["network"], row["precision"]), {})
            sizes.setdefault(row["batch"], {})[row["method"]] = row
    if not found:
        raise ValueError(f"record must hold eager rows of the baseline or of {METHOD}, got none")
    (network, _), sizes = max(found.items(), key=lambda item: len(item[1]))
    return network, dict(sorted(sizes.items()))


def unfinished_batches(records: Mapping[str, Record]) -> list[str]:
    """A line for each row of `batches_of` without a time, such as one whose batch was too large."""
    lines = []
    for name, record in records.items():
        network, batches = batches_of(record)
        states = ((size, row["status"]) for size, found in batches.items() for row in found.values())
        lines += [f"{name}, {network}, {size}+{size}: {state}" for size, state in states if state != "ok"]
    return lines


def method_rows(record: Record) -> list[TimingRow]:
    """Rows of the network whose methods were compared: less than every step first, then method by method."""
    network = next(row["network"] for row in record["rows"] if row["method"] == "grad_cam")
    found = _matching(record, network=network, compiled=False, batch=record["protocol"]["batch"])
    return sorted((row for row in found if row["ratio"]), key=lambda row: row["every"] == 1)


def method_label(row: TimingRow) -> str:
    """What sets one of `method_rows` apart: how often, or by which method."""
    if row["every"] > 1:
        return f"every {row['every']}th step"
    return row["method"].replace("_", " ") + (f", {row['samples']} copies" if row["samples"] else "")


def describe_record(name: str, record: Record) -> str:
    """A record in eight lines: on what it was measured, how, and how much of it there is."""
    origin, protocol, rows = record["provenance"], record["protocol"], record["rows"]
    batch, size = protocol["batch"], protocol["size"]
    told = {
        "device": origin["device_name"],
        "processor": record["facts"]["processor"],
        "driver": record["facts"]["driver"],
        "torch": origin["versions"]["torch"],
        "batch": f"{batch} + {batch} images of {size}×{size}",
        "iterations": f"{protocol['iterations']}, the second half counts",
        "rows": f"{sum(row['status'] == 'ok' for row in rows)} measured of {len(rows)}",
    }
    return "\n".join([f"record {name!r}", *(f"  {key:11} {value}" for key, value in told.items())])


def paper_table(records: Mapping[str, Record]) -> str:
    """The paper's Table 4, and below each network what the records say of it."""

    def times(network: str, base: float, salient: float) -> str:
        return f"{network:12} {base:9.1f} ms {salient:11.1f} ms {salient / base:7.2f}"

    lines = ["                 baseline  with saliency   ratio   arithmetic"]
    for network, paper in PAPER.items():
        lines.append(times(network, *paper) + "            the paper")
        for name, record in records.items():
            if found := pair(record, network):
                a, b = (1000 * row["seconds"]["mean"] for row in found)
                lines.append(f"{times('', a, b)} {_number(found[1]['flops_ratio']):>9}  {name}")
            else:
                lines.append(f"{'':12} {'not measured':>45}      {name}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


_BESIDE: dict[str, dict[str, Any]] = {
    "baseline, originals only": {"method": None, "originals_only": True},
    "baseline": {"method": None},
    "with saliency": {"method": METHOD},
    "with saliency, plain PyTorch": {"method": METHOD, "plain": True},
    "with saliency, fused": {"method": METHOD, "fused": True},
}


def roofline_table(record: Record, **wanted: Any) -> str:
    """What steps need for their arithmetic and for their memory, and what they take, as a Markdown table.

    Beside the pair of each network stand a baseline that sees the originals only and a step with PyTorch's
    own second derivatives, where they were measured. Times are in ms; `rows_of` says what can be wanted.
    """
    lines = []
    for network in dict.fromkeys(row["network"] for row in record["rows"]):
        rows = {name: rows_of(record, network=network, **kind | wanted) for name, kind in _BESIDE.items()}
        known = {name: found[0] for name, found in rows.items() if found}
        bases = [known[name]["seconds"]["mean"] if name in known else None for name in list(_BESIDE)[:2]]
        for name, row in known.items():
            mean, needed = row["seconds"]["mean"], _needed(row)
            times = [needed.get(what) for what in ("arithmetic", "memory")]
            cells = [time and 1000 * time for time in (mean, *times)]
            cells += [mean / max(needed.values()) if needed else None]
            cells += [base and mean / base for base in bases]
            lines.append([f"{network}, {name}", *map(_number, cells)])
    header = [
        "step",
        "measured",
        "arithmetic",
        "memory",
        "over the larger",
        "over originals",
        "over baseline",
    ]
    return markdown_table(header, lines, rule="---")


def part_table(found: Mapping[str, Pair]) -> str:
    """Shares of the parts of steps with saliency, and what convolutions reach of the peak; see `pairs`."""
    lines = ["share of the step with saliency     forward  input gradient     loss  backward"]
    peaks = []
    for network, (_, row) in found.items():
        widths = {"forward": 8, "input gradient": 15, "loss": 8, "backward": 9}
        parts, mean = row["parts"], row["seconds"]["mean"]
        shares = (f"{parts[part] / mean:.0%}" if parts else "–" for part in widths)
        cells = (f"{share:>{width}}" for share, width in zip(shares, widths.values(), strict=True))
        lines.append(" ".join([f"{network:34}", *cells]))
        if row["peak_share"] is not None:
            peaks.append(f"{network}: convolutions reach {row['peak_share']:.0%} of the peak")
    return "\n".join(lines + peaks)


def memory_table(found: Mapping[str, Pair]) -> str:
    """How much more memory the step with saliency takes, beyond what is held anyway; see `pairs`."""
    lines = []
    for network, rows in found.items():
        a, b = ((row["peak_bytes"] or 0) - (row["held_bytes"] or 0) for row in rows)
        known = all(row["peak_bytes"] and row["held_bytes"] for row in rows)
        times = f"{b / a:.1f}" if known else "–"
        lines.append(f"{network:12} {times} times the memory beyond parameters and batch")
    return "\n".join(lines)


def method_table(rows: Sequence[TimingRow]) -> str:
    """What each of `method_rows` costs, and its arithmetic, in units of the baseline."""
    return "\n".join(
        f"{method_label(row):22} {row['ratio']:6.2f} measured {_number(row['flops_ratio']):>6} arithmetic"
        for row in rows
    )
