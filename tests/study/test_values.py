"""Numbers out of records."""

import pytest

from salnb import results
from salnb.study import values


def record(seed, variant="default", status="done", study="open", name="a", **result):
    factors = {"data": "digit-scenes", "variant": variant, "seed": seed}
    return {"study": study, "name": name, "status": status, "factors": factors, "result": result}


RECORDS = [
    record(0, "reference", test_accuracy=0.5, share=0.1),
    record(0, test_accuracy=0.6, share=0.3),
    record(1, "reference", test_accuracy=0.5, share=0.2),
    record(1, test_accuracy=0.4, share=0.5),
    record(2, status="failed"),
]


def test_published_records_are_read_by_scale_and_name(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "published", lambda: tmp_path)
    paths = ["laptop/open/b.json", "laptop/open/c.json", "laptop-strong/open/a.json", "laptop/table1/a.json"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        results.write_record(tmp_path / path, record(0, study=path.split("/")[1], name=path))
    assert [r["name"] for r in values.recorded("open")] == paths[:3]
    assert values.recorded("table2") == []


WRONG = [
    ({"study": "table1"}, "is no record of the study 'open', got one of 'table1'"),
    ({"study": None}, "is no record of the study 'open', got one of None"),
    ({"status": "running"}, "status must be 'done' or 'failed', got 'running'"),
    ({"status": "failed"}, "error must be of type str, got None"),
    ({"result": None}, "result must be of type dict, got None"),
    ({"factors": [1]}, r"factors must be of type dict, got \[1\]"),
    ({"name": 3}, "name must be of type str, got 3"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_record_that_is_none_of_the_study_is_named(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(results, "published", lambda: tmp_path)
    path = tmp_path / "laptop" / "open" / "a.json"
    results.write_record(path, record(0) | changes)
    for read in (lambda: values.recorded("open"), lambda: values.read(tmp_path / "laptop", "open")):
        with pytest.raises(ValueError, match=f"{path}:? {message}"):
            read()
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match=f"{path} is not a record"):
        values.recorded("open")


def test_failed_trainings_have_no_results():
    assert values.done(RECORDS) == RECORDS[:4]
    assert values.matching(RECORDS, variant="default") == [RECORDS[1], RECORDS[3]]
    assert values.of_trainings(RECORDS, "test_accuracy", variant="default", seed=1) == [0.4]


def test_joint_differences_belong_to_one_training():
    found = values.joint_differences(RECORDS, "variant", "reference", ("share", "test_accuracy"))
    assert found == [pytest.approx((0.2, 0.1)), pytest.approx((0.3, -0.1))]


@pytest.mark.parametrize(
    ("warmup", "every", "share"), [(0, 1, 1.0), (50, 1, 0.5), (0, 4, 0.25), (50, 2, 0.25)]
)
def test_share_of_steps_with_saliency(warmup, every, share):
    one = record(0, config={"warmup": warmup, "every": every}, steps=100)
    assert values.saliency_share(one) == share
