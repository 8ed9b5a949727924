"""What is there on a GPU only."""

import pytest


@pytest.fixture
def cuda(device):
    """The GPU; a test that needs one is skipped elsewhere."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: --device cuda")
    return device
