"""What chapter 15 reads from records: the rows that belong together, and tables of them."""

import copy
import dataclasses

import pytest

from salnb import timing
from salnb.timing import tables
from tests.helpers.timing_records import made_up_record


@pytest.fixture
def record():
    return made_up_record(networks=["resnet18", "resnet50"], size=64, modes=None)


@pytest.fixture
def changed(record):
    """A copy, to be altered."""
    return copy.deepcopy(record)


def row_of(record, **wanted):
    (row,) = tables.rows_of(record, **wanted)
    return row


def without(row):
    """Take from a row what was measured."""
    names = row.keys() - dataclasses.asdict(timing.case_of(row)).keys()
    row |= dict.fromkeys(names) | {"status": "out of memory", "reason": "too large"}


def test_rows_are_as_in_the_paper_unless_asked_otherwise(record):
    rows = tables.rows_of(record)
    assert rows
    for row in rows:
        assert (row["every"], row["precision"], row["status"]) == (1, "32", "ok")
        assert row["batch"] == record["protocol"]["batch"]
        assert (row["compiled"], row["channels_last"]) == (False, False)
    assert [row["batch"] for row in tables.rows_of(record, batch=16)] == [16, 16]
    assert tables.rows_of(record, network="vgg16") == []


def test_a_network_is_a_pair_only_where_both_were_measured(record, changed):
    pairs = tables.pairs(record)
    assert [row["method"] for row in pairs["resnet50"]] == [None, "vanilla_gradient"]
    without(row_of(changed, network="resnet50", method="vanilla_gradient"))
    assert list(tables.pairs(changed)) == [name for name in pairs if name != "resnet50"]
    assert tables.pair(record, "resnet18", batch=4)[1]["batch"] == 4


def test_series_are_told_apart_by_precision_and_mode(record, changed):
    found = tables.ratio_series(record)
    assert list(found) == ["fp32 eager", "fp32 compiled"]
    eager = tables.rows_of(record, method="vanilla_gradient")
    assert found["fp32 eager"] == {row["network"]: row["ratio"] for row in eager}
    row_of(changed, network="resnet50", method="vanilla_gradient")["precision"] = "bf16"
    assert list(tables.ratio_series(changed)["bf16 eager"]) == ["resnet50"]
    row_of(changed, network="resnet50", method="vanilla_gradient", precision="bf16")["captured"] = True
    assert list(tables.ratio_series(changed)["bf16 captured"]) == ["resnet50"]
    assert not [row for row in tables.method_rows(changed) if row["captured"]]


def test_each_mode_has_a_column(changed):
    row = row_of(changed, network="resnet50", method="vanilla_gradient")
    changed["rows"].append(row | {"precision": "bf16", "captured": True, "channels_last": True})
    lines = tables.mode_table(changed).splitlines()
    assert lines[0] == "| step | fp32 eager | fp32 compiled | fp32 eager, channels_last | " + (
        "bf16 captured, channels_last |"
    )
    assert lines[3].startswith("| resnet50 | 90.0 ms, 3.21 | ")
    assert lines[3].endswith("| 90.0 ms, 3.21 |")
    assert [line.count("|") for line in lines] == [6] * len(lines)


def test_batches_that_did_not_fit_are_told(record, changed):
    network, batches = tables.batches_of(record)
    assert network == "resnet18"
    assert list(batches) == [2, 4, 8, 16]
    assert all(list(found) == [None, "vanilla_gradient"] for found in batches.values())
    assert tables.unfinished_batches({"cpu": record}) == []
    without(row_of(changed, network="resnet18", method="vanilla_gradient", batch=16))
    found = tables.unfinished_batches({"cpu": record, "other": changed})
    assert found == ["other, resnet18, 16+16: out of memory"]
    for row in changed["rows"]:
        if row["batch"] == 16:
            row["status"] = "not run"
    assert list(tables.batches_of(changed)[1]) == [2, 4, 8]
    assert tables.unfinished_batches({"other": changed}) == []


def test_fewer_steps_come_before_the_methods(record):
    rows = tables.method_rows(record)
    assert [row["every"] for row in rows][:3] == [4, 16, 1]
    assert {row["network"] for row in rows} == {"resnet18"}
    assert tables.method_table(rows).splitlines()[0] == (
        "every 4th step           4.80 measured   2.00 arithmetic"
    )
    copies = rows[-1] | {"method": "smoothgrad", "samples": 5}
    assert tables.method_label(copies) == "smoothgrad, 5 copies"


def test_a_record_is_described(record):
    lines = tables.describe_record("cpu", record).splitlines()
    assert lines[0] == "record 'cpu'"
    assert lines[1] == "  device      a CPU"
    assert lines[5] == "  batch       2 + 2 images of 64×64"
    assert lines[7] == f"  rows        {len(record['rows'])} measured of {len(record['rows'])}"


def test_each_record_stands_below_the_paper(record, changed):
    without(row_of(changed, network="resnet50", method=None))
    lines = tables.paper_table({"cpu": record, "other": changed}).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("resnet50"))
    assert lines[at : at + 3] == [
        "resnet50         307.6 ms      2156.1 ms    7.01            the paper",
        "                  28.0 ms        90.0 ms    3.21      2.00  cpu",
        "                                              not measured      other",
    ]
    assert len(lines) == 1 + 3 * len(timing.PAPER)


def test_parts_are_shares_of_the_mean(record, changed):
    row = row_of(changed, network="resnet50", method="vanilla_gradient")
    row["peak_share"] = 0.375
    lines = tables.part_table(tables.pairs(changed)).splitlines()
    assert lines[2].split() == ["resnet50", "20%", "10%", "5%", "65%"]
    assert lines[-1] == "resnet50: convolutions reach 38% of the peak"
    assert len(tables.part_table(tables.pairs(record)).splitlines()) == 1 + len(tables.pairs(record))


def test_memory_is_told_beyond_what_is_held(changed):
    base, salient = tables.pairs(changed)["resnet18"]
    base |= {"held_bytes": 100, "peak_bytes": 200}
    salient |= {"held_bytes": 100, "peak_bytes": 350}
    lines = tables.memory_table(tables.pairs(changed)).splitlines()
    assert lines[0] == "resnet18     2.5 times the memory beyond parameters and batch"
