"""Curves of several runs in one figure."""

import json

import pytest
from PIL import Image

from salnb import plot
from salnb.__main__ import main

TERMS = ("class_loss", "saliency_loss", "train_accuracy", "validation_accuracy")


def rows(count, value=0.5):
    return [{"epoch": i + 1} | dict.fromkeys(TERMS, value / (i + 1)) for i in range(count)]


def test_each_run_is_a_line_in_each_panel():
    figure = plot.show_curves({"first": rows(3), "second": rows(1)})
    losses, _, accuracy = figure.axes
    assert [len(line.get_xdata()) for line in losses.lines] == [3, 1]
    assert list(losses.lines[0].get_ydata()) == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert len(accuracy.lines) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


@pytest.mark.parametrize(("runs", "named"), [({}, "none"), ({"a": rows(1), "b": []}, "b")])
def test_runs_without_an_epoch_are_refused(runs, named):
    with pytest.raises(ValueError, match=f"runs must have an epoch behind them, got {named}"):
        plot.show_curves(runs)


def test_from_the_command_line(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    out = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size > (900, 200)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"epoch": 3, "class_l', "{path} is damaged: its line 3 is not JSON ("),
        ("{}", "epoch in line 3 of {run} must be a number, got None"),
        ("[3]", "epoch in line 3 of {run} must be a number, got [3]"),
        (
            json.dumps(rows(1)[0] | {"saliency_loss": "low"}),
            "saliency_loss in line 3 of {run} must be a number",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path, capsys, line, told):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(2)) + line + "\n")
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "curves.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"salnb: error: {told.format(path=path, run=tmp_path)}")
    assert error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_where_a_figure_cannot_be_written_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows(1)[0]))
    out = tmp_path / "nowhere" / "curves.png"
    assert main(["plot", str(tmp_path), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"salnb: error: [Errno 2] No such file or directory: '{out}'\n"


def test_names_of_runs_are_shown_as_they_are():
    row = dict.fromkeys(("class_loss", "saliency_loss", "validation_accuracy", "train_accuracy"), 0.5)
    fig = plot.show_curves({name: [row | {"epoch": 1}] for name in ("_a", r"$\no$", "b")})
    assert [text.get_text().strip() for text in fig.legends[0].texts] == ["_a", r"\$\no\$", "b"]
    assert plot.png(fig)
