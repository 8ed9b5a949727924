"""Studies in one process: every training once, whatever stops them; the choice of weights; what is shown."""

import functools
import io
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch

import salnb.losses
from salnb import results, statistics, study
from salnb.study import Scale, choose_gammas, grids, runner
from salnb.study.grids import trainings
from salnb.study.runner import run_training
from salnb.train import Interrupted, fit, loop
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("cache")

# four trainings of eight steps
TRAINING = {"batch_size": 4, "epochs": 2, "device": "cpu", "save_minutes": 0}


def scale_of(**changes):
    values = {"data": ["cifar10"], "networks": ["small"], "seeds": [0, 1], "training": TRAINING}
    return Scale(name="twenty", **values | changes)


def run(folder, name="table2", scale=None, **options):
    return study.run(name, scale or scale_of(), folder, **{"display": io.StringIO()} | options)


def hashes(records):
    return {record["name"]: record["result"]["parameters_sha256"] for record in records}


def files(folder):
    """Each file but the lock, with when it was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A study that nothing interrupts: its folder and its records."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.fixture
def counted(monkeypatch):
    """The folders of the trainings that are run."""
    seen = []
    monkeypatch.setattr(
        runner, "fit", lambda config, **options: seen.append(config.out) or fit(config, **options)
    )
    return seen


# --- records -----------------------------------------------------------------------------------------------


def test_each_training_has_its_record(finished):
    folder, records = finished
    planned = trainings("table2", scale_of(), *grids.UNCHOSEN)
    assert [r["name"] for r in records] == [t.name for t in planned]
    for training, record in zip(planned, records, strict=True):
        assert record == results.read_record(folder / "table2" / f"{training.name}.json")
        assert (record["study"], record["scale"], record["status"]) == ("table2", "twenty", "done")
        assert (record["factors"], record["warnings"]) == (training.factors, [])
        assert training.config(folder).differences(record["result"]["config"]) == ""
        assert record["result"]["provenance"]["versions"]["torch"] == torch.__version__
    assert {r["name"]: r for r in study.read(folder, "table2")} == {r["name"]: r for r in records}
    assert len(set(hashes(records).values())) == 4
    (comparison,) = statistics.compare(records)
    assert comparison.n == 2


def test_a_record_holds_what_the_training_alone_gives(finished, tmp_path):
    folder, records = finished
    place = Path(records[2]["result"]["config"]["out"])
    assert not place.is_absolute(), "a published record would tell of this machine's folders"
    assert (folder / place / "summary.json").exists()
    alone = fit(
        runs.settings(tmp_path / "run", augmentation="simclr", seed=1, gamma=0, epochs=2), log=runs.silent
    )
    assert records[2]["factors"] == {
        "data": "cifar10", "network": "small", "augmentation": "simclr", "strategy": "reference", "seed": 1,
    }  # fmt: skip
    assert records[2]["result"]["parameters_sha256"] == alone["parameters_sha256"]


def test_reference_and_saliency_see_the_same(finished, tmp_path):
    """They start from the same weights and go through the same batches: with next to no weight, they are one."""
    with_it = run(tmp_path, scale=scale_of(seeds=[0], gammas=[1e-30]))
    reference, saliency = (record["result"] for record in with_it)
    assert saliency["saliency_loss"] > 0
    assert reference["saliency_loss"] == 0
    assert saliency["parameters_sha256"] == reference["parameters_sha256"]


def test_records_that_are_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no record of table1 in .*: run `salnb study table1`"
    ):
        study.read(tmp_path, "table1")


def test_finished_trainings_are_never_repeated(finished, counted):
    folder, records = finished
    before = files(folder)
    assert run(folder) == records
    assert counted == []
    assert files(folder) == before
    # even where only the records are left
    assert len(before) > 8


def test_more_seeds_run_only_what_is_new(finished, counted, tmp_path):
    folder, records = finished
    os.rename(folder, tmp_path / "more")
    try:
        more = run(tmp_path / "more", scale=scale_of(seeds=[0, 1, 2]))
    finally:
        os.rename(tmp_path / "more", folder)
    assert len(counted) == 2
    assert more[:4] == records
    assert [r["factors"]["seed"] for r in more[4:]] == [2, 2]
    for record in more[4:]:
        (folder / "table2" / f"{record['name']}.json").unlink()


def test_a_study_chooses_its_weight_first_and_keeps_to_it(tmp_path, counted):
    scale = scale_of(seeds=[0], gammas=[1e-9, 1e9], gamma_seeds=[7], training=TRAINING | {"epochs": 1})
    records = run(tmp_path, "table2", scale)
    chosen = choose_gammas(study.read(tmp_path, "gamma"))["cifar10"]
    assert [r["result"]["config"]["gamma"] for r in records] == [0, chosen]
    assert {r["factors"]["seed"] for r in study.read(tmp_path, "gamma")} == {7}
    assert len(counted) == 3 + 2
    before = files(tmp_path)
    assert run(tmp_path, "table2", scale) == records
    assert files(tmp_path) == before
    # the papers' weights need no choice
    run(tmp_path / "three", "table3", scale)
    assert not (tmp_path / "three" / "gamma").exists()


# --- what stops a study ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_study_goes_on_where_it_was(tmp_path, finished, monkeypatch, counted, name):
    step_generator, calls = loop.step_generator, []

    def stop(at_run):
        calls.append(at_run.step)
        if len(calls) == 8 + 6:  # within the second training
            signal.raise_signal(signal.Signals[name])
        return step_generator(at_run)

    monkeypatch.setattr("salnb.train.loop.step_generator", stop)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path)
    assert stopped.value.signal == signal.Signals[name]
    assert len(study.read(tmp_path, "table2")) == 1
    before, done = files(tmp_path), counted[0]
    assert hashes(run(tmp_path)) == hashes(finished[1])
    # the first is left alone, the second goes on behind its sixth step
    assert counted.count(done) == 1
    assert counted[1] == counted[2]
    assert calls == [*range(8), *range(6), 6, 7, *range(8), *range(8)]
    after = files(tmp_path)
    assert all(after[path] == time for path, time in before.items() if done in str(path))


def _study(folder, log):
    """A study in a process of its own, which reports each step of its second training."""
    step_generator = loop.step_generator

    def reported(at_run):
        log(f"seed {at_run.config.seed} gamma {at_run.config.gamma:g} step {at_run.step}")
        return step_generator(at_run)

    loop.step_generator = reported
    return hashes(run(folder))


def test_a_killed_study_goes_on_where_it_was(tmp_path, cache, finished, monkeypatch):
    monkeypatch.setattr("salnb._common.files._PATIENCE", 0.0)
    process, pipe = runs.start_call(functools.partial(_study, tmp_path), cache=cache)
    runs.wait_for(pipe, "seed 0 gamma 1 step 5")
    # nobody else may work there meanwhile
    with pytest.raises(FileExistsError, match=rf"out {tmp_path}: another process is at work there"):
        run(tmp_path)
    assert runs.kill(process)
    before = files(tmp_path)
    process, pipe = runs.start_call(functools.partial(_study, tmp_path), cache=cache)
    steps = []
    while not isinstance(report := pipe.recv(), dict):
        assert not isinstance(report, BaseException), report
        steps.append(report)
    process.join(60)
    assert report == hashes(finished[1])
    assert steps[0] == "started"
    begun = int(steps[1].removeprefix("seed 0 gamma 1 step "))
    assert begun >= 5
    assert len(steps) == 1 + (8 - begun) + 8 + 8
    (record,) = (path for path in before if path.parent.name == "table2")
    assert files(tmp_path)[record] == before[record]


# --- what fails --------------------------------------------------------------------------------------------


def test_a_failed_training_leaves_its_error_and_the_others_go_on(tmp_path, finished, monkeypatch):
    loss = salnb.losses.saliency_loss
    monkeypatch.setattr("salnb.objective.terms.saliency_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    display = io.StringIO()
    records = run(tmp_path, display=display)
    assert [r["status"] for r in records] == ["done", "failed", "done", "failed"]
    failed = records[1]
    assert failed["error"].startswith("NonFiniteError: saliency_loss is nan in step 1")
    assert "in add_steps" in "".join(failed["trace"])
    assert failed == results.read_record(tmp_path / "table2" / f"{failed['name']}.json")
    assert f"{failed['name']}: NonFiniteError" in display.getvalue()
    assert "2 of 4 done, 2 failed" in display.getvalue()
    # when the study is started again, they are tried again, and only they
    monkeypatch.undo()
    before = files(tmp_path)
    again = run(tmp_path)
    assert hashes(again) == hashes(finished[1])
    assert [a == b for a, b in zip(again, records, strict=True)] == [True, False, True, False]
    for record in (records[0], records[2]):
        path = tmp_path / "table2" / f"{record['name']}.json"
        assert files(tmp_path)[path] == before[path]


def fail(*args, **options):
    raise RuntimeError("is broken")


@pytest.mark.parametrize("target", ["peak_memory", "parameters_sha256", "provenance", "commit"])
def test_a_record_does_without_what_fails_beside_the_measurement(tmp_path, finished, monkeypatch, target):
    monkeypatch.setattr(results, target, fail)
    first, _ = run(tmp_path, scale=scale_of(seeds=[0], training=TRAINING | {"epochs": 2}))
    assert first == results.read_record(tmp_path / "table2" / f"{first['name']}.json")
    whole, found = finished[1][0]["result"], first["result"]
    assert (first["status"], found["test_accuracy"]) == ("done", whole["test_accuracy"])
    place = found["provenance"] if target == "commit" else found
    field = {"peak_memory": "peak_memory_bytes"}.get(target, target)
    assert place.pop("missing") == {field: "RuntimeError: is broken"}
    assert place[field] is None
    assert found.keys() == whole.keys()
    # what is there is enough to go on
    assert run(tmp_path, scale=scale_of(seeds=[0]))[0]["name"] == first["name"]


@pytest.mark.parametrize("place", ["file", "file/deeper", "x" * 300, "\ud800"], ids=ascii)
def test_a_folder_that_cannot_be_made_is_named(tmp_path, counted, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out must be a folder that can be written to, got '.*': ") as refused:
        run(tmp_path / place)
    assert ascii(place)[1:-1] in ascii(str(refused.value)).replace("\\\\", "\\")
    with pytest.raises(ValueError, match="out must name a folder, got ''"):
        run("")
    assert counted == []


def test_a_folder_whose_name_is_no_utf8_is_as_good_as_any(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    records = run(folder, scale=scale_of(seeds=[0], training=TRAINING | {"epochs": 1}))
    assert [record["status"] for record in records] == ["done", "done"]
    assert len(study.read(folder, "table2")) == 2


def test_a_full_disk_costs_no_record_that_was_there(tmp_path, monkeypatch, counted):
    one = scale_of(seeds=[0], training=TRAINING | {"epochs": 1})
    (tmp_path / "table2").mkdir()
    (tmp_path / "table2" / ".draft-killed").write_text("half a rec")
    write, left = results.write_record, [False, True]

    def fill(path, record):
        if path.parent.name == "table2" and not left.pop():
            raise OSError(28, "No space left on device", str(path))
        write(path, record)

    monkeypatch.setattr(results, "write_record", fill)
    with pytest.raises(OSError, match=r"out must be a folder .*, got '.*': No space left on device"):
        run(tmp_path, scale=one)
    monkeypatch.undo()
    (path,) = (tmp_path / "table2").iterdir()
    before = files(tmp_path)
    assert len(run(tmp_path, scale=one)) == 2
    assert files(tmp_path)[path] == before[path]


@pytest.mark.parametrize("damage", ["cut", "other study"])
def test_a_record_that_is_damaged_stops_the_study_with_its_name(tmp_path, finished, counted, damage):
    planned = trainings("table2", scale_of(), *grids.UNCHOSEN)[2]
    path = tmp_path / "table2" / f"{planned.name}.json"
    results.write_record(path, finished[1][2] | {"study": "table1"})
    if damage == "cut":
        path.write_text(path.read_text()[:200])
    message = {
        "cut": "is not a record",
        "other study": "is no record of the study 'table2', got one of 'table1'",
    }
    with pytest.raises(ValueError, match=f"{path} {message[damage]}"):
        run(tmp_path)
    assert counted == []


def test_a_record_of_other_settings_is_refused(finished, counted):
    folder, _ = finished
    scale = scale_of(training=TRAINING | {"learning_rate": 0.25, "epochs": 3})
    with pytest.raises(
        ValueError, match=r"other settings: .*epochs 2 \(now 3\), .*learning_rate 0.05 \(now 0.25\)"
    ):
        run(folder, scale=scale)
    assert counted == []
    # how it is run is no such setting
    assert len(run(folder, scale=scale_of(training=TRAINING | {"device": "auto", "save_minutes": 5}))) == 4


def test_mistakes_are_found_before_anything_is_run(tmp_path, counted):
    with pytest.raises(ValueError, match="model 'resnet81' is unknown"):
        run(tmp_path / "out", scale=scale_of(networks=["small", "resnet81"]))
    with pytest.raises(ValueError, match=r"study 'tabel2' is unknown \(did you mean 'table2'\?\)"):
        run(tmp_path / "out", "tabel2")
    assert counted == []
    assert not (tmp_path / "out").exists()


def test_warnings_are_kept_and_nothing_is_printed(tmp_path, monkeypatch, capfd):
    def warning(config, **options):
        warnings.warn("a checkpoint is damaged", stacklevel=1)
        warnings.warn("a checkpoint is damaged", stacklevel=1)
        return fit(config, **options)

    monkeypatch.setattr("salnb.study.runner.fit", warning)
    training = trainings("table2", scale_of(), *grids.UNCHOSEN)[0]
    record = run_training(training, tmp_path)
    assert record["warnings"] == ["UserWarning: a checkpoint is damaged"]
    assert capfd.readouterr() == ("", "")
