"""Figures of results: every number is where it belongs, and what does not fit is seen."""

import dataclasses
import math

import numpy as np
import pytest

from salnb.plot import VERDICTS, show_accuracies, show_differences
from salnb.statistics import Comparison, compare

LIMITS = (-0.1, 0.1)


def comparison(low, high, *, name="here", data="digits", pairs=((0.5, 0.51), (0.5, 0.53))):
    middle = (low + high) / 2 if math.isfinite(low) else pairs[0][1] - pairs[0][0]
    where = {"data": data, "augmentation": name}
    return Comparison(where, "saliency", len(pairs), 0.5, 0.5 + middle, middle, low, high, pairs)


def augmentation(found):
    return found.where["augmentation"]


def mark(ax, y):
    """The large mark of a row."""
    return next(line for line in ax.lines if line.get_zorder() == 6 and line.get_ydata()[0] == y)


def interval(ax, y):
    return [line for line in ax.lines if len(line.get_xdata()) == 2 and list(line.get_ydata()) == [y, y]]


def arrows(ax, y):
    """Where the arrows of a row are, and where they point."""
    return {
        (line.get_xdata()[0], line.get_marker())
        for line in ax.lines
        if line.get_zorder() == 5 and line.get_ydata()[0] == y
    }


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


CASES = {
    "better": comparison(0.01, 0.03, name="better"),
    "worse": comparison(-0.03, -0.01, name="worse"),
    "cannot tell": comparison(-0.01, 0.02, name="cannot tell"),
}


def test_each_verdict_has_its_colour_and_its_shape():
    fig = show_differences(list(CASES.values()), LIMITS, row=augmentation)
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == list(CASES)
    for y, (verdict, case) in enumerate(CASES.items()):
        (line,) = interval(ax, y)
        assert list(line.get_xdata()) == [case.low, case.high]
        assert mark(ax, y).get_xdata()[0] == case.difference
        assert mark(ax, y).get_marker() == VERDICTS[verdict].marker
        assert line.get_color() == mark(ax, y).get_color() == VERDICTS[verdict].colour
    assert len({look.marker for look in VERDICTS.values()}) == 3
    assert set(legend(fig)) == {*CASES, "one seed"}


def test_each_seed_is_a_faint_dot():
    (ax,) = show_differences([CASES["better"]], LIMITS).axes
    (dots,) = ax.collections
    np.testing.assert_allclose(dots.get_offsets()[:, 0], [0.01, 0.03])
    assert dots.get_alpha() < 1


def test_what_lies_outside_is_an_arrow_at_the_edge():
    wide = comparison(-0.5, 0.06, name="wide")
    far = comparison(0.2, 0.4, name="far", pairs=((0.5, 0.75), (0.5, 0.85)))
    (ax,) = show_differences([wide, far], LIMITS, row=augmentation).axes
    assert arrows(ax, 0) == {(-0.1, "<")}
    assert mark(ax, 0).get_xdata()[0] == wide.difference or mark(ax, 0).get_marker() == "<"
    assert (mark(ax, 1).get_xdata()[0], mark(ax, 1).get_marker()) == (0.1, ">")
    assert arrows(ax, 1) == {(0.1, ">")}
    assert arrows(ax, 1.26) == {(0.1, ">")}


@pytest.mark.parametrize("seeds", [1, 2])
def test_where_the_spread_is_unknown_there_is_no_interval(seeds):
    fig = show_differences([comparison(-math.inf, math.inf, pairs=((0.5, 0.52),) * seeds)], LIMITS)
    assert interval(fig.axes[0], 0) == []
    assert mark(fig.axes[0], 0).get_xdata()[0] == pytest.approx(0.02)
    assert legend(fig) == ["cannot tell", "one seed"]


