"""Training: the loop does what it says, and loses nothing when it is stopped."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from salnb import data, models, results
from salnb._setup import derived_seed, make_schedule
from salnb.augment import AUGMENTATIONS
from salnb.checkpoint import last_checkpoint, load_checkpoint
from salnb.objective import Objective
from salnb.train import Interrupted, NonFiniteError, fit
from tests import runs
from tests.paper_files import put_files
from tests.runs import settings, silent


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Twenty real images as CIFAR-10."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SALNB_CACHE", str(folder))
        put_files("cifar10")
        data.load("cifar10", 32)
        yield folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nothing interrupts: its folder and its summary."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, fit(settings(out), log=silent)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def check_same(out, whole):
    """A run's folder holds what the uninterrupted run's does, to the last bit, and nothing else."""
    folder, summary = whole
    found = results.read_record(out / "summary.json")
    assert found["parameters_sha256"] == summary["parameters_sha256"]
    assert found["test_loss"] == summary["test_loss"]
    assert without_times(rows(out)) == without_times(rows(folder))
    steps = [path.name.split(".")[0] for path in sorted((out / "checkpoints").glob("*.pt"))]
    assert steps == ["step-000000011", "step-000000012"]
    assert not list(out.rglob(".draft-*"))


# --- what a run does ---------------------------------------------------------------------------------------


def test_a_run_leaves_its_records(whole):
    out, summary = whole
    assert results.read_record(out / "summary.json") == summary
    assert results.read_record(out / "config.json") == settings(out).to_dict() == summary["config"]
    assert [row["epoch"] for row in rows(out)] == [1, 2, 3]
    assert [row["step"] for row in rows(out)] == [4, 8, 12]
    assert summary["steps"] == 12
    assert 0 <= summary["test_accuracy"] <= 1
    assert re.fullmatch("[0-9a-f]{64}", summary["parameters_sha256"])
    for row in rows(out):
        assert row["total"] == pytest.approx(row["class_loss"] + row["saliency_loss"], rel=1e-6)
        assert row["saliency_loss"] > 0
    assert summary["seconds"] > summary["training_seconds"] > 0
    assert summary["peak_memory_bytes"] > 1e8
    assert summary["provenance"]["versions"]["torch"] == torch.__version__


def test_a_run_is_the_loop_that_its_documentation_describes(whole):
    """Once more by hand, from the seeds: the same loss curve and the same parameters."""
    out, summary = whole
    config = settings(out)
    torch.manual_seed(derived_seed(0, "weights"))
    objective = Objective(models.build("small", 10), AUGMENTATIONS["affine"]())
    optimizer = torch.optim.SGD(objective.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = make_schedule(config, optimizer, 12)
    train = data.load("cifar10", 32).train
    totals = []
    for step in range(12):
        epoch, batch = divmod(step, 4)
        order = torch.randperm(18, generator=torch.Generator().manual_seed(derived_seed(0, "order", epoch)))
        mine = order[4 * batch : 4 * batch + 4]
        generator = torch.Generator().manual_seed(derived_seed(0, "augmentation", step, 0))
        losses = objective(train.images[mine] / 255, train.labels[mine], generator)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        schedule.step()
        totals.append(losses.total.item())
    curve = [sum(totals[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [row["total"] for row in rows(out)] == pytest.approx(curve, rel=1e-6)
    assert results.parameters_sha256(objective.model) == summary["parameters_sha256"]
    test = data.load("cifar10", 32).test
    with torch.no_grad():
        logits = objective.model.eval()(test.images / 255)
    assert summary["test_accuracy"] == pytest.approx((logits.argmax(1) == test.labels).float().mean().item())
    assert summary["test_loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)


def test_the_seed_decides(tmp_path, whole):
    hashes = {fit(settings(tmp_path / str(s), seed=s), log=silent)["parameters_sha256"] for s in (0, 1)}
    assert whole[1]["parameters_sha256"] in hashes
    assert len(hashes) == 2


def test_a_run_leaves_the_generators_and_signals_as_they_were(tmp_path):
    before = torch.random.get_rng_state(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(settings(tmp_path / "run", epochs=1), log=silent)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before[1:]


def test_a_network_learns(tmp_path):
    """Eighteen images can be learnt by heart."""
    summary = fit(
        settings(tmp_path / "run", augmentation="identity", gamma=0, epochs=15, save_minutes=10), log=silent
    )
    assert summary["train_accuracy"] > 0.8


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_augmentation(tmp_path, augmentation):
    summary = fit(settings(tmp_path / "run", augmentation=augmentation, epochs=1), log=silent)
    assert math.isfinite(summary["total"])


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.5},
        {"method": "grad_cam"},
        {"method": "smoothgrad", "detach_original": True},
        {"normalize": "zscore", "distance": "cosine"},
        {"optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine"},
        {"schedule": "constant"},
        {"precision": "bf16"},
        {"model": "small_groupnorm"},
        {"size": 40},
        {"train_images": 9},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_kind_of_setting_changes_the_run(tmp_path, whole, changes):
    summary = fit(settings(tmp_path / "run", epochs=1, **changes), log=silent)
    assert math.isfinite(summary["total"])
    assert (summary["invariance_loss"] > 0) == ("beta" in changes)
    if "schedule" not in changes:  # which makes no difference to the first losses
        assert summary["total"] != rows(whole[0])[0]["total"]


def test_the_saliency_loss_is_averaged_over_the_steps_that_have_one(tmp_path):
    every = fit(settings(tmp_path / "a", learning_rate=1e-12), log=silent)
    second = fit(settings(tmp_path / "b", learning_rate=1e-12, every=2), log=silent)
    # nothing is learnt, so that both see the same maps, in half of the steps
    assert second["saliency_loss"] == pytest.approx(every["saliency_loss"], rel=0.5)
    late = fit(settings(tmp_path / "c", warmup=100), log=silent)
    assert late["saliency_loss"] == 0


def test_masks_give_the_share_of_saliency_on_the_object(tmp_path, monkeypatch):
    """Where the mask is everything, all saliency is on it; where it is half, some is."""
    sets = data.load("cifar10", 32)
    everywhere = torch.ones(5, 1, 32, 32, dtype=torch.bool)
    half = everywhere.clone()
    half[..., :16] = False
    other_half = ~half
    shares = []
    for number, masks in enumerate((everywhere, half, other_half)):
        sets.test.masks = masks
        monkeypatch.setattr(data, "load", lambda *args, **options: sets)
        summary = fit(settings(tmp_path / str(number), epochs=1), log=silent)
        shares.append(summary["test_saliency_on_object"])
    assert shares[0] == pytest.approx(1)
    assert 0 < shares[1] < 1
    assert shares[1] + shares[2] == pytest.approx(1)


def test_without_masks_no_share_is_reported(whole):
    assert not any("on_object" in name for name in whole[1])


# --- stopping and going on ---------------------------------------------------------------------------------

STOPS = {
    "while a checkpoint is written": runs.stop_while_writing_a_checkpoint,
    "before a checkpoint has its name": runs.stop_before_a_checkpoint_has_its_name,
    "before old checkpoints are removed": runs.stop_before_old_checkpoints_are_removed,
}


@pytest.mark.parametrize("when", STOPS)
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, cache, whole, when):
    config = settings(tmp_path / "run")
    process, pipe = runs.start(config, cache=cache, inject=STOPS[when])
    runs.wait_for(pipe, "here")
    runs.kill(process)
    assert not (tmp_path / "run" / "summary.json").exists()
    fit(config, resume=True, log=silent)
    check_same(tmp_path / "run", whole)


def killed_at_random(config, cache, whole, *, kills, seed):
    """Kill one run again and again, at random moments, until it is through; gives the number of kills."""
    chance, killed = random.Random(seed), 0
    length = whole[1]["seconds"]
    for _ in range(10 * kills):
        process, pipe = runs.start(config, cache=cache)
        runs.wait_for(pipe, "started")
        process.join(chance.uniform(0, length / 3))
        if process.is_alive():
            runs.kill(process)
            killed += 1
        else:
            break
    fit(config, resume=True, log=silent)
    return killed


def test_a_run_killed_at_random_moments(tmp_path, cache, whole):
    killed_at_random(settings(tmp_path / "run"), cache, whole, kills=3, seed=0)
    check_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_runs_killed_at_random_moments_many_times(tmp_path, cache, whole):
    kills = 0
    for number in itertools.count():
        config = settings(tmp_path / str(number))
        kills += killed_at_random(config, cache, whole, kills=20, seed=number)
        check_same(tmp_path / str(number), whole)
        if kills >= 20:
            return


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_save_first(tmp_path, whole, name):
    config = settings(tmp_path / "run", save_minutes=100)
    number = signal.Signals[name]

    def interrupt(line):
        if line.startswith("epoch 1/"):
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match=f"stopped by {name} after step 5.*--resume") as stopped:
        fit(config, log=interrupt)
    assert stopped.value.signal == number
    assert isinstance(stopped.value, KeyboardInterrupt)  # not caught by `except Exception`
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 5
    fit(config, resume=True, log=silent)
    found = results.read_record(tmp_path / "run" / "summary.json")
    assert found["parameters_sha256"] == whole[1]["parameters_sha256"]
    assert without_times(rows(tmp_path / "run")) == without_times(rows(whole[0]))


def test_a_signal_while_evaluating_saves_first(tmp_path, whole, monkeypatch):
    import salnb.train

    evaluate, calls = salnb.train.evaluate, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr(salnb.train, "evaluate", interrupted)
    config = settings(tmp_path / "run", save_minutes=100)
    with pytest.raises(Interrupted, match="after step 8"):
        fit(config, log=silent)
    fit(config, resume=True, log=silent)
    assert without_times(rows(tmp_path / "run")) == without_times(rows(whole[0]))


def test_the_command_saves_and_answers_with_the_signal(tmp_path, cache):
    command = [
        sys.executable,
        "-m",
        "salnb",
        "train",
        "--data",
        "cifar10",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    command += ["--epochs", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("epoch 1/100000: class_loss ")
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search(
        r"stopped by SIGTERM after step \d+, saved in .*checkpoints: go on with --resume", stderr
    )
    assert "Traceback" not in stderr
    step = int(re.search(r"step (\d+)", stderr)[1])
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == step


@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped after six of its steps."""
    config = settings(tmp_path / "run")
    seen = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.SGD.step

        def interrupt(self, *args, **options):
            if next(seen) == 6:
                signal.raise_signal(signal.SIGTERM)
            return step(self, *args, **options)

        patch.setattr(torch.optim.SGD, "step", interrupt)
        with pytest.raises(Interrupted):
            fit(config, log=silent)
    return config, tmp_path / "run"


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, whole, how):
    config, out = stopped
    older, newest = sorted((out / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "empty": b""}[how])
    with pytest.warns(UserWarning, match=rf"{newest.name} is truncated or altered.*before it is used"):
        state = load_checkpoint(out / "checkpoints")
    assert f"step-{state['step']:09d}" == older.name.split(".")[0] == "step-000000006"
    assert newest.with_suffix(".damaged").exists()
    fit(config, resume=True, log=silent)
    check_same(out, whole)


