"""What training runs came through, epoch by epoch."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from salnb.plot.style import as_text

__all__ = ["show_curves"]

_PANELS = {
    "class loss": ("class_loss",),
    "saliency loss": ("saliency_loss",),
    "accuracy (faint: training)": ("validation_accuracy", "train_accuracy"),
}


def show_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, size: float = 2.7) -> Figure:
    """The curves of several runs: class loss, saliency loss and accuracy after each epoch.

    Args:
        runs: for each name the lines of the run's `metrics.jsonl`.
        size: width of a panel in inches.

    Raises:
        ValueError: there is no run, or one has no line, or a line lacks a number; the message names it.
    """
    if empty := [name for name, rows in runs.items() if not rows] or (not runs and ["none"]):
        raise ValueError(f"runs must have an epoch behind them, got {', '.join(empty)}")
    for name, rows in runs.items():
        for number, row in enumerate(rows, 1):
            for field in ("epoch", *chain(*_PANELS.values())):
                if not isinstance(row, Mapping) or not isinstance(row.get(field), int | float):
                    got = row.get(field) if isinstance(row, Mapping) else row
                    raise ValueError(f"{field} in line {number} of {name} must be a number, got {got!r}")
    fig, axes = plt.subplots(1, 3, figsize=(3 * size, 0.85 * size), layout="constrained")
    colours = sns.color_palette("colorblind", len(runs))
    for ax, (title, terms) in zip(axes, _PANELS.items(), strict=True):
        for colour, (name, rows) in zip(colours, runs.items(), strict=True):
            epochs = [row["epoch"] for row in rows]
            for term, alpha in zip(terms, (1.0, 0.35), strict=False):
                style = {"color": colour, "alpha": alpha, "label": _shown(name) if alpha == 1 else None}
                marker = "o" if len(rows) == 1 else None  # a line of one point is not seen
                ax.plot(epochs, [row[term] for row in rows], marker=marker, **style)
        ax.set_title(title, fontsize="small")
        ax.set_xlabel("epoch", fontsize="small")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1] or 1)
        sns.despine(ax=ax)
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize="small", frameon=False
    )
    return fig


def _shown(name: str) -> str:
    """A name as the legend shows it, which leaves out what begins with _."""
    return as_text(" " * name.startswith("_") + name)
