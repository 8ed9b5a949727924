"""`DistributedDataParallel(objective)` on two processes: the mean of the shards' gradients, or a clear error."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from salnb import Objective
from salnb.augment import Rotation
from tests.helpers.networks import conv_bn
from tests.helpers.processes import in_two
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])
WAYS = {
    "eager": {},
    "every second step": {"every": 2},
    "guided": {"method": "guided_backprop"},
    "compiled": {},
}


def objective_of(way):
    torch.manual_seed(0)
    objective = Objective(conv_bn().double(), Rotation(20), beta=0.5, layers=["3"], gamma=2.0, **WAYS[way])
    if way == "compiled":
        objective.compile(backend="eager")
    return objective


def batches(rank):
    """Two batches of this process."""
    return torch.rand(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def gradients(module, rank):
    """The gradients of two steps, each with what this process drew."""
    found = []
    for x in batches(rank):
        module.zero_grad()
        module(x, TARGET, torch.Generator().manual_seed(rank)).total.backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    return torch.stack(found)


def all_ways(rank):
    """The gradients of one of the two processes."""
    found = {}
    for way in WAYS:
        # running statistics differ between the shards, and nothing here depends on them
        wrapped = DistributedDataParallel(objective_of(way), broadcast_buffers=False)
        found[way] = gradients(wrapped, rank)
    refused = DistributedDataParallel(objective_of("eager"), static_graph=True)
    with pytest.raises(RuntimeError, match=r"static_graph=True.*leave static_graph out"):
        refused(batches(rank)[0], TARGET)
    return found


@pytest.fixture(scope="module")
def from_two_processes(tmp_path_factory):
    return in_two(tmp_path_factory.mktemp("ddp"), all_ways)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_mean_of_the_shards(from_two_processes, way):
    shards = [gradients(copy.deepcopy(objective_of(way)), rank) for rank in (0, 1)]
    expected = (shards[0] + shards[1]) / 2
    assert not torch.allclose(shards[0], shards[1])
    for found in from_two_processes:
        assert_close(found[way], expected, 1e-10)
