"""What is measured is not lost to an end that came early or to a full disk; a pair is measured at least."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from salnb import results, timing
from salnb.__main__ import main
from salnb.timing import clock, measurement, profiler, record_file, runner
from tests.helpers.timing_records import (
    broken,
    made_up,
    made_up_record,
    out_of_memory,
    settings,
    silent,
    small_study,
    without_waiting,
)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- an end that came early --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["count_flops", "clocks", "StepProfile"])
def test_an_interruption_leaves_the_times_that_are_there(tmp_path, monkeypatch, two_rows, name):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, name, stop)
    with pytest.raises(KeyboardInterrupt):
        small_study(tmp_path / "record.json")
    first, second = timing.read_timing(tmp_path / "record.json.partial")["rows"]
    assert (first["status"], second["status"]) == ("ok", "not run")
    assert first["seconds"]["mean"] > 0
    assert first["lacks"]["flops"] == "there was no time for it"


@pytest.mark.parametrize(
    ("number", "statuses"),
    # interrupted, PyTorch's profiler may crash the interpreter's end, when all is written
    [(signal.SIGTERM, {-signal.SIGTERM}), (signal.SIGINT, {130, -signal.SIGSEGV})],
)
def test_a_process_that_is_ended_leaves_what_it_measured(tmp_path, number, statuses):
    program = (
        "import sys, time; from salnb.timing import measurement; "
        "measurement.count_flops = lambda case: time.sleep(600); "
        "from salnb.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    path = tmp_path / "record.json"
    command = [
        sys.executable,
        "-c",
        program,
        "time",
        "--device",
        "cpu",
        "--networks",
        "small",
        "--size",
        "16",
    ]
    with subprocess.Popen([*command, "--out", str(path)], stderr=subprocess.PIPE) as process:
        partial = tmp_path / "record.json.partial"
        while process.poll() is None and not partial.exists():
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait() in statuses
    (row, *_) = timing.read_timing(partial)["rows"]
    assert row["status"] == "ok"
    assert not path.exists()


def test_an_error_after_the_times_costs_what_was_to_come_after_them(tmp_path, monkeypatch, two_rows):
    monkeypatch.setattr(measurement, "StepProfile", broken)
    for row in small_study(tmp_path / "record.json")["rows"]:
        assert row["status"] == "ok"
        assert set(row["lacks"].values()) == {"RuntimeError: it is broken"}


# --- a disk that is full -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Rows that are made up."""
    without_waiting(monkeypatch)
    monkeypatch.setattr(runner, "measure_case", made_up)


def test_a_disk_that_fills_up_costs_no_row(tmp_path, monkeypatch, quick):
    write, places, lines = results.write_record, [], []
    monkeypatch.setattr(record_file.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))

    def fill(path, record):
        if "elsewhere" not in str(path) and sum(row["status"] == "ok" for row in record["rows"]) > 3:
            full()
        places.append(path)
        write(path, record)

    monkeypatch.setattr(results, "write_record", fill)
    with pytest.raises(OSError, match="cannot be written: the record is in ") as error:
        timing.study(settings(), tmp_path / "record.json", log=lines.append)
    (place,) = (tmp_path / "elsewhere").iterdir()
    assert str(place) in str(error.value)
    assert {row["status"] for row in timing.read_timing(place)["rows"]} == {"ok"}
    assert sum("the study goes on" in line for line in lines) == 1
    assert (
        sum(row["status"] == "ok" for row in timing.read_timing(tmp_path / "record.json.partial")["rows"])
        == 3
    )


def test_a_record_that_has_no_place_at_all_is_printed(tmp_path, monkeypatch, quick):
    lines = []
    monkeypatch.setattr(results, "write_record", full)
    with pytest.raises(OSError, match="cannot be written: the record stands above"):
        timing.study(settings(), tmp_path / "record.json", log=lines.append)
    assert {row["status"] for row in timing.check_record(json.loads(lines[-1]))["rows"]} == {"ok"}


