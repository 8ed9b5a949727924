"""Studies on Ray: a real cluster on this machine, workers that die, every record once."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from salnb import results, study
from salnb.study import grids, on_ray
from salnb.study.grids import trainings
from salnb.study.on_ray import OnRay
from salnb.study.runner import in_process
from salnb.study.scale import Scale
from tests.helpers import ray_worker

ray = pytest.importorskip("ray")
# twelve steps, each saved
TRAINING = {"batch_size": 4, "epochs": 3, "device": "cpu", "save_minutes": 0}


def scale_of(**changes):
    values = {"data": ["cifar10"], "networks": ["small"], "seeds": [0, 1], "training": TRAINING}
    return Scale(name="twenty", **values | changes)


def run(folder, scale=None, **options):
    return study.run(
        "table3", scale or scale_of(), folder, **{"execute": OnRay(), "display": io.StringIO()} | options
    )


def hashes(records):
    assert {record["status"] for record in records} == {"done"}, records
    return {record["name"]: record["result"]["parameters_sha256"] for record in records}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, cache):
    """Two workers, which note down what they do; a busy machine may need more than one try to start Ray."""
    with pytest.MonkeyPatch.context() as patch:
        notes = tmp_path_factory.mktemp("notes")
        patch.setenv("SALNB_TEST_NOTES", str(notes))
        # jsonschema would build a grammar in each of Ray's processes, which then start thrice as slowly
        stub = tmp_path_factory.mktemp("stub")
        (stub / "rfc3987_syntax.py").write_text("raise ImportError")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(stub), *filter(None, sys.path)]))
        for _ in range(5):
            try:
                ray.init(
                    num_cpus=2,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                    runtime_env={"worker_process_setup_hook": ray_worker.prepare},
                )
                break
            except Exception:
                ray.shutdown()
        yield notes
        ray.shutdown()


@pytest.fixture
def notes(cluster):
    """The folder of the workers' notes, emptied."""
    empty(cluster)
    return cluster


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, cache):
    """What the trainings come to in this process, uninterrupted."""
    return hashes(run(tmp_path_factory.mktemp("here"), execute=in_process))


def attempts(notes):
    """Each beginning of a training: its seed, the step it goes on from, its process."""
    return [tuple(map(int, line.split())) for line in (notes / "attempts").read_text().splitlines()]


def when_it_waits(notes, seed, act):
    """Let the first training of a seed wait after its fifth step, and then do something to its process."""
    (notes / f"stop-{seed}").write_text("5")

    def wait():
        report = notes / f"pid-{seed}"
        while not (report.exists() and report.read_text()):
            time.sleep(0.02)
        act(int(report.read_text()))

    threading.Thread(target=wait, daemon=True).start()


# --- with a cluster ----------------------------------------------------------------------------------------


# of the seed whose first training gets it
SIGNALS = {0: signal.SIGTERM, 1: signal.SIGKILL}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, cluster):
    """A study two of whose workers got a signal: its records and folder, and which processes that were."""
    empty(cluster)
    folder, got = tmp_path_factory.mktemp("interrupted"), {}

    def send(seed, pid):
        got[seed] = pid
        os.kill(pid, SIGNALS[seed])

    for seed in SIGNALS:
        when_it_waits(cluster, seed, partial(send, seed))
    records = run(folder)
    return records, folder, attempts(cluster), got


def test_a_study_whose_workers_die_is_whole(interrupted, expected):
    records, folder, began, _ = interrupted
    assert hashes(records) == expected
    assert sorted(p.stem for p in (folder / "table3").iterdir()) == sorted(expected)
    # ten trainings and two that were gone on with
    assert sorted(step for _, step, _ in began)[:11] == [*[0] * 10, 5]
    assert len(began) == 12


@pytest.mark.parametrize("seed", SIGNALS, ids=[number.name for number in SIGNALS.values()])
def test_a_training_whose_worker_dies_goes_on_in_another(interrupted, seed):
    *_, began, got = interrupted
    (again,) = [(step, pid) for of, step, pid in began if of == seed and step]
    # told to stop, it finishes its step and saves; killed, it has what it had saved
    assert again[0] == {signal.SIGKILL: 5, signal.SIGTERM: 6}[SIGNALS[seed]]
    assert again[1] != got[seed]
    assert got[seed] in {pid for _, _, pid in began}


