"""A study of one real pair."""

import pytest

from salnb import timing
from salnb.timing import runner


@pytest.fixture
def two_rows(monkeypatch):
    cases = [timing.Case("small", method, batch=2, size=16) for method in (None, "vanilla_gradient")]
    monkeypatch.setattr(runner, "plan", lambda settings: cases)
