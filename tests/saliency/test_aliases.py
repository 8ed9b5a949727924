"""Networks whose buffers and attributes are views of one another: all find, and leave, them as they were."""

import copy

import pytest
import torch
from torch import nn

from salnb import Objective, saliency, trust
from salnb.augment import HorizontalFlip
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close


class Views(nn.Module):
    """Works with a buffer whose parts are moved, in each pass, through a view of it."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("whole", torch.ones(6).double())
        self.keep(self.whole)

    def keep(self, whole):
        self.part = whole[1:3]

    def move(self):
        self.part.add_(1)

    def forward(self, x):
        self.move()
        return self.network(x * (self.whole.sum() + self.whole.tolist()[1]))


class Reversed(Views):
    def keep(self, whole):
        self.table = torch.ones(4, 6).double()
        self.whole = self.table[2]

    def move(self):
        self.table.mul_(1.5)


class Bytes(Views):
    def keep(self, whole):
        self.bits = whole.view(torch.int64)[::2]

    def move(self):
        self.bits.sub_(1 << 50)


class OfStatistics(Views):
    def keep(self, whole):
        self.part = self.network[1].running_mean[:2]


class Listed(Views):
    def keep(self, whole):
        self.parts = {"some": [whole[1:3], None]}

    def move(self):
        self.parts["some"][0].add_(1)


@pytest.fixture(params=[Views, Reversed, Bytes, OfStatistics, Listed], ids=lambda kind: kind.__name__)
def model(request):
    return request.param(conv_bn().double()).eval()


IMAGES, TARGET = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)


def reference(model):
    images = IMAGES.clone().requires_grad_()
    score = copy.deepcopy(model)(images).gather(1, TARGET[:, None]).sum()
    return torch.autograd.grad(score, images)[0]


def state_of(model):
    values = [value for value in vars(model).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy([*values, *model.buffers(), getattr(model, "parts", None)])


def test_maps_are_those_of_the_network_that_is_left_alone(model):
    before, expected = state_of(model), reference(model)
    for _ in range(2):
        found = saliency.vanilla_gradient(model, IMAGES, TARGET, reduce=None)
        assert_close(found, expected)
    torch.testing.assert_close(state_of(model), before)


@pytest.mark.parametrize("method", ["smoothgrad", "guided_grad_cam"])
def test_other_methods_leave_it_as_found(model, method):
    before = state_of(model)
    saliency.METHODS[method](model, IMAGES, TARGET, **cheap(method))
    torch.testing.assert_close(state_of(model), before)


def test_curves(model):
    before = state_of(model)
    maps = saliency.vanilla_gradient(model, IMAGES, TARGET)
    curve = trust.deletion_curve(model, IMAGES, maps, TARGET, replacement=torch.tensor(0.5), steps=2)
    expected = copy.deepcopy(model)(IMAGES).softmax(1).gather(1, TARGET[:, None])
    assert_close(curve[:, :1], expected.detach())
    torch.testing.assert_close(state_of(model), before)


def test_views_stay_views(model):
    saliency.vanilla_gradient(model, IMAGES, TARGET)
    with torch.no_grad():
        moved = copy.deepcopy(model)
        moved(IMAGES)
    Objective(model, HorizontalFlip())(IMAGES, TARGET).total.backward()
    torch.testing.assert_close(state_of(model), state_of(moved))


def test_a_graph_knows_what_a_view_has_changed():
    class Late(Views):
        def forward(self, x):
            y = x * self.whole.sum() * self.whole[1]
            self.move()
            return self.network(y)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saliency.vanilla_gradient(Late(conv_bn().double()).eval(), IMAGES, TARGET)
