"""What a GPU would refuse, or be waited for, seen on a machine that has none."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch lets no device be pretended",
)
def test_on_a_pretended_device():
    """No tensor of the CPU is left in any map, augmentation, loss or step, and nothing is copied on the way."""
    command = [sys.executable, "-m", "tests.helpers.pretended_device"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.endswith(" done, 0 failed\n"), ended.stdout + ended.stderr[-2000:]
