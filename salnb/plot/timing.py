"""Figures of running times; records are what `salnb.timing.read_timing` gives, by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from salnb.plot.style import INK
from salnb.timing.cases import PAPER
from salnb.timing.profiler import KINDS
from salnb.timing.tables import METHOD, Pair, Record, TimingRow, batches_of, method_label, ratio_series

__all__ = ["show_batches", "show_memory", "show_method_costs", "show_parts", "show_ratios"]

_PARTS = ("forward", "input gradient", "loss", "backward", "other")
_SHADES = plt.get_cmap("cividis")(np.linspace(0.05, 0.95, 5))
_ARITHMETIC: dict[str, Any] = {"color": INK, "lw": 1, "ls": "--"}


def show_ratios(records: Mapping[str, Record]) -> Figure:
    """Time with saliency over that of the baseline by network, in the paper's Table 4 and in each record."""
    fig, ax = plt.subplots(figsize=(5, 4.4), layout="constrained")
    paper = [salient / base for base, salient in PAPER.values()]
    ax.plot(list(PAPER), paper, "s", color="C3", label="the paper, RTX 2080 Ti")
    lowest = 1.8
    for i, (name, record) in enumerate(records.items()):
        for j, (label, ratios) in enumerate(ratio_series(record).items()):
            colour, marker = f"C{(0, 2, 4, 5, 6, 8)[i % 6]}", "ovD^Pv"[j % 6]
            ax.plot(list(ratios), list(ratios.values()), marker, color=colour, label=f"{name}, {label}")
            lowest = min(lowest, *ratios.values())
    ax.axhline(2, label="arithmetic, 2.0", **_ARITHMETIC)
    ax.set(yscale="log", ylim=(0.9 * lowest, 12), ylabel="with saliency / baseline")
    ax.yaxis.set(
        ticks=[2, 3, 4, 6, 8, 10], major_formatter=ScalarFormatter(), minor_formatter=NullFormatter()
    )
    ax.tick_params(axis="x", labelrotation=25)
    fig.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return fig


def show_parts(pairs: Mapping[str, Pair]) -> Figure:
    """The time of a step by its parts and by the kind of its operations, in units of the baseline step.

    Of each two bars the right one is the step with saliency; see `salnb.timing.tables.pairs`.
    """
    fig, axes = plt.subplots(2, 1, figsize=(5, 7.4), layout="constrained")
    named = (("parts", _PARTS, _SHADES), ("kinds", KINDS, _SHADES[[0, 2, 3, 4]]))
    for ax, (field, names, colours) in zip(axes, named, strict=True):
        known = {network: both for network, both in pairs.items() if all(row[field] for row in both)}
        x, rows = _bars_of(known)
        units = np.repeat([sum(base[field].values()) for base, _ in known.values()], 2)
        height = np.zeros(len(rows))
        for name, colour in zip(names, colours, strict=True):
            shares = np.array([row[field].get(name, 0.0) for row in rows]) / units
            ax.bar(x, shares, 0.36, height, color=colour, label=name)
            height += shares
        ax.set_xticks(range(len(known)), list(known), rotation=25)
        ax.legend(fontsize="small", ncols=2, loc="upper left", frameon=False)
        ax.set_ylim(0, 1.45 * ax.get_ylim()[1])
    axes[0].set_title("part of the step", fontsize="medium")
    axes[1].set_title("kind of operation", fontsize="medium")
    fig.supylabel("time / time of the baseline step", fontsize="medium")
    return fig


def _bars_of(pairs: Mapping[str, Pair]) -> tuple[np.ndarray, list[TimingRow]]:
    """Two bars for each network: where they stand, and their rows."""
    rows = [row for both in pairs.values() for row in both]
    return np.repeat(np.arange(len(pairs)), 2) + np.tile([-0.2, 0.2], len(pairs)), rows


