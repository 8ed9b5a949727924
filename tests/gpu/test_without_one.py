"""What a GPU would refuse, or be waited for, seen on a machine that has none."""

import pytest
from torch.utils import backend_registration

from tests.helpers import pretended_device, runs


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch lets no device be pretended",
)
def test_on_a_pretended_device(tmp_path):
    """No tensor of the CPU is left in any map, augmentation, loss or step, and nothing is copied on the way."""
    report = runs.finish(*runs.start_call(pretended_device.report, cache=tmp_path))
    assert str(report).endswith(" done, 0 failed"), report
