"""Training loses nothing: killed, stopped, without room on the disk, with damaged files, with bad numbers."""

import dataclasses
import hashlib
import itertools
import math
import random
import re
import resource
import signal
import time

import pytest
import torch

from salnb import results
from salnb.train import Interrupted, NonFiniteError, fit, loop
from salnb.train.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from salnb.train.signals import noticed_signals
from tests.helpers import runs
from tests.helpers.runs import check_same, rows, settings, silent, without_times

pytestmark = pytest.mark.usefixtures("cache")


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
    assert runs.kill(process)
    assert not (tmp_path / "run" / "summary.json").exists()
    fit(config, resume=True, log=silent)
    check_same(tmp_path / "run", whole)


def kill_at_random(folder, cache, whole, *, kills):
    """Kill runs at random moments, each again and again until it is through, so many times in all."""
    chance, killed = random.Random(kills), 0
    for number in itertools.count():
        config = settings(folder / str(number))
        span = whole[1]["seconds"] / 2
        while True:
            process, pipe = runs.start(config, cache=cache)
            runs.wait_for(pipe, "started")
            process.join(chance.uniform(0, span))
            if not runs.kill(process):
                break
            killed += 1
            span *= 1.5  # the machine may be busier than it was during the whole run, and get nothing done
        fit(config, resume=True, log=silent)
        check_same(folder / str(number), whole)
        if killed >= kills:
            return


def test_runs_killed_at_random_moments(tmp_path, cache, whole):
    kill_at_random(tmp_path, cache, whole, kills=3)


@pytest.mark.slow
def test_runs_killed_at_random_moments_many_times(tmp_path, cache, whole):
    kill_at_random(tmp_path, cache, whole, kills=40)


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
    evaluate, calls = loop.evaluate, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr("salnb.train.loop.evaluate", interrupted)
    config = settings(tmp_path / "run", save_minutes=100)
    with pytest.raises(Interrupted, match="after step 8"):
        fit(config, log=silent)
    fit(config, resume=True, log=silent)
    assert without_times(rows(tmp_path / "run")) == without_times(rows(whole[0]))