def _numbers(rows: Sequence[TimingRow], field: str) -> np.ndarray:
    return np.array(
        [row[field] for row in rows], float
    )  # NaN, which nothing is drawn for, where it is lacking


def show_memory(pairs: Mapping[str, Pair]) -> Figure:
    """The most memory in use during a step, and a line at what is there before it; see `show_parts`."""
    fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    x, rows = _bars_of(pairs)
    peaks, held = (_numbers(rows, name) / 2**20 for name in ("peak_bytes", "held_bytes"))
    ax.plot([x - 0.18, x + 0.18], [held, held], color="C3", lw=2)
    ax.plot([], [], color="C3", lw=2, label="parameters, buffers, batch")
    labels = ["baseline", "with saliency", *["_"] * (len(rows) - 2)]
    ax.bar(x, peaks, 0.36, color=np.tile(_SHADES[[3, 0]], (len(pairs), 1)), label=labels[: len(rows)])
    ax.set_xticks(range(len(pairs)), list(pairs), rotation=25)
    ax.set(ylabel="MiB")
    fig.legend(fontsize="small", ncols=3, frameon=False, loc="outside upper center", columnspacing=1.2)
    return fig


def show_batches(records: Mapping[str, Record]) -> Figure:
    """Milliseconds per image, and the ratio, over the batch size; of each record one network.

    Raises:
        ValueError: there is no record, or one in which no step was measured.
    """
    if not records:
        raise ValueError("records must hold at least one, got none")
    fig, axes = plt.subplots(2, 1, figsize=(5, 6), sharex=True, layout="constrained")
    for i, (name, record) in enumerate(records.items()):
        network, batches = batches_of(record)
        if not any(row["status"] == "ok" for found in batches.values() for row in found.values()):
            raise ValueError(f"records[{name!r}] must hold a step that was measured, got none of {network}")
        for method, style, what in ((None, "o--", "baseline"), (METHOD, "o-", "with saliency")):
            found = [of_size[method] for of_size in batches.values() if method in of_size]
            rows = [row for row in found if row["status"] == "ok"]
            n = [row["batch"] for row in rows]
            # originals and augmented images: two for each
            per_image = [500 * row["seconds"]["mean"] / row["batch"] for row in rows]
            axes[0].plot(n, per_image, style, color=f"C{i}", label=f"{name}, {network}, {what}")
        axes[1].plot(n, _numbers(rows, "ratio"), "o-", color=f"C{i}")
    axes[1].axhline(2, **_ARITHMETIC)
    for ax, label in zip(axes, ("milliseconds per image", "with saliency / baseline"), strict=True):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set_ylabel(label)
    axes[1].set_xlabel("originals in a batch")
    axes[0].set_ylim(0, None)
    axes[0].legend(fontsize="small")
    return fig


def show_method_costs(rows: Sequence[TimingRow]) -> Figure:
    """What each of `salnb.timing.tables.method_rows` costs in units of the baseline, and its arithmetic.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows must hold at least one, got none")
    fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    labels, ratios, limits = map(method_label, rows), _numbers(rows, "ratio"), _numbers(rows, "flops_ratio")
    ax.barh(range(len(rows)), ratios, 0.6, color=_SHADES[1], label="measured")
    ax.plot(limits, range(len(rows)), "|", color="C3", ms=16, mew=2.5, label="arithmetic")
    ax.set_yticks(range(len(rows)), labels)
    ax.invert_yaxis()
    xlim = 0.8 * np.nanmin([1, *limits, *ratios]), 1.2 * np.nanmax([*limits, *ratios])
    ax.set(xscale="log", xlabel=f"time of a step / baseline, {rows[0]['network']}", xlim=xlim)
    ticks = [x for x in (1, 1.5, 2, 3, 5, 10, 20, 50) if x < xlim[1]]
    ax.xaxis.set(ticks=ticks, major_formatter=ScalarFormatter(), minor_formatter=NullFormatter())
    ax.legend(fontsize="small")
    return fig
