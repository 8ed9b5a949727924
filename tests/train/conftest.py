"""Folders that hold runs."""

import itertools
import json
import signal

import pytest
import torch

from salnb.train import Interrupted, fit
from salnb.train.config import Config
from tests.helpers.runs import settings, silent


@pytest.fixture
def held(tmp_path):
    """A folder with a run in it."""
    config = Config(out=str(tmp_path / "run"), seed=1, learning_rate=0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path / "run"


@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped after seven of its steps, one of them after a checkpoint."""
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
