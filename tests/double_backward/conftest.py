"""Tensors on the device that is tested."""

import functools

import pytest

from tests.helpers import double_backward


@pytest.fixture
def random(device):
    """`tests.helpers.double_backward.random` on that device."""
    return functools.partial(double_backward.random, device=device)