@pytest.fixture
def ctrl_c():
    """Python's own handler, also where these tests run in the background of a shell, which has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_before_there_is_anything_to_save_a_signal_acts_at_once(tmp_path, monkeypatch, ctrl_c):
    monkeypatch.setattr("salnb.data.load", lambda *args, **options: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(settings(tmp_path / "run"), log=silent)
    assert not isinstance(stopped.value, Interrupted)
    assert not (tmp_path / "run").exists()


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch, ctrl_c):
    """torchrun passes on what a terminal or a scheduler sends to all processes anyhow."""
    monkeypatch.setattr("salnb.train.signals._ONE_REQUEST", math.inf)  # however busy the machine is
    with noticed_signals() as seen:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert seen == [signal.SIGTERM]
        monkeypatch.setattr("salnb.train.signals._ONE_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):  # whoever asks again later does not want to wait
            signal.raise_signal(signal.SIGINT)


def test_two_processes_cannot_work_in_one_folder(tmp_path, cache, whole, monkeypatch):
    config = settings(tmp_path / "run")
    process, pipe = runs.start(config, cache=cache, inject=runs.stop_while_writing_a_checkpoint)
    runs.wait_for(pipe, "here")
    monkeypatch.setattr("salnb._common.files._PATIENCE", 0.0)
    with pytest.raises(FileExistsError, match="another process is at work"):
        fit(config, resume=True, log=silent)
    runs.kill(process)
    fit(config, resume=True, log=silent)
    check_same(tmp_path / "run", whole)


def test_the_command_saves_and_answers_with_the_signal(tmp_path, cache):
    arguments = ["train", "--data", "cifar10", "--batch-size", "4", "--device", "cpu", "--epochs", "100000"]
    process = runs.start_command([*arguments, "--out", str(tmp_path / "run")], tmp_path, cache=cache)
    while not (tmp_path / "stdout").exists() or "\n" not in (tmp_path / "stdout").read_text():
        assert process.is_alive()
        time.sleep(0.02)
    assert (tmp_path / "stdout").read_text().startswith("epoch 1/100000: class_loss ")
    process.terminate()
    process.join()
    stderr = (tmp_path / "stderr").read_text()
    assert process.exitcode == 128 + signal.SIGTERM
    assert re.search(
        r"stopped by SIGTERM after step \d+, saved in .*checkpoints: go on with --resume", stderr
    )
    assert "Traceback" not in stderr
    step = int(re.search(r"step (\d+)", stderr)[1])
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == step


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


def test_a_checkpoint_of_something_else_is_named(stopped):
    config, out = stopped
    path = save_checkpoint(out / "checkpoints", 99, {"step": 99})
    with pytest.raises(ValueError, match=f"the run cannot go on from {path}: KeyError: 'epoch'"):
        fit(config, resume=True, log=silent)
    path.unlink()
    path = out / "checkpoints" / f"step-000000099.{hashlib.sha256(b'torch 9').hexdigest()[:16]}.pt"
    path.write_bytes(b"torch 9")
    with pytest.raises(ValueError, match=f"the run cannot go on from {path}: "):
        fit(config, resume=True, log=silent)
    path.unlink()
    state = load_checkpoint(out / "checkpoints")
    state["objective"].popitem(last=False)
    save_checkpoint(out / "checkpoints", 99, state)
    with pytest.raises(ValueError, match=r"the run cannot go on from .*: RuntimeError: .* Missing key"):
        fit(config, resume=True, log=silent)


def test_metrics_that_were_altered_are_written_again(stopped, whole):
    config, out = stopped
    (out / "metrics.jsonl").write_bytes(b"\xff{")
    (out / "checkpoints" / "step-000000099.0123.pt").mkdir()
    fit(config, resume=True, log=silent)
    (out / "checkpoints" / "step-000000099.0123.pt").rmdir()
    check_same(out, whole)


def test_a_finished_run_is_not_run_again(whole, monkeypatch):
    out, summary = whole
    monkeypatch.setattr("salnb.train.loop.train_epoch", None)
    assert fit(settings(out), resume=True, log=silent) == summary


def test_what_does_not_change_the_result_may_change(stopped, whole):
    config, _ = stopped
    changed = dataclasses.replace(config, save_minutes=7, workers=1)
    assert fit(changed, resume=True, log=silent)["parameters_sha256"] == whole[1]["parameters_sha256"]


# --- what can go wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    import salnb.objective.terms

    loss, calls = salnb.objective.terms.saliency_loss, itertools.count(1)
    monkeypatch.setattr(
        salnb.objective.terms,
        "saliency_loss",
        lambda *a, **k: loss(*a, **k) * (value if next(calls) == 7 else 1),
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
    finish_epoch = loop.finish_epoch

    def full(*args):
        finish_epoch(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    loop.finish_epoch = full


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
    for device in ("cuda:1", "mps"):
        if device == "mps" and torch.backends.mps.is_available():
            continue
        with pytest.raises(ValueError, match=f"device {device} is not on this machine"):
            fit(settings(tmp_path / "run", device=device), log=silent)


def test_a_network_of_timm_that_cannot_take_the_size(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"model timm:vit_tiny_patch16_224 cannot take images of size 32"):
        fit(settings(tmp_path / "run", model="timm:vit_tiny_patch16_224"), log=silent)


def test_a_network_of_timm_that_the_method_does_not_suit(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("salnb.data.load", None)  # it is told before that
    with pytest.raises(
        ValueError, match="method grad_cam at size 32: layer must have an output of more than"
    ):
        fit(settings(tmp_path / "run", model="timm:resnet18", method="grad_cam"), log=silent)
    assert not (tmp_path / "run").exists()
