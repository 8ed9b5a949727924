"""A signal to a run and to the processes that decode for it, as schedulers, `timeout` and terminals send it."""

import itertools
import multiprocessing
import os
import re
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy

from salnb.train import Interrupted, fit
from salnb.train.checkpoint import load_checkpoint
from tests.helpers import runs
from tests.helpers.runs import rows, settings, silent, without_times

_FOLDER = {"data": "folder", "size": 16, "workers": 2}


def linger(pipe, owner, name, number):
    """Be the first of a group of processes, and stay in a call of something until it has been sent a signal."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as the command has it
    call, calls = getattr(owner, name), itertools.count(1)

    def lingering(*args, **options):
        if next(calls) == number:
            pipe.send("here")
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                torch.zeros(1)
        return call(*args, **options)

    setattr(owner, name, lingering)


PLACES = {
    "in a step": partial(linger, owner=torch.optim.SGD, name="step", number=8),
    "while evaluating": partial(linger, owner=MulticlassAccuracy, name="update", number=3),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty noisy images in each of two classes: twelve steps in an epoch, two batches to evaluate."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(30):
            Image.fromarray(draw.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, fit(settings(out, data_dir=str(photos), **_FOLDER), log=silent)


@pytest.mark.parametrize("place", PLACES)
def test_sigterm_to_all_processes_saves_first(tmp_path, photos, uninterrupted, place):
    config = settings(tmp_path / "run", data_dir=str(photos), **_FOLDER)
    process, pipe = runs.start(config, cache=tmp_path, inject=PLACES[place])
    runs.wait_for(pipe, "here")
    os.killpg(process.pid, signal.SIGTERM)
    error = runs.finish(process, pipe)
    assert isinstance(error, Interrupted), error
    assert error.signal == signal.SIGTERM
    step = int(re.search(r"stopped by SIGTERM after step (\d+), saved in", str(error))[1])
    assert load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == step
    folder, summary = uninterrupted
    assert 8 <= step < summary["steps"]
    found = fit(config, resume=True, log=silent)
    assert found["parameters_sha256"] == summary["parameters_sha256"]
    assert found["test_loss"] == summary["test_loss"]
    assert without_times(rows(tmp_path / "run")) == without_times(rows(folder))
