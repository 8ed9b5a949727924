"""Training: the loop does what its documentation says, in one process and in two."""

import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from salnb import data, models, results
from salnb.__main__ import main
from salnb.augment import AUGMENTATIONS
from salnb.objective import Objective
from salnb.train import fit
from salnb.train.checkpoint import load_checkpoint
from salnb.train.setup import derived_seed, make_schedule
from tests.helpers import runs
from tests.helpers.runs import rows, settings, silent, without_times

pytestmark = pytest.mark.usefixtures("cache")


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


def test_a_package_for_the_end_is_asked_for_at_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"model.safetensors needs .*pip install 'salnb\[train\]'"):
        fit(settings(tmp_path / "run"), log=silent)
    assert not (tmp_path / "run" / "config.json").exists()


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
        {"method": "smoothgrad", "samples": 2, "detach_original": True},
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


# --- what may fail beside it -------------------------------------------------------------------------------


def fail(*args, **options):
    raise RuntimeError("is broken")


@pytest.fixture
def masked(monkeypatch):
    """The images come with masks."""
    sets = data.load("cifar10", 32)
    for split in (sets.validation, sets.test):
        split.masks = torch.ones(len(split), 1, 32, 32, dtype=torch.bool)
    monkeypatch.setattr(data, "load", lambda *args, **options: sets)


BESIDE = {
    "salnb.results.peak_memory": ["peak_memory_bytes"],
    "salnb.results.parameters_sha256": ["parameters_sha256"],
    "salnb.results.provenance": ["provenance"],
    "salnb.saliency.vanilla_gradient": ["validation_saliency_on_object", "test_saliency_on_object"],
    "salnb.trust.share_on_object": ["validation_saliency_on_object", "test_saliency_on_object"],
}


@pytest.mark.parametrize("target", BESIDE)
def test_a_summary_does_without_what_fails_beside_the_accuracy(tmp_path, masked, monkeypatch, target):
    options = {"epochs": 1, "gamma": 0}
    whole = fit(settings(tmp_path / "whole", **options), log=silent)
    assert whole["test_saliency_on_object"] == pytest.approx(1)
    monkeypatch.setattr(target, fail)
    summary = fit(settings(tmp_path / "run", **options), log=silent)
    assert results.read_record(tmp_path / "run" / "summary.json") == summary
    (row,) = rows(tmp_path / "run")
    for name in BESIDE[target]:
        record = row if name.startswith("validation") else summary
        assert record[name] is None
        assert record.pop("missing") == {name: "RuntimeError: is broken"}
    assert "missing" not in summary
    assert summary.keys() == whole.keys()
    assert summary["test_accuracy"] == whole["test_accuracy"]
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["history"][0].keys() >= row.keys()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_of_the_test_that_is_not_finite_costs_no_summary(tmp_path, monkeypatch, value):
    monkeypatch.setattr("salnb.train.evaluate.MeanMetric.compute", lambda self: torch.tensor(value))
    summary = fit(settings(tmp_path / "run", epochs=1), log=silent)
    assert results.read_record(tmp_path / "run" / "summary.json") == summary
    assert summary["test_loss"] is None
    assert summary["missing"] == {"test_loss": f"ArithmeticError: it is {value}"}
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line


def test_what_a_log_raises_costs_no_epoch(tmp_path):
    with pytest.raises(RuntimeError, match="is broken"):
        fit(settings(tmp_path / "run", save_minutes=100), log=fail)
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["epoch"] == 1
    assert len(rows(tmp_path / "run")) == 1


def test_a_run_goes_on_where_nobody_reads_what_it_says(tmp_path, cache):
    """Both pipes are closed at the other end, as `salnb train … | head` does it."""
    command = [sys.executable, "-m", "salnb", "train", "--out", str(tmp_path / "run"), "--save-minutes", "9"]
    for name, value in {"data": "cifar10", "batch_size": 4, "epochs": 2, "device": "cpu"}.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert results.read_record(tmp_path / "run" / "summary.json")["epochs"] == 2


@pytest.mark.parametrize("name", [b"caf\xe9", "Übung 1".encode()])
def test_a_folder_of_any_name(tmp_path, capsys, name):
    out = tmp_path / os.fsdecode(name)
    command = ["train", "--out", str(out), "--data", "cifar10", "--batch-size", "4", "--epochs", "1"]
    assert main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("summary in ") == 1
    assert results.read_record(out / "summary.json")["config"]["out"] == str(out)
    assert main([*command, "--device", "cpu", "--resume"]) == 0


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
    process.communicate()
    assert load_checkpoint(out / "checkpoints")["epoch"] < 60
    subprocess.run([*base, "--out", str(out), "--resume"], env=environment, check=True, capture_output=True)
    hashes = {
        results.read_record(tmp_path / name / "summary.json")["parameters_sha256"]
        for name in ("whole", "run")
    }
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_compiled_run_has_the_same_loss_curve(tmp_path):
    # at a rate at which rounding does not grow from step to step
    options = {"learning_rate": 1e-3, "schedule": "constant"}
    for name, compiled in (("eager", False), ("compiled", True)):
        fit(settings(tmp_path / name, compile=compiled, **options), log=silent)
    for ours, eager in zip(rows(tmp_path / "compiled"), rows(tmp_path / "eager"), strict=True):
        assert ours["total"] == pytest.approx(eager["total"], rel=1e-4)
