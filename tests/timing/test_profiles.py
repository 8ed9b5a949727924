"""Records of profiled steps: what they must hold, and the table made of them."""

import copy
import json

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
    "protocol": lambda r: r.pop("protocol"),
    "provenance": lambda r: r.update(provenance=[]),
    "rows": lambda r: r.pop("rows"),
    r"rows\[1\].network": lambda r: r["rows"][1].pop("network"),
    r"a single value of precision in rows\[0\]": lambda r: r["rows"][0].update(precision=["32"]),
    "kernels of": lambda r: r["rows"][0].pop("kernels"),
    "kernels of resnet50": lambda r: r["rows"][0]["kernels"].insert(0, ["gemm", "long", 3]),
    "the dearest first": lambda r: r["rows"][0]["kernels"].reverse(),
}


@pytest.mark.parametrize(("place", "change"), BROKEN.items(), ids=BROKEN)
def test_what_is_wrong_is_named(place, change):
    with pytest.raises(ValueError, match=f"profiled steps: there must be .*{place}"):
        check_profile(changed(change))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(changed(lambda r: r.pop("rows"))))
    with pytest.raises(
        ValueError, match=r"profile\.json: not a record of profiled steps: there must be rows"
    ):
        read_profile(path)


def test_the_memory_of_a_captured_step_may_be_unknown_and_of_no_other():
    captured = read_profile(published() / "profile-nvidia-h100-captured.json")
    unknown = [row for row in captured["rows"] if row["peak_bytes"] is None]
    assert unknown
    assert all(row["captured"] for row in unknown)
    lines = profile_table(captured).splitlines()
    assert "| resnet50, bf16 captured | 29.8 | 49.3 | 1.66 | 29.6 | 48.6 | 998 | 2448 | – |" in lines
    assert "| resnet50, bf16 eager fused | 30.7 | 157.3 | 5.12 | 29.5 | 49.4 | 996 | 2114 | 1.92 |" in lines
    with pytest.raises(ValueError, match="peak_bytes of resnet50, bf16, eager"):
        check_profile(changed(lambda record: record["rows"][0].update(peak_bytes=None)))
    captured["rows"][0].pop("peak_bytes")
    with pytest.raises(ValueError, match="peak_bytes of"):
        check_profile(captured)


def test_the_table_has_each_step_beside_its_baseline():
    lines = profile_table(RECORD).splitlines()
    assert len(lines) == 2 + len(RECORD["rows"]) // 2
    assert "| resnet50, bf16 eager | 30.9 | 99.7 | 3.23 | 29.5 | 91.3 | 998 | 3959 | 2.01 |" in lines
