"""What a study shows: its progress, on a terminal and off one, and the command's table and exit status."""

import io
import re
import signal
import time

import pytest
import yaml

import salnb.losses
from salnb import study
from salnb.__main__ import main
from salnb.study.grids import Training
from salnb.study.progress import Progress
from tests.helpers import runs

FIRST, SECOND, THIRD = (Training("table2", {"strategy": name, "seed": 0}, {}) for name in ("a", "b", "c"))
DONE = {"status": "done", "result": {"test_accuracy": 0.75}}
FAILED = {"status": "failed", "error": "OutOfMemoryError: 3 GiB"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved on."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


# --- progress ----------------------------------------------------------------------------------------------


def test_a_line_for_each_training_that_ends(clock):
    display = io.StringIO()
    with Progress("table2", 5, 1, display) as progress:
        assert progress.summary() == "1 of 5 done, 0 failed, 0 running, time left unknown"
        progress.started(FIRST)
        progress.started(SECOND)
        assert progress.summary() == "1 of 5 done, 0 failed, 2 running, time left unknown"
        clock[0] += 60
        progress.finished(FIRST, DONE)
        clock[0] += 20
        progress.finished(SECOND, FAILED)
        progress.started(THIRD)
    assert display.getvalue().splitlines() == [
        "table2: 1/5 were done before",
        "table2: a-seed0: test accuracy 0.7500, 60 s; 2 of 5 done, 0 failed, 1 running, 3 min left",
        "table2: b-seed0: OutOfMemoryError: 3 GiB, 80 s; 2 of 5 done, 1 failed, 0 running, 80 s left",
    ]
    # what was done before says nothing of the pace: two in 80 s, two to come
    assert progress.summary() == "2 of 5 done, 1 failed, 1 running, 80 s left"


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_study_goes_on_where_nobody_reads_its_lines():
    with Progress("table2", 5, 1, ClosedPipe()) as progress:
        progress.started(FIRST)
        progress.finished(FIRST, DONE)
    assert progress.done == 2


def test_time_left_of_trainings_side_by_side(clock):
    with Progress("table2", 100, 0, io.StringIO()) as progress:
        for _ in range(10):
            progress.started(FIRST)
            progress.started(SECOND)
            clock[0] += 30
            progress.finished(FIRST, DONE)
            progress.finished(SECOND, DONE)
        assert progress.summary() == "20 of 100 done, 0 failed, 0 running, 20 min left"


def test_a_bar_on_a_terminal_names_what_is_running():
    display = Terminal()
    with Progress("table2", 4, 1, display) as progress:
        progress.started(FIRST)
        progress.started(SECOND)
        progress.finished(FIRST, FAILED)
        shown = display.getvalue()
        progress.finished(SECOND, DONE)
    assert "\n" not in display.getvalue()
    frames = shown.split("\r")
    assert any("1/4" in frame and "running: a-seed0, b-seed0" in frame for frame in frames)
    assert "2/4" in frames[-1]
    assert "1 failed, running: b-seed0" in frames[-1]
    # the line is free for what is printed next
    assert display.getvalue().split("\r")[-2].strip() == ""


def test_nothing_is_said_of_what_was_not_done_before():
    display = io.StringIO()
    with Progress("table2", 4, 0, display):
        pass
    assert display.getvalue() == ""


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def scale(tmp_path, cache):
    """A scale file for the twenty images, made for a machine with a GPU."""
    training = {k: v for k, v in runs.DEFAULTS.items() if k != "data"} | {"epochs": 1, "device": "cuda"}
    values = {"data": ["cifar10"], "networks": ["small"], "seeds": [0, 1], "training": training}
    path = tmp_path / "twenty.yml"
    path.write_text(yaml.safe_dump({"scale": values}))
    return path


def command(scale, *more):
    return [
        "study",
        "table2",
        "--scale",
        str(scale),
        "--out",
        str(scale.parent / "out"),
        "--device",
        "cpu",
        *more,
    ]


def test_the_command_prints_the_comparison(scale, capsys):
    assert main(command(scale)) == 0
    printed = capsys.readouterr()
    agreement, compared = printed.out.split("\n\n")
    header, _, *rows = agreement.splitlines()
    assert "| correlation | of 4×4 blocks |" in header  # before any accuracy
    assert [re.match(r"\| cifar10 \| small \| simclr \| (\w+) \| 2 \|", row)[1] for row in rows] == [
        "reference",
        "saliency",
    ]
    header, _, row = compared.splitlines()
    assert header.startswith("| data | network | augmentation | compared | seeds | reference | value |")
    assert row.startswith("| cifar10 | small | simclr | saliency | 2 | ")
    assert re.search(r"(better|worse|cannot tell) \|$", row)
    lines = printed.err.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(
        r"table2: cifar10-small-simclr-saliency-seed1: test accuracy 0\.\d{4}, \d+ s; "
        r"4 of 4 done, 0 failed, 0 running, 0 s left",
        lines[-1],
    )
    records = study.read(scale.parent / "out", "table2")
    assert {r["result"]["config"]["device"] for r in records} == {"cpu"}
    # once more: the same table, at once
    assert main(command(scale)) == 0
    again = capsys.readouterr()
    assert again.out == printed.out
    assert again.err == "table2: 4/4 were done before\n"


def test_failed_trainings_are_named_and_make_the_status_one(scale, capsys, monkeypatch):
    loss = salnb.losses.saliency_loss
    monkeypatch.setattr("salnb.objective.terms.saliency_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    assert main(command(scale)) == 1
    printed = capsys.readouterr()
    *agreement, _, compared = printed.out.splitlines()
    assert compared == "nothing can be compared: no seed has both"
    assert [line.split(" | ")[3] for line in agreement if "cifar10" in line] == ["reference"]
    named = [line for line in printed.err.splitlines() if line.startswith("failed: ")]
    assert len(named) == 2
    assert all("saliency-seed" in line and "NonFiniteError: saliency_loss is nan" in line for line in named)


def test_a_folder_of_another_study_is_an_answer(scale, capsys):
    assert main(command(scale)) == 0
    capsys.readouterr()
    scale.write_text(scale.read_text().replace("batch_size: 4", "batch_size: 6"))
    assert main(command(scale)) == 2
    error = capsys.readouterr().err
    assert error.startswith("salnb: error: out: ")
    assert "is of a training with other settings: batch_size 4 (now 6); take another folder" in error


def test_a_stopped_command_says_how_to_go_on(scale, cache):
    scale.write_text(scale.read_text().replace("epochs: 1", "epochs: 100000"))
    process = runs.start_command(command(scale), scale.parent, cache=cache)
    deadline = time.monotonic() + 120
    while not list(scale.parent.glob("out/runs/*/metrics.jsonl")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    printed = [(scale.parent / name).read_text() for name in ("stdout", "stderr")]
    assert printed == ["", "table2: stopped; to go on, start the study again\n"]
    assert list(scale.parent.glob("out/runs/*/checkpoints/*.pt"))
