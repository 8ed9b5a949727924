"""ReLU6 is a ReLU with an upper bound: the rules of eq. 3 and 4 must catch it in each of its spellings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb.saliency import METHODS, deconvnet, guided_backprop
from tests.tolerances import assert_close


class Functional(nn.Module):
    """Calls a function, so that it can stand in an nn.Sequential."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


SPELLINGS = {
    "module": nn.ReLU6(),
    "module-in-place": nn.ReLU6(inplace=True),
    "functional": Functional(F.relu6),
    "functional-in-place": Functional(lambda x: F.relu6(x, inplace=True)),
    "hardtanh": Functional(lambda x: F.hardtanh(x, 0, 6)),
}


@pytest.mark.parametrize("rectifier", SPELLINGS.values(), ids=SPELLINGS)
def test_rules_act_on_relu6(rectifier):
    weight = torch.randn(1, 20, dtype=torch.float64)
    model = nn.Sequential(
        nn.Flatten(), Functional(lambda x: x * 1.0), rectifier, Functional(lambda x: x @ weight.T)
    )
    images = 5 * torch.randn(1, 1, 4, 5, dtype=torch.float64)
    slope = weight.view_as(images)
    assert (images > 6).any()
    assert_close(deconvnet(model, images, 0, reduce=None), slope * (slope > 0))
    active = (images > 0) & (images < 6)
    assert_close(guided_backprop(model, images, 0, reduce=None), slope * (slope > 0) * active)


def test_hardtanh_with_other_bounds_is_no_relu():
    model = nn.Sequential(Functional(F.hardtanh), nn.Flatten())
    with pytest.warns(UserWarning, match="no ReLU was met"):
        guided_backprop(model, torch.rand(1, 1, 2, 2), 0)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_maps_carry_no_graph_unless_asked(method):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    images = torch.rand(2, 1, 4, 4)
    assert not method(model, images).requires_grad
    assert method(model, images, create_graph=True).requires_grad
