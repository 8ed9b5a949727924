"""Segments that move something else than buffers in each pass, and are recomputed with what it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import saliency
from tests.helpers.checkpointing import Segment, network, stored
from tests.helpers.tolerances import assert_close
from tests.objective.test_checkpointing import TARGET, assert_same, images


class Tensors(nn.Module):
    """An attribute that is replaced in each pass, and one that is written to."""

    def __init__(self):
        super().__init__()
        self.scale, self.mean = torch.ones(()).double(), torch.ones(3).double()

    def forward(self, x):
        self.scale = self.scale * 1.5
        self.mean.mul_(0.5).add_(x.detach().abs().mean())
        return F.silu(x * self.scale) * self.mean[0]


class Numbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.count, self.rate, self.odd = 0, 1.0, False

    def forward(self, x):
        self.count, self.rate, self.odd = self.count + 1, self.rate * 0.7, not self.odd
        return F.silu(x * self.rate) * self.count if self.odd else torch.tanh(x / self.count)


class Views(nn.Module):
    """A buffer that is moved through an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("whole", torch.ones(4).double())
        self.part = self.whole[1:3]

    def forward(self, x):
        self.part.add_(x.detach().abs().mean())
        return F.silu(x * self.whole.sum()) / self.whole[1]


class Table(nn.Module):
    """Whole numbers that move."""

    def __init__(self):
        super().__init__()
        self.order = torch.arange(6)

    def forward(self, x):
        self.order = self.order.roll(1)
        return F.silu(x) * (1 + self.order[0])


@pytest.mark.parametrize("kind", [Tensors, Numbers, Views, Table])
@pytest.mark.parametrize("training", [True, False])
def test_attributes_that_move(kind, training):
    model = network(Segment(kind())).train(training)
    plain = stored(model)
    assert_same(model, plain)
    own = [next(m for m in n.modules() if isinstance(m, kind)) for n in (model, plain)]
    torch.testing.assert_close(*[{k: v for k, v in vars(m).items() if k[0] != "_"} for m in own])


def test_maps_whose_graph_is_kept():
    model = network(Segment(Tensors())).eval()
    gradients = []
    for twin in (copy.deepcopy(model), stored(model)):
        x = images()
        torch.manual_seed(0)
        maps = saliency.vanilla_gradient(twin, torch.rand_like(x), TARGET, create_graph=True)
        maps.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]))
    assert_close(*gradients)
