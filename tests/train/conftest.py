"""Folders that hold runs."""

import json

import pytest

from salnb.train.config import Config


@pytest.fixture
def held(tmp_path):
    """A folder with a run in it."""
    config = Config(out=str(tmp_path / "run"), seed=1, learning_rate=0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path / "run"
