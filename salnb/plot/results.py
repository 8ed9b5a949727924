"""What training runs reached, seed by seed, and paired differences with their intervals.

Both take what `salnb.statistics.compare` gives. A verdict is told by colour and by shape, so that it needs no
eye for colours. What lies outside the limits of an axis is an arrow at its edge.
"""

import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from salnb._common.limits import check_pair
from salnb.plot.style import INK
from salnb.statistics import Comparison, mean

__all__ = ["VERDICTS", "name_of", "show_accuracies", "show_differences"]

Name = Callable[[Comparison], str]


class _Look(NamedTuple):
    colour: str
    marker: str
    filled: bool = True

    def style(self) -> dict[str, Any]:
        return {"color": self.colour, "markerfacecolor": self.colour if self.filled else "white"}


# of Okabe and Ito's colours; the triangles point to where the difference lies
VERDICTS = {
    "better": _Look("#0072b2", ">"),
    "cannot tell": _Look("#5c5c5c", "o", filled=False),
    "worse": _Look("#d55e00", "<"),
}
_SIDES = (_Look("#8a8a8a", "s"), _Look("#0072b2", "D"))  # the reference, and what is compared with it
_FAINT = 0.4
_LETTER = 0.08  # inches that a letter of a row's name takes
_LETTERS = 25  # after which a row's name goes on in another line, so that a phone does not shrink the letters


def name_of(comparison: Comparison) -> str:
    """What is compared, and where: the default name of a row."""
    return ", ".join([*map(str, comparison.where.values()), comparison.what])


def show_differences(
    comparisons: Sequence[Comparison],
    limits: tuple[float, float],
    *,
    row: Name = name_of,
    panel: Name | None = None,
    label: str = "difference of test accuracy in percentage points",
    size: float = 3.5,
) -> Figure:
    """A forest plot: paired differences in percentage points, their 95 % intervals, and a line at zero.

    Args:
        comparisons: see `salnb.statistics.compare`; each is a row.
        limits: of the axis, as shares: (-0.1, 0.1) is ten points to each side. They must hold zero.
        row: names the row of a comparison.
        panel: names the panel of a comparison; None draws one panel.
        label: of the axis.
        size: width of a panel in inches.

    Returns:
        A figure with an axes for each panel. Each difference is a mark in the middle of its interval, with a
        faint dot for each seed. Where nothing is known of the spread there is no interval.

    Raises:
        ValueError: there is no comparison, two would be drawn over each other, or the limits are not as
            described.

    >>> found = Comparison({}, "saliency", 2, 0.5, 0.52, 0.02, 0.01, 0.03, ((0.5, 0.515), (0.5, 0.525)))
    >>> len(show_differences([found], (-0.05, 0.05)).axes)
    1
    """
    limits = check_pair("limits", limits, -1e9, 1e9, form := "two numbers with zero between them")
    if not limits[0] < 0 < limits[1]:
        raise ValueError(f"limits must be {form}, got {limits}")
    verdicts = {c.verdict for c in comparisons}
    looks = {name: look for name, look in VERDICTS.items() if name in verdicts}
    fig = _draw(_draw_difference, looks, comparisons, limits, row, panel, label, size)
    for ax in fig.axes:
        ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
        ax.xaxis.set_major_formatter(_points)
    return fig


def show_accuracies(
    comparisons: Sequence[Comparison],
    limits: tuple[float, float],
    *,
    row: Name = name_of,
    panel: Name | None = None,
    names: tuple[str, str] = ("reference", "saliency"),
    label: str = "test accuracy in percent",
    size: float = 3.5,
) -> Figure:
    """What the reference reached and what is compared with it, the two runs of each seed joined by a line.

    Arguments are those of `show_differences`, but the limits, such as (0, 1), need not hold zero; `names` are
    those of the reference and of what is compared with it.

    Returns:
        A figure with an axes for each panel; in a row, the reference lies above what is compared with it.
        Large marks are means.

    Raises:
        ValueError: as `show_differences`; and for a comparison without pairs.

    >>> found = Comparison({}, "saliency", 2, 0.5, 0.52, 0.02, 0.01, 0.03, ((0.5, 0.515), (0.5, 0.525)))
    >>> len(show_accuracies([found], (0, 1)).axes)
    1
    """
    limits = check_pair("limits", limits, -1e9, 1e9, form := "two numbers, the lower one first")
    if not limits[0] < limits[1]:
        raise ValueError(f"limits must be {form}, got {limits}")
    if without := [name_of(c) for c in comparisons if not c.pairs]:
        raise ValueError(f"comparisons must hold the pairs of their seeds, got none for {without}")
    looks = dict(zip(names, _SIDES, strict=True))
    fig = _draw(_draw_pairs, looks, comparisons, limits, row, panel, label, size)
    for ax in fig.axes:
        ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}")
    return fig


