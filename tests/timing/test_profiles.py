"""Records of profiled steps: what they must hold, and the table made of them."""

import copy

import pytest

from salnb.results import published
from salnb.timing import profile_table, read_profile
from salnb.timing.profiles import check_profile

RECORD = read_profile(published() / "profile-nvidia-h100.json")


def changed(change):
    record = copy.deepcopy(RECORD)
    change(record)
    return record


BROKEN = {
    "schema": lambda r: r.update(schema="salnb timing 1"),
    "provenance.commit": lambda r: r["provenance"].pop("commit"),
    "lacks": lambda r: r.update(lacks={}),
    "each of a case of its own": lambda r: r["rows"].append(r["rows"][0]),
    "the baseline of resnet50, bf16, eager, 32.32, vanilla gradient": lambda r: r["rows"].pop(0),
    "median_seconds of": lambda r: r["rows"][0].update(median_seconds=0.0),
    "launches of": lambda r: r["rows"][0].update(launches=9.5),
    "the dearest first": lambda r: r["rows"][0]["kernels"].reverse(),
}


@pytest.mark.parametrize(("place", "change"), BROKEN.items(), ids=BROKEN)
def test_what_is_wrong_is_named(place, change):
    with pytest.raises(ValueError, match=f"profiled steps: there must be .*{place}"):
        check_profile(changed(change))


def test_the_table_has_each_step_beside_its_baseline():
    lines = profile_table(RECORD).splitlines()
    assert len(lines) == 2 + len(RECORD["rows"]) // 2
    assert "| resnet50, bf16 eager | 30.9 | 99.7 | 3.23 | 29.5 | 91.3 | 998 | 3959 | 2.01 |" in lines
