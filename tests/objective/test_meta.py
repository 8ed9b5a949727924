"""An objective that is made without memory, on the meta device, and gets it later."""

import pytest
import torch

from salnb import Objective
from salnb._common.buffers import OwnBuffers
from salnb.augment import HorizontalFlip
from salnb.models import Normalized
from tests.helpers.networks import conv_bn

TARGET = torch.tensor([0, 1, 2, 3])


def objective_of(**options):
    return Objective(conv_bn(), HorizontalFlip(), **options)


def buffers_of(module):
    own = [part for part in module.modules() if isinstance(part, OwnBuffers)]
    return [buffer for part in own for buffer in part.buffers(recurse=False)]


def filled(module):
    """As `to_empty` leaves it where the memory holds something."""
    for buffer in module.buffers():
        buffer.fill_(77)
    return module


@pytest.fixture
def garbage(monkeypatch):
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: empty(*args, **kw).fill_(77))


@pytest.mark.parametrize("inside", [True, False], ids=["all on meta", "model on meta"])
def test_to_empty_fills_in_what_no_state_dict_holds(inside, garbage):
    with torch.device("meta"):
        model = conv_bn()
        objective = Objective(model, HorizontalFlip(), balance=0.5)
    if not inside:
        objective = Objective(model, HorizontalFlip(), balance=0.5)
    objective.state_dict()
    objective.to_empty(device="cpu")
    expected = objective_of(balance=0.5)
    assert [b.tolist() for b in buffers_of(objective)] == [b.tolist() for b in buffers_of(expected)]
    objective.model.load_state_dict(expected.model.state_dict())
    images = torch.rand(4, 3, 8, 8)
    found = [o(images, TARGET, torch.Generator().manual_seed(0)).total for o in (objective, expected)]
    torch.testing.assert_close(*found)


def test_weights_that_take_the_place_of_those_on_meta():
    trained = objective_of(balance=0.5)
    images = torch.rand(4, 3, 8, 8)
    trained(images, TARGET)
    with torch.device("meta"):
        resumed = objective_of(balance=0.5)
    resumed.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(resumed.balance.lengths, trained.balance.lengths)
    found = [o(images, TARGET, torch.Generator().manual_seed(0)).total for o in (resumed, trained)]
    torch.testing.assert_close(*found)
    assert resumed.score_scale.exponent == trained.score_scale.exponent


def test_memory_that_is_taken_anew_keeps_what_was_measured(garbage):
    objective = objective_of(balance=0.5)
    objective(torch.rand(4, 3, 8, 8), TARGET)
    before = objective.balance.lengths.tolist()
    objective.half().to_empty(device="cpu")
    assert objective.balance.lengths.tolist() == before
    assert objective.balance.lengths.dtype is torch.float32
    filled(objective).balance.reset_parameters()
    assert objective.balance.lengths.tolist() == [0, 0]


def test_mean_and_deviation_of_a_network(garbage):
    with torch.device("meta"):
        model = Normalized(conv_bn(), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model.to_empty(device="cpu")
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert model.std.shape == (3, 1, 1)
    assert model.half().mean.dtype is torch.float16
