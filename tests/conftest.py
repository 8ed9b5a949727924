"""Fixtures that every test module shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    """Each test starts from the same seed and leaves torch's global switches as it found them."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def device():
    """The accelerator where there is one, so that the same suite runs on CPU and on CUDA."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