def test_a_disk_that_is_full_for_a_while_is_no_matter(tmp_path, monkeypatch, quick):
    write, calls = results.write_record, []
    monkeypatch.setattr(
        results,
        "write_record",
        lambda *args: calls.append(args) or (full() if len(calls) in (1, 3) else write(*args)),
    )
    record = timing.study(settings(), tmp_path / "record.json", log=silent)
    assert timing.read_timing(tmp_path / "record.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_an_interruption_on_a_full_disk_tells_where_the_rows_are(tmp_path, monkeypatch, quick):
    lines, write = [], results.write_record
    monkeypatch.setattr(record_file.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    monkeypatch.setattr(
        results,
        "write_record",
        lambda path, record: write(path, record) if "elsewhere" in str(path) else full(),
    )

    def measure(case, *args, **options):
        if case.method == "deconvnet":
            raise KeyboardInterrupt
        return made_up(case)

    monkeypatch.setattr(runner, "measure_case", measure)
    with pytest.raises(KeyboardInterrupt):
        timing.study(settings(), tmp_path / "record.json", log=lines.append)
    (place,) = (tmp_path / "elsewhere").iterdir()
    assert lines[-1] == f"the record is in {place}"
    assert timing.read_timing(place)["rows"][0]["status"] == "ok"


@pytest.mark.parametrize("given", [[], ["--out", "results/deep/record.json"]], ids=["usual", "given"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, given
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("no folder")
    monkeypatch.setattr(runner, "measure_case", broken)
    assert main(["time", "--device", "cpu", "--networks", "small", *given]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    place = given[1] if given else "results/timing-cpu.json"
    assert told.err == f"salnb: error: [Errno 20] out {place} cannot be written: Not a directory\n"
    (tmp_path / "results").unlink()
    (tmp_path / "results" / "timing-cpu.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"out results/timing-cpu\.json cannot be written: Is a directory"):
        timing.study(settings(), log=silent)


# --- nothing, and at least a pair --------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [broken, out_of_memory])
def test_a_study_that_measures_nothing_says_so_in_a_line(tmp_path, monkeypatch, capsys, quick, failure):
    monkeypatch.setattr(runner, "measure_case", failure)
    path = tmp_path / "record.json"
    before = results.write_record(path, made_up_record()) or path.read_bytes()
    assert main(["time", "--device", "cpu", "--networks", "small", "--out", str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    first = "small, fp32, eager, 2+2, baseline: " + (
        "failed (Run" if failure is broken else "out of memory (Out"
    )
    assert told.err.startswith(f"salnb: error: no row of 21 could be measured; the first: {first}")
    assert told.err.count("\n") == 1
    assert path.read_bytes() == before, "an older record stays"
    assert os.listdir(tmp_path) == ["record.json"]


class Slow:
    """A machine on which a step takes so many seconds, three times as many with saliency."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.failing = 0.0, seconds, None
        host = clock.HostClock()
        host.mark = lambda: self.now
        facts = {"driver": None, "clocks_mhz": None, "processor": None}
        monkeypatch.setattr(measurement, "clock_of", lambda device: host)
        monkeypatch.setattr(measurement, "step_of", self.step_of)
        monkeypatch.setattr(profiler.StepProfile, "kinds", property(self.profile))
        monkeypatch.setattr(profiler.StepProfile, "peak_bytes", 1000)
        monkeypatch.setattr(measurement, "count_flops", self.count)
        monkeypatch.setattr(measurement, "count_bytes", lambda case: {"convolution": 1000})
        monkeypatch.setattr(runner, "device_facts", lambda device: facts)
        without_waiting(monkeypatch)

    def step_of(self, case, device, mark):
        def step():
            if case == self.failing:
                out_of_memory()
            self.now += self.seconds * (3 if case.method else 1)

        step.held_bytes = 1000
        return step

    def profile(self, profile):
        profile.step()
        return {"convolution": 1.0}

    def count(self, case):
        self.now += 1.0
        return 2000 if case.method else 1000, 500

    def study(self, tmp_path, **changes):
        chosen = timing.Settings(device="cpu", iterations=8, **changes)
        return timing.study(chosen, tmp_path / "record.json", log=silent, now=lambda: self.now)


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.3, 0.6, 0.9, 30.0])
def test_there_is_a_pair_however_slow_the_machine_is(tmp_path, monkeypatch, seconds):
    """As in the live cell of chapter 15: 20 seconds, 8 iterations."""
    slow = Slow(monkeypatch, seconds)
    rows = slow.study(tmp_path, budget=20)["rows"]
    base, salient = rows[:2]
    assert (base["status"], salient["status"]) == ("ok", "ok")
    assert salient["ratio"] == pytest.approx(3)
    assert all(row["iterations"] in range(5, 9) for row in (base, salient))
    if seconds <= 0.1:
        assert "lacks" not in salient
        assert (base["iterations"], salient["iterations"]) == (8, 8)
    if seconds <= 0.9:
        # what was begun is brought to its end: a step under the profiler, and what is counted
        assert slow.now <= 20 + 3 * seconds + 1
    else:
        assert (base["iterations"], salient["iterations"]) == (5, 5)
        assert slow.now == 20 * seconds  # nothing beside the times
        assert salient["lacks"]["flops"] == "there was no time for it"
        assert {row["status"] for row in rows[2:]} == {"not run"}


def test_another_pair_takes_the_place_of_one_that_failed(tmp_path, monkeypatch):
    slow = Slow(monkeypatch, 0.5)
    slow.failing = timing.Case("resnet18", batch=2, size=64)
    rows = slow.study(tmp_path, budget=15)["rows"]
    assert [i for i, row in enumerate(rows[:6]) if row["plain"] or row["originals_only"]] == [2, 3]
    assert [row["status"] for row in rows[:6]] == ["ok", "out of memory", "not run", "not run", "ok", "ok"]
    assert "stand beside" in rows[2]["reason"]
    assert "ok" not in {row["status"] for row in rows[6:]}


def test_what_has_to_be_compiled_is_not_certain(tmp_path, monkeypatch):
    slow = Slow(monkeypatch, 0.01)
    with pytest.raises(
        RuntimeError, match=r"no row of 6 could be measured; the first: .* not run \(about 30 s"
    ):
        slow.study(tmp_path, budget=20, modes=["compiled"])
