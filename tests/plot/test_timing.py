"""Figures of running times: every mark is where its record says, and fp32 is where the paper is."""

import copy

import numpy as np
import pytest

from salnb import timing
from salnb.plot import show_batches, show_memory, show_method_costs, show_parts, show_ratios
from salnb.timing import tables
from salnb.timing.profiler import KINDS
from tests.helpers.timing_records import made_up_record


@pytest.fixture
def record():
    return made_up_record(networks=["resnet18", "resnet50"], size=64, modes=None)


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def heights(ax):
    """Where the stack of bars over each place ends."""
    found = {}
    for bar in ax.patches:
        x = round(bar.get_x() + bar.get_width() / 2, 3)
        found[x] = max(found.get(x, 0), bar.get_y() + bar.get_height())
    return found


def test_ratios_lie_over_their_network_beside_the_papers(record):
    (ax,) = show_ratios({"here": record, "there": record}).axes
    paper, ours = ax.lines[:2]
    assert list(paper.get_xdata()) == list(timing.TABLE_4)
    np.testing.assert_allclose(paper.get_ydata(), [b / a for a, b in timing.PAPER.values()])
    expected = {row["network"]: row["ratio"] for row in tables.rows_of(record, method="vanilla_gradient")}
    assert dict(zip(ours.get_xdata(), ours.get_ydata(), strict=True)) == expected
    assert {ours.get_linestyle(), paper.get_linestyle()} == {"None"}
    assert ax.get_ylim()[0] < min(expected.values())
    assert labels(ax)[1:] == [
        "here, fp32 eager",
        "here, fp32 compiled",
        "there, fp32 eager",
        "there, fp32 compiled",
        "arithmetic, 2.0",
    ]


def test_a_ratio_below_what_arithmetic_allows_is_on_the_axis(record):
    fast = copy.deepcopy(record)
    for row in fast["rows"]:
        row["ratio"] = row["ratio"] and 0.5
    assert show_ratios({"fast": fast}).axes[0].get_ylim()[0] < 0.5


def test_parts_and_kinds_are_stacked_in_units_of_the_baseline(record):
    pairs = tables.pairs(record)
    fig = show_parts(pairs)
    for ax, field in zip(fig.axes, ("parts", "kinds"), strict=True):
        expected = {}
        for x, (base, salient) in enumerate(pairs.values()):
            expected[x - 0.2] = 1.0
            expected[x + 0.2] = sum(salient[field].values()) / sum(base[field].values())
        assert heights(ax) == pytest.approx(expected)
        assert [label.get_text() for label in ax.get_xticklabels()] == list(pairs)
    assert labels(fig.axes[0]) == ["forward", "input gradient", "loss", "backward", "other"]
    assert labels(fig.axes[1]) == list(KINDS)


def test_memory_has_a_line_at_what_is_held(record):
    pairs = tables.pairs(record)
    (ax,) = show_memory(pairs).axes
    rows = [row for each in pairs.values() for row in each]
    assert list(heights(ax).values()) == pytest.approx([row["peak_bytes"] / 2**20 for row in rows])
    held = [line.get_ydata()[0] for line in ax.lines if len(line.get_ydata())]
    assert held == pytest.approx([row["held_bytes"] / 2**20 for row in rows])
    assert labels(ax) == ["parameters, buffers, batch", "baseline", "with saliency"]


def test_batches_that_were_too_large_are_left_out(record):
    short = copy.deepcopy(record)
    sizes = {row["batch"] for row in record["rows"]}
    for row in short["rows"]:
        if row["batch"] == max(sizes) and row["method"]:
            row |= {"status": "out of memory", "seconds": None, "ratio": None}
    left, right = show_batches({"whole": record, "short": short}).axes
    assert [len(line.get_xdata()) for line in left.lines] == [4, 4, 4, 3]
    assert labels(left)[3] == "short, resnet18, with saliency"
    whole, shorter, _ = right.lines
    assert list(whole.get_xdata()) == sorted(sizes)
    assert list(shorter.get_ydata()) == list(whole.get_ydata()[:3])
    first = next(row for row in record["rows"] if row["batch"] == max(sizes))
    per_image = 1000 * first["seconds"]["mean"] / (2 * first["batch"])
    assert left.lines[0].get_ydata()[-1] == pytest.approx(per_image)


def test_methods_are_bars_with_their_arithmetic(record):
    rows = tables.method_rows(record)
    (ax,) = show_method_costs(rows).axes
    assert [bar.get_width() for bar in ax.patches] == [row["ratio"] for row in rows]
    assert list(ax.lines[0].get_xdata()) == [row["flops_ratio"] for row in rows]
    assert [label.get_text() for label in ax.get_yticklabels()][:3] == [
        "every 4th step",
        "every 16th step",
        "vanilla gradient",
    ]
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "time of a step / baseline, resnet18"
    assert ax.get_xlim()[0] < 1


def test_no_row_is_no_figure():
    with pytest.raises(ValueError, match="rows must hold at least one"):
        show_method_costs([])


def test_batches_without_a_measured_step_are_no_figure(record):
    with pytest.raises(ValueError, match="records must hold at least one, got none"):
        show_batches({})
    for row in record["rows"]:
        row["status"] = "out of memory"
    with pytest.raises(
        ValueError, match=r"records\['a'\] must hold a step that was measured, got none of resnet"
    ):
        show_batches({"a": record})
    with pytest.raises(
        ValueError, match="record must hold eager rows of the baseline or of vanilla_gradient"
    ):
        show_batches({"a": record | {"rows": []}})


def test_a_baseline_alone_is_drawn(record):
    record["rows"] = [row for row in record["rows"] if row["method"] is None]
    left, right = show_batches({"a": record}).axes
    assert [len(line.get_xdata()) > 0 for line in left.lines] == [True, False]
    assert not len(right.lines[0].get_xdata())
