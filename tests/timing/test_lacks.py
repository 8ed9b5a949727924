"""What is measured is not lost: not to what fails beside it, not to an end that came early, not to a full disk."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time

import matplotlib as mpl
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from salnb import plot, results, timing
from salnb.__main__ import main
from salnb.timing import clock, measurement, profiler, record_file, runner, steps, tables
from salnb.timing.records import ACCESSORIES, Row
from tests.helpers.timing_records import (
    made_up,
    made_up_record,
    out_of_memory,
    settings,
    silent,
    without_waiting,
)


def broken(*args, **kwargs):
    raise RuntimeError("it is broken\nin many ways")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# what is made to fail, and what a row lacks then
FAILURES = {
    "the clocks": (measurement, "clocks", {"clocks_mhz"}),
    "the parts": (clock.Stopwatch, "parts", {"parts"}),
    "what is held": (steps.TimedStep, "held_bytes", {"held_bytes", "peak_bytes"}),
    "the profiler": (profiler, "profile", {"kinds", "peak_bytes"}),
    "the kinds": (profiler, "seconds_by_kind", {"kinds"}),
    "the memory": (profiler, "_most_memory", {"peak_bytes"}),
    "the counter": (measurement, "count_flops", {"flops"}),
    "the peak": (measurement, "peak_flops", {"peak_share"}),
    "the ratio": (Row, "over", {"ratio"}),
}


def small_study(path, **changes):
    return timing.study(settings(size=16, iterations=4, budget=600, **changes), path, log=silent)


@pytest.fixture
def two_rows(monkeypatch):
    """A study of one real pair."""
    cases = [timing.Case("small", method, batch=2, size=16) for method in (None, "vanilla_gradient")]
    monkeypatch.setattr(runner, "plan", lambda settings: cases)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_row_has_its_times_whatever_fails_beside_them(tmp_path, monkeypatch, two_rows, failure):
    owner, name, lacking = FAILURES[failure]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, property(broken) if name == "held_bytes" else broken)
        record = small_study(tmp_path / "record.json")
    assert timing.read_timing(tmp_path / "record.json") == record
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert 0 < row["seconds"]["min"] <= row["seconds"]["mean"]
        assert row["lacks"] == dict.fromkeys(lacking, "RuntimeError: it is broken")
        missing = {field for accessory in lacking for field in ACCESSORIES[accessory]}
        others = {"parts", "kinds", "held_bytes", "peak_bytes", "flops", "convolution_flops"} - missing
        assert {name: row[name] for name in missing} == dict.fromkeys(missing)
        assert None not in [row[name] for name in others]
        assert f"without {min(lacking)} (RuntimeError: it is broken)" in timing.describe(row)
    assert (record["rows"][1]["ratio"] is None) == (lacking == {"ratio"})
    assert (record["rows"][1]["flops_ratio"] is None) == (lacking in ({"ratio"}, {"flops"}))


def test_a_row_that_lacks_nothing_says_nothing_of_it(tmp_path, two_rows):
    for row in small_study(tmp_path / "record.json")["rows"]:
        assert "lacks" not in row
        assert "without" not in timing.describe(row)
    assert "lacks" not in timing.measure(timing.Case("small", batch=2, size=16), iterations=4)


@pytest.mark.parametrize(
    ("name", "value", "lacking"),
    [
        ("count_flops", (0, 0), "flops"),
        ("count_flops", (float("nan"), 1), "flops"),
        ("clocks", {"sm": float("nan"), "memory": None}, "clocks_mhz"),
        ("_parts", {"forward": 1e9}, "parts"),
        ("_peak_share", float("inf"), "peak_share"),
    ],
    ids=str,
)
def test_nonsense_is_lacking_too(monkeypatch, name, value, lacking):
    """A number that no record may hold would make the whole record unreadable."""
    monkeypatch.setattr(measurement, name, lambda *args: value)
    row = timing.measure(timing.Case("small", batch=2, size=16), iterations=4)
    assert row["lacks"].keys() == {lacking}
    assert "must be" in row["lacks"][lacking]
    assert row[lacking] is None


@pytest.mark.parametrize(
    ("owner", "name", "part"), [(results, "provenance", "provenance"), (runner, "device_facts", "facts")]
)
def test_a_record_has_its_rows_wherever_they_come_from(tmp_path, monkeypatch, two_rows, owner, name, part):
    monkeypatch.setattr(owner, name, broken)
    record = small_study(tmp_path / "record.json")
    assert record["lacks"] == {part: "RuntimeError: it is broken"}
    assert [row["status"] for row in timing.read_timing(tmp_path / "record.json")["rows"]] == ["ok", "ok"]
    assert tables.describe_record("cpu", record).count("\n") == 7
    assert "| small, fp32, eager, baseline |" in timing.compare(record, record)


def without(row, *accessories):
    """Take from a row of a record what may be missing."""
    row |= {field: None for accessory in accessories for field in ACCESSORIES[accessory]}
    row["lacks"] = dict.fromkeys(accessories, "RuntimeError: it is broken")
    if "flops" in accessories:
        row["flops_ratio"] = None


@pytest.mark.parametrize(
    ("accessory", "rows"), [*((name, "all") for name in ACCESSORIES), ("all", "all"), ("all", "one")]
)
def test_tables_and_figures_bear_what_is_lacking(accessory, rows):
    record = made_up_record(networks=["resnet18", "resnet50"], size=64, modes=None)
    chosen = record["rows"] if rows == "all" else [record["rows"][1]]
    for row in chosen:
        without(row, *(ACCESSORIES if accessory == "all" else [accessory]))
        if row["method"] is None or rows == "all":
            row["flops_ratio"] = None if accessory in ("flops", "ratio", "all") else row["flops_ratio"]
    timing.check_record(record)
    whole = made_up_record(networks=["resnet18", "resnet50"], size=64, modes=None)
    records, pairs = {"whole": whole, "lacking": record}, tables.pairs(record)
    texts = [
        tables.paper_table(records),
        tables.part_table(pairs),
        tables.memory_table(pairs),
        timing.compare(whole, record),
    ]
    texts += [timing.describe(row) for row in record["rows"]]
    texts += [*tables.unfinished_batches(records), tables.describe_record("lacking", record)]
    figures = [
        plot.show_ratios(records),
        plot.show_parts(pairs),
        plot.show_memory(pairs),
        plot.show_batches(records),
    ]
    if methods := tables.method_rows(record):
        texts.append(tables.method_table(methods))
        figures.append(plot.show_method_costs(methods))
    for fig in figures:
        fig.draw_without_rendering()
    plt.close("all")
    assert not [text for text in texts if "None" in text.replace("driver      None", "") or "nan" in text]


WRONG = {
    "unknown": (lambda row: row.update(lacks={"colour": "x"}), "lacks must be why a row that was measured is without"),
    "nothing": (lambda row: row.update(lacks={}), "lacks must be why"),
    "no reason": (lambda row: row.update(lacks={"kinds": None}, kinds=None), "lacks must be why"),
    "there after all": (lambda row: row.update(lacks={"kinds": "x"}), "kinds must be null where it is lacking"),
    "half of it": (lambda row: row.update(lacks={"flops": "x"}, flops=None), "convolution_flops must be null"),
    "unsaid": (lambda row: row.update(held_bytes=None), "held_bytes must be a positive integer, got None"),
    "times": (lambda row: row.update(lacks={"seconds": "x"}, seconds=None), "lacks must be why"),
    "unmeasured": (
        lambda row: row.update(Row(timing.case_of(row), "failed", "x").to_dict(), lacks={"kinds": "x"}),
        "lacks must be why a row that was measured",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_lacking_is_checked(wrong):
    change, message = WRONG[wrong]
    record = copy.deepcopy(made_up_record())
    change(record["rows"][1])
    with pytest.raises(ValueError, match=rf"not a timing record: rows\[1\]\.{message}"):
        timing.check_record(record)


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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_process_that_is_ended_leaves_what_it_measured(tmp_path, number, status):
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
        assert process.wait() == status
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
    assert told.err.startswith(f"salnb: error: no row of 19 could be measured; the first: {first}")
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
    assert [row["status"] for row in rows[:4]] == ["ok", "out of memory", "ok", "ok"]
    assert "ok" not in {row["status"] for row in rows[4:]}


def test_what_has_to_be_compiled_is_not_certain(tmp_path, monkeypatch):
    slow = Slow(monkeypatch, 0.01)
    with pytest.raises(
        RuntimeError, match=r"no row of 6 could be measured; the first: .* not run \(about 30 s"
    ):
        slow.study(tmp_path, budget=20, modes=["compiled"])
