"""Figures of running times; records are what `salnb.timing.read_timing` gives, by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
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
    fig, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    paper = [salient / base for base, salient in PAPER.values()]
    ax.plot(list(PAPER), paper, "s", color="C3", label="the paper, RTX 2080 Ti")
    lowest = 1.8
    for i, (name, record) in enumerate(records.items()):
        for j, (label, ratios) in enumerate(ratio_series(record).items()):
            colour, marker = f"C{(0, 2, 4, 5, 6, 8)[i % 6]}", "ovD^Pv"[j % 6]
            x, y = list(ratios), list(ratios.values())
            ax.plot(x, y, marker, color=colour, label=f"{name}, {label}")
            lowest = min(lowest, *ratios.values())
    ax.axhline(2, label="arithmetic, 2.0", **_ARITHMETIC)
    ax.set(yscale="log", ylim=(0.9 * lowest, 12), ylabel="with saliency / baseline")
    ax.set_yticks([2, 3, 4, 6, 8, 10])
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelrotation=20)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return fig


def show_parts(pairs: Mapping[str, Pair]) -> Figure:
    """The time of a step by its parts and by the kind of its operations, in units of the baseline step.

    Args:
        pairs: see `salnb.timing.tables.pairs`; of each two bars the right one is the step with saliency.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.8, 3.8), layout="constrained")
    _stack(axes[0], pairs, "parts", dict(zip(_PARTS, _SHADES, strict=True)))
    _stack(axes[1], pairs, "kinds", dict(zip(KINDS, _SHADES[[0, 2, 3, 4]], strict=True)))
    axes[0].set(ylabel="time / time of the baseline step", title="part of the step")
    axes[1].set(title="kind of operation")
    return fig


def _stack(ax: Axes, pairs: Mapping[str, Pair], field: str, colours: Mapping[str, Any]) -> None:
    for x, (base, salient) in enumerate(pairs.values()):
        unit = sum(base[field].values())
        for row, offset in ((base, -0.2), (salient, 0.2)):
            height = 0.0
            for name, colour in colours.items():
                share = row[field].get(name, 0.0) / unit
                label = name if x == 0 and offset > 0 else None
                ax.bar(x + offset, share, 0.36, height, color=colour, label=label)
                height += share
    ax.set_xticks(range(len(pairs)), list(pairs), rotation=35, ha="right")
    ax.legend(fontsize="x-small", ncols=2, loc="upper left")
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])


def show_memory(pairs: Mapping[str, Pair]) -> Figure:
    """The most memory in use during a step, and a line at what is there before it; see `show_parts`."""
    fig, ax = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for x, rows in enumerate(pairs.values()):
        for row, offset, colour in zip(rows, (-0.2, 0.2), _SHADES[[3, 0]], strict=True):
            peak, held = row["peak_bytes"] / 2**20, row["held_bytes"] / 2**20
            label = ("baseline", "with saliency")[offset > 0] if x == 0 else None
            ax.bar(x + offset, peak, 0.36, color=colour, label=label)
            ax.plot([x + offset - 0.18, x + offset + 0.18], [held, held], color="C3", lw=2)
    ax.plot([], [], color="C3", lw=2, label="parameters, buffers, batch")
    ax.set_xticks(range(len(pairs)), list(pairs), rotation=20)
    ax.set(ylabel="MiB")
    ax.legend(fontsize="small", ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    return fig


def show_batches(records: Mapping[str, Record]) -> Figure:
    """Milliseconds per image, and the ratio, over the batch size; of each record one network."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for i, (name, record) in enumerate(records.items()):
        network, batches = batches_of(record)
        for method, style, what in ((None, "o--", "baseline"), (METHOD, "o-", "with saliency")):
            rows = [found[method] for found in batches.values() if found[method]["status"] == "ok"]
            n = [row["batch"] for row in rows]
            # originals and augmented images: two for each
            per_image = [500 * row["seconds"]["mean"] / row["batch"] for row in rows]
            axes[0].plot(n, per_image, style, color=f"C{i}", label=f"{name}, {network}, {what}")
        axes[1].plot(n, [row["ratio"] for row in rows], "o-", color=f"C{i}")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set(xlabel="originals in a batch")
    axes[0].set(ylabel="milliseconds per image", ylim=(0, None))
    axes[1].set(ylabel="with saliency / baseline")
    axes[1].axhline(2, **_ARITHMETIC)
    axes[0].legend(fontsize="x-small")
    return fig


def show_method_costs(rows: Sequence[TimingRow]) -> Figure:
    """What a step costs on average in units of the baseline, and its arithmetic.

    Args:
        rows: see `salnb.timing.tables.method_rows`.
    """
    fig, ax = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    y, ratios, limits = range(len(rows)), [row["ratio"] for row in rows], [row["flops_ratio"] for row in rows]
    ax.barh(y, ratios, 0.6, color=_SHADES[1], label="measured")
    ax.plot(limits, y, "|", color="C3", ms=16, mew=2.5, label="arithmetic")
    ax.set_yticks(y, [method_label(row) for row in rows])
    ax.invert_yaxis()
    xlim = 0.8 * min(1, *limits, *ratios), 1.2 * max(*limits, *ratios)
    ax.set(xscale="log", xlabel=f"time of a step / baseline, {rows[0]['network']}", xlim=xlim)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks([x for x in (1, 1.5, 2, 3, 5, 10, 20, 50) if x < xlim[1]])
    ax.legend(fontsize="small")
    return fig