def test_without_a_good_checkpoint_a_run_begins_again(stopped, whole):
    config, out = stopped
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="truncated or altered"):
        fit(config, resume=True, log=silent)
    check_same(out, whole)


def test_a_finished_run_is_not_run_again(whole, monkeypatch):
    out, summary = whole
    monkeypatch.setattr("salnb.train.train_epoch", None)
    assert fit(settings(out), resume=True, log=silent) == summary


def test_what_does_not_change_the_result_may_change(stopped, whole):
    config, _ = stopped
    changed = dataclasses.replace(config, save_minutes=7, workers=1)
    assert fit(changed, resume=True, log=silent)["parameters_sha256"] == whole[1]["parameters_sha256"]


# --- what can go wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    import salnb.objective

    loss, calls = salnb.objective.saliency_loss, itertools.count(1)
    monkeypatch.setattr(
        salnb.objective, "saliency_loss", lambda *a, **k: loss(*a, **k) * (value if next(calls) == 7 else 1)
    )
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError) as error:
        fit(settings(out), log=silent)
    last = last_checkpoint(out / "checkpoints")
    assert str(error.value) == f"saliency_loss is {value} in step 7; the last good checkpoint is {last}"
    assert load_checkpoint(out / "checkpoints")["step"] == 6
    assert not (out / "summary.json").exists()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The loss of the last step before a checkpoint may still be finite."""
    step, calls = torch.optim.SGD.step, itertools.count(1)

    def overflow(self, *args, **options):
        step(self, *args, **options)
        if next(calls) == 4:
            self.param_groups[0]["params"][0].data.flatten()[0] = math.nan

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    with pytest.raises(NonFiniteError, match=r"parameters are not finite after step 4; .*step-000000003"):
        fit(settings(tmp_path / "run"), log=silent)
    state = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert all(
        tensor.isfinite().all() for name, tensor in state["objective"].items() if torch.is_tensor(tensor)
    )


def fill_the_disk(pipe):
    """After the first epoch nothing of some length can be written any more."""
    import salnb.train

    finish_epoch = salnb.train.finish_epoch

    def full(*args):
        finish_epoch(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    salnb.train.finish_epoch = full


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, cache, whole):
    config = settings(tmp_path / "run")
    error = runs.finish(*runs.start(config, cache=cache, inject=fill_the_disk))
    assert isinstance(error, OSError)
    assert "nothing more could be written after step 5: File too large" in str(error)
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert f"the last good checkpoint is {last}" in str(error)
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 4
    fit(config, resume=True, log=silent)
    check_same(tmp_path / "run", whole)


def test_a_batch_larger_than_the_files_hold(tmp_path):
    with pytest.raises(
        ValueError, match="batch_size must be at most 18, the number of training images, got 19"
    ):
        fit(settings(tmp_path / "run", batch_size=19), log=silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="device cuda:1 is not on this machine"):
        fit(settings(tmp_path / "run", device="cuda:1"), log=silent)


def test_a_network_of_timm_that_cannot_take_the_size(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"model timm:vit_tiny_patch16_224 cannot take images of size 32"):
        fit(settings(tmp_path / "run", model="timm:vit_tiny_patch16_224"), log=silent)


# --- several processes -------------------------------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path, cache):
    """torchrun as it is: the same loss curve as one process with the same batch, for a network without batch norm."""
    options = {"model": "small_groupnorm", "epochs": 2, "beta": 0.5}
    fit(settings(tmp_path / "one", **options), log=silent)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "salnb", "train", "--out", str(tmp_path / "two")]
    for name, value in (runs.DEFAULTS | options).items():
        command += ["--" + name.replace("_", "-"), str(value)]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("epoch 1/2") == 1
    for one, two in zip(*(without_times(rows(tmp_path / name)) for name in ("one", "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    summary = results.read_record(tmp_path / "two" / "summary.json")
    assert summary["processes"] == 2
    one, two = (load_checkpoint(tmp_path / name / "checkpoints") for name in ("one", "two"))
    for name, tensor in one["objective"].items():
        if torch.is_tensor(tensor):
            torch.testing.assert_close(two["objective"][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_and_go_on(tmp_path, cache):
    base = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    base += ["salnb", "train", "--data", "cifar10", "--batch-size", "4", "--device", "cpu", "--epochs", "60"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*base, "--out", str(tmp_path / "whole")], env=environment, capture_output=True)
    assert whole.returncode == 0
    out = tmp_path / "run"
    process = subprocess.Popen([*base, "--out", str(out)], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    process.terminate()
    process.communicate(timeout=90)
    assert load_checkpoint(out / "checkpoints")["epoch"] < 60
    subprocess.run([*base, "--out", str(out), "--resume"], env=environment, check=True, capture_output=True)
    hashes = {
        results.read_record(tmp_path / name / "summary.json")["parameters_sha256"]
        for name in ("whole", "run")
    }
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_compiled_run_has_the_same_loss_curve(tmp_path, whole):
    start = time.perf_counter()
    fit(settings(tmp_path / "run", compile=True), log=silent)
    for ours, eager in zip(rows(tmp_path / "run"), rows(whole[0]), strict=True):
        assert ours["total"] == pytest.approx(eager["total"], rel=1e-3)
    assert time.perf_counter() - start < 600
