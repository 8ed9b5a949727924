"""What is measured is not lost to what fails beside it: a row says what it lacks, and tables and figures bear it."""

import copy

import matplotlib as mpl
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from salnb import plot, results, timing
from salnb.timing import clock, measurement, profiler, runner, steps, tables
from salnb.timing.records import ACCESSORIES, Row
from tests.helpers.timing_records import broken, made_up_record, small_study

# what is made to fail, and what a row lacks then
FAILURES = {
    "the clocks": (measurement, "clocks", {"clocks_mhz"}),
    "the parts": (clock.Stopwatch, "parts", {"parts"}),
    "what is held": (steps.TimedStep, "held_bytes", {"held_bytes", "peak_bytes"}),
    "the profiler": (profiler, "profile", {"kinds", "peak_bytes"}),
    "the kinds": (profiler, "seconds_by_kind", {"kinds"}),
    "the memory": (profiler, "_most_memory", {"peak_bytes"}),
    "the counter": (measurement, "count_flops", {"flops"}),
    "the bytes": (measurement, "count_bytes", {"bytes"}),
    "the peaks": (measurement, "peaks_of", {"peaks"}),
    "the peak": (measurement, "peak_flops", {"peak_share"}),
    "the ratio": (Row, "over", {"ratio"}),
}


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
        ("count_bytes", {"other": -1}, "bytes"),
        ("peaks_of", ({"flops": 1e9, "bytes": 0.0}, "a guess"), "peaks"),
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
        tables.roofline_table(record),
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