def test_panels_have_rows_of_their_own():
    cases = [comparison(0.01, 0.03, name=name, data=data) for name, data in ("aA", "bA", "bB")]
    fig = show_differences(cases, LIMITS, row=augmentation, panel=lambda c: c.where["data"])
    upper, lower = fig.axes
    assert (upper.get_title(), lower.get_title()) == ("A", "B")
    assert [label.get_text() for label in upper.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in lower.get_yticklabels()] == ["b"]
    assert interval(upper, 1)
    assert interval(lower, 0)
    fig.draw_without_rendering()
    assert upper.get_position().y0 > lower.get_position().y1


def test_a_long_name_goes_on_in_another_line():
    name = "all three, relative against class+invariance"
    (ax,) = show_differences([comparison(0.01, 0.03, name=name)], LIMITS, row=augmentation).axes
    (label,) = ax.get_yticklabels()
    assert label.get_text().split("\n") == ["all three, relative", "against class+invariance"]


def test_ticks_are_percentage_points_with_their_sign():
    fig = show_differences([CASES["better"]], LIMITS)
    written = fig.axes[0].xaxis.get_major_formatter()
    assert [written(x, 0) for x in (-0.1, 0, 0.025)] == ["\N{MINUS SIGN}10", "0", "+2.5"]
    assert fig.axes[0].get_xlim() == LIMITS


def test_accuracies_are_joined_seed_by_seed():
    case = comparison(0.01, 0.03, pairs=((0.4, 0.5), (0.6, 0.5)))
    (ax,) = show_accuracies([case], (0, 1)).axes
    joined = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert joined == [(0.4, 0.5), (0.6, 0.5)]
    means = {line.get_marker(): line.get_xdata()[0] for line in ax.lines if line.get_marker() in "sD"}
    assert means == pytest.approx({"s": 0.5, "D": 0.5})
    assert [len(dots.get_offsets()) for dots in ax.collections] == [2, 2]


def test_comparisons_tell_their_pairs():
    def record(strategy, seed, accuracy):
        factors = {"data": "digits", "strategy": strategy, "seed": seed}
        return {"status": "done", "factors": factors, "result": {"test_accuracy": accuracy}}

    runs = [("reference", 0, 0.5), ("saliency", 0, 0.6), ("saliency", 1, 0.7), ("reference", 1, 0.4)]
    (found,) = compare(record(*run) for run in runs)
    assert found.pairs == ((0.5, 0.6), (0.4, 0.7))


REFUSED = {
    "none": (lambda: show_differences([], LIMITS), "comparisons must hold at least one"),
    "zero": (lambda: show_differences([CASES["better"]], (0.1, 0.2)), r"zero between them, got \(0.1, 0.2\)"),
    "order": (lambda: show_accuracies([CASES["better"]], (1, 0)), r"the lower one first, got \(1\.0, 0\.0\)"),
    "nan": (lambda: show_differences([CASES["better"]], (-math.nan, 1)), "limits must lie in "),
    "one": (
        lambda: show_differences([CASES["better"]], (0.1,)),
        "limits must be two numbers with zero between",
    ),
    "three": (lambda: show_accuracies([CASES["better"]], (0, 1, 2)), "limits must be two numbers, the lower"),
    "infinite": (lambda: show_accuracies([CASES["better"]], (0, math.inf)), "limits must lie in "),
    "twice": (
        lambda: show_differences([CASES["better"]] * 2, LIMITS, row=augmentation),
        "row must tell comparisons apart, got 'better' twice",
    ),
    "pairs": (
        lambda: show_accuracies([dataclasses.replace(CASES["better"], pairs=())], (0, 1)),
        r"pairs of their seeds, got none for \['digits, better, saliency'\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("limits", [0.1, None, "ab", ("0", "1")])
@pytest.mark.parametrize("show", [show_differences, show_accuracies])
def test_limits_that_are_no_numbers_are_refused_by_name(show, limits):
    with pytest.raises(TypeError, match="limits must be "):
        show([CASES["better"]], limits)