def test_a_failed_training_leaves_its_error_and_the_others_go_on(tmp_path, notes, expected):
    broken = trainings("table3", scale_of(), *grids.UNCHOSEN)[2]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / os.path.basename(broken.config("").out)).write_text("no folder")
    records = run(tmp_path)
    assert [r["status"] for r in records] == ["done", "done", "failed", *["done"] * 7]
    assert records[2]["error"].startswith("NotADirectoryError: out must be a folder, got the file")
    assert results.read_record(tmp_path / "table3" / f"{broken.name}.json") == records[2]
    assert hashes([r for r in records if r["status"] == "done"]).items() < expected.items()


def test_a_worker_that_dies_again_and_again_is_a_failure(cluster):
    (training, *_) = trainings("table3", scale_of(), *grids.UNCHOSEN)
    reference = ray.remote(max_retries=0)(lambda: os._exit(1)).remote()
    record = on_ray._record(ray, training, reference)
    assert (record["status"], record["factors"]) == ("failed", training.factors)
    assert record["error"].startswith("WorkerCrashedError: ")


def test_a_share_that_no_machine_has(tmp_path, cluster):
    with pytest.raises(
        ValueError, match="share must be at most 2, the CPUs of a machine in the cluster, got 3"
    ):
        run(tmp_path, execute=OnRay(share=3))


@pytest.mark.parametrize("share", [0, -1, float("nan")])
def test_a_share_of_nothing_is_refused(share):
    with pytest.raises(ValueError, match=f"share must be positive, got {share}"):
        OnRay(share=share)


# --- without one -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_is_stopped_and_goes_on(tmp_path, cache, expected):
    """With a cluster of its own, which it starts and ends."""
    scale, out = tmp_path / "twenty.yml", tmp_path / "out"
    values = {"data": ["cifar10"], "networks": ["small"], "seeds": [0, 1], "training": TRAINING}
    scale.write_text(json.dumps({"scale": values}))
    command = [sys.executable, "-m", "salnb", "study", "table3", "--scale", str(scale), "--out", str(out)]
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([*command, "--on", "ray"], stderr=subprocess.PIPE, text=True)
        there = len(list(out.glob("table3/*.json")))
        while len(list(out.glob("table3/*.json"))) == there:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
        assert ("table3: stopped; to go on" in error) == (number == signal.SIGINT)
        time.sleep(10)  # the cluster ends with the process that started it
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
        time.sleep(3)
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == before
        assert there < len(list(out.glob("table3/*.json"))) < 10
    subprocess.run([*command, "--on", "ray"], check=True)
    assert hashes(study.read(out, "table3")) == expected
    assert all(p.stat().st_mtime_ns == time for p, time in before.items() if p.parent.name == "table3")


class Machines:
    """A cluster of so many machines, with so much each."""

    def __init__(self, *resources):
        self.resources = resources

    def nodes(self):
        there = [{"Alive": True, "Resources": resources} for resources in self.resources]
        return [*there, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


@pytest.mark.parametrize(
    ("machines", "kind", "share", "places"),
    [
        ([{"CPU": 2.0}], "CPU", 1, 2),
        ([{"CPU": 2.0}], "CPU", 0.5, 4),
        ([{"CPU": 3.0}, {"CPU": 3.0}], "CPU", 2, 2),  # one on each, and not three
        ([{"GPU": 1.0, "CPU": 2.0}, {"CPU": 8.0}], "GPU", 0.25, 4),
        ([{"GPU": 0.3}], "GPU", 0.1, 3),
        ([], "CPU", 1, 0),
    ],
)
def test_trainings_at_a_time(machines, kind, share, places):
    assert OnRay(share=share)._places(Machines(*machines), kind) == places


def test_without_ray_its_name_is_given(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"on ray needs the package ray: pip install 'salnb\[ray\]'"
    ):
        run(tmp_path)
