"""Functions whose backward pass writes a .grad itself: refused in training, undone after a map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip


class Scale(Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x * module.scale.detach()

    @staticmethod
    def backward(ctx, grad):
        scale, found = ctx.module.scale, grad.detach().sum()
        if scale.grad is None:
            scale.grad = found.clone()
        else:
            scale.grad.add_(found)
        return grad * scale.detach(), None


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return F.silu(Scale.apply(x, self))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(), nn.Flatten(), nn.Linear(144, 4))


@pytest.fixture(params=[False, True], ids=["no .grad", "a .grad"])
def scale(request, model):
    if request.param:
        model[1].scale.grad = torch.tensor(7.0)
    return model[1].scale


BATCH = torch.rand(4, 3, 8, 8), torch.arange(4)


@pytest.mark.parametrize("method", ["vanilla_gradient", "guided_backprop", "grad_cam", "smoothgrad"])
@pytest.mark.filterwarnings("ignore:no ReLU")
def test_a_map_leaves_gradients_as_they_were(model, scale, method):
    before, value = scale.grad, None if scale.grad is None else scale.grad.clone()
    saliency.METHODS[method](model, *BATCH)
    assert scale.grad is before
    assert before is None or before == value


def test_validation_leaves_gradients_as_they_were(model, scale):
    before, value = scale.grad, None if scale.grad is None else scale.grad.clone()
    with torch.no_grad():
        Objective(model.eval(), HorizontalFlip())(*BATCH)
    assert scale.grad is before
    assert before is None or before == value


@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_refused(model, scale, compiled):
    objective = Objective(model, HorizontalFlip())
    if compiled:
        objective.compile(backend="eager")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a Function \(of Scale\) writes a \.grad itself"):
            objective(*BATCH)
    with pytest.raises(
        RuntimeError, match=r"create_graph=True .* writes a \.grad itself.* leave create_graph"
    ):
        saliency.vanilla_gradient(model, *BATCH, create_graph=True)
    objective.gamma = 0
    if compiled:  # a graph would not write it
        with pytest.raises(RuntimeError, match=r"or of a Function\) writes that of model\.1\.scale"):
            objective(*BATCH)
    else:
        objective(*BATCH).total.backward()
        assert scale.grad is not None
        assert scale.grad not in (0, 7)