def _draw(
    draw: Callable[[Axes, int, Comparison, tuple[float, float]], None],
    looks: Mapping[str, _Look],
    comparisons: Sequence[Comparison],
    limits: tuple[float, float],
    row: Name,
    panel: Name | None,
    label: str,
    size: float,
) -> Figure:
    """Panels below one another, in the order of the comparisons, and what belongs into each row."""
    if not comparisons:
        raise ValueError("comparisons must hold at least one, got none")
    found: dict[str, dict[str, Comparison]] = {}
    for comparison in comparisons:
        rows = found.setdefault(panel(comparison) if panel else "", {})
        name = textwrap.fill(row(comparison), _LETTERS, break_long_words=False)
        if name in rows:
            raise ValueError(f"row must tell comparisons apart, got {row(comparison)!r} twice")
        rows[name] = comparison
    lines = [line for rows in found.values() for name in rows for line in name.split("\n")]
    heights = [len(rows) for rows in found.values()]
    of_row = 0.42 if len(lines) > sum(heights) else 0.3
    inches = size + _LETTER * max(map(len, lines)) + 0.3, of_row * sum(heights) + 0.6 * len(found) + 0.7
    options: dict[str, Any] = {"squeeze": False, "height_ratios": heights, "layout": "constrained"}
    fig, axes = plt.subplots(len(found), 1, figsize=inches, **options)
    for ax, (title, rows) in zip(axes[:, 0], found.items(), strict=True):
        _prepare(ax, title, rows, limits)
        for y, comparison in enumerate(rows.values()):
            draw(ax, y, comparison, limits)
    fig.supxlabel(label, fontsize="small")
    marks = [Line2D([], [], marker=k.marker, lw=0, label=name, **k.style()) for name, k in looks.items()]
    marks.append(Line2D([], [], color=INK, marker="o", markersize=3, alpha=_FAINT, lw=0, label="one seed"))
    fig.legend(handles=marks, loc="outside upper center", ncols=len(marks), fontsize="small", frameon=False)
    return fig


def _prepare(ax: Axes, title: str, rows: Collection[str], limits: tuple[float, float]) -> None:
    """A panel without its content."""
    ax.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6), title=title)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.title.set_fontsize("medium")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    for y in range(1, len(rows), 2):  # so that the eye keeps to its row
        ax.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", zorder=0)
    sns.despine(ax=ax, left=True)


def _draw_difference(ax: Axes, y: int, comparison: Comparison, limits: tuple[float, float]) -> None:
    look, (low, high) = VERDICTS[comparison.verdict], limits
    if math.isfinite(comparison.high - comparison.low):
        ends = max(comparison.low, low), min(comparison.high, high)
        ax.plot(ends, (y, y), color=look.colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
        _arrows(ax, [comparison.low, comparison.high], y, look.colour, limits, 5)
    _strip(ax, comparison.differences, y + 0.26, limits)
    marker = "<" if comparison.difference < low else ">" if comparison.difference > high else look.marker
    x = max(low, min(high, comparison.difference))
    ax.plot(x, y, marker, clip_on=False, zorder=6, **look.style())


def _draw_pairs(ax: Axes, y: int, comparison: Comparison, limits: tuple[float, float]) -> None:
    for pair in comparison.pairs:
        ax.plot(pair, (y - 0.2, y + 0.2), color=_SIDES[0].colour, linewidth=0.8, alpha=_FAINT, zorder=2)
    for look, values, offset in zip(_SIDES, zip(*comparison.pairs, strict=True), (-0.2, 0.2), strict=True):
        _strip(ax, values, y + offset, limits)
        ax.plot(mean(values), y + offset, look.marker, color=look.colour, markersize=5.5, zorder=4)


def _strip(ax: Axes, values: Sequence[float], y: float, limits: tuple[float, float]) -> None:
    """A faint dot for each value."""
    x = [value for value in values if limits[0] <= value <= limits[1]]
    sns.scatterplot(x=x, y=[y] * len(x), ax=ax, s=9, color=INK, alpha=_FAINT, linewidth=0, zorder=3)
    _arrows(ax, values, y, INK, limits, 3)


def _arrows(
    ax: Axes, values: Sequence[float], y: float, colour: str, limits: tuple[float, float], size: float
) -> None:
    """Arrows at the edges beyond which some of the values lie."""
    for edge, marker in zip(limits, "<>", strict=True):
        if any(value < edge if marker == "<" else value > edge for value in values):
            ax.plot(edge, y, marker, color=colour, markersize=size, clip_on=False, zorder=5)


def _points(x: float, _: float) -> str:
    return f"{100 * x:+.3g}".replace("-", "\N{MINUS SIGN}") if round(x, 6) else "0"
