"""Tensors and modes that give PyTorch's functions a meaning of their own, which no replacement passes by."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from salnb.double_backward import fast_double_backward
from tests.helpers.tolerances import assert_close

CALLS = {
    "convolution": lambda x, w: F.conv2d(x, w),
    "linear": lambda x, w: F.linear(x.flatten(1), w.flatten(1)[:, :1].expand(4, 192)),
    "linear, module": lambda x, w: nn.Linear(192, 4, dtype=x.dtype)(x.flatten(1) * w.mean()),
    "relu": lambda x, w: F.relu(w * x.mean()),
    "batch norm": lambda x, w: F.batch_norm(w * x[:, :, :1, :1].mean(), None, None, training=True),
    "max pooling": lambda x, w: F.max_pool2d(w.mean((2, 3), keepdim=True) * x.mean() + w, 1),
    "average pooling": lambda x, w: F.avg_pool2d(w * x.mean(), 1),
    "concatenation": lambda x, w: torch.cat([w * x.mean(), w]),
}
NAMES = ("conv2d", "linear", "relu", "batch_norm", "max_pool2d", "avg_pool2d", "cat")


def trebled(func, result):
    return result * 3 if getattr(func, "__name__", "") in NAMES else result


class Trebling(Tensor):
    """A weight, such as a quantised one, that has rules of its own for some functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return trebled(func, super().__torch_function__(func, types, args, kwargs or {}))


class Named(Tensor):
    """A tensor that only is of another class, as what is computed of it."""


class TrebleMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return trebled(func, func(*args, **(kwargs or {})))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 8, 8), (4, 3, 1, 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("kind", [Trebling, Named])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "linear, module"])
def test_a_class_with_rules_of_its_own(name, kind, inputs):
    x, w = inputs
    found = CALLS[name](x, w.as_subclass(kind))
    with fast_double_backward():
        again = CALLS[name](x, w.as_subclass(kind))
    assert type(again) is type(found) is kind
    assert_close(again.as_subclass(Tensor), found.as_subclass(Tensor))


@pytest.mark.parametrize("name", CALLS)
def test_a_mode_around_the_replacements(name, inputs):
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        with TrebleMode():
            if inside:
                with fast_double_backward():
                    results.append(CALLS[name](*inputs))
            else:
                results.append(CALLS[name](*inputs))
    assert_close(*results)


def test_the_default_device_is_no_such_mode(inputs):
    with torch.device("cpu"), fast_double_backward():
        assert "Affine" in CALLS["convolution"](*inputs).grad_fn.name()


def test_a_parameter_of_another_class_stays_fast(inputs):
    class Tagged(nn.Parameter):
        pass

    x, w = inputs
    with fast_double_backward():
        assert "Affine" in CALLS["convolution"](x, Tagged(w.detach())).grad_fn.name()


def test_maps_of_a_network_with_such_a_weight():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.head = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(4, 4)

        def forward(self, x):
            features = F.conv2d(x, self.weight.as_subclass(Trebling)).as_subclass(Tensor)
            return self.head(F.silu(features).mean((2, 3)))

    network, target = Network().double(), torch.arange(4)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    score = network(images).gather(1, target[:, None]).sum()
    (expected,) = torch.autograd.grad(score, images, create_graph=True)
    found = saliency.vanilla_gradient(network, images.detach(), target, create_graph=True, reduce=None)
    assert_close(found.detach(), expected.detach())
    gradients = [
        torch.autograd.grad(
            maps.square().sum(), network.parameters(), allow_unused=True, materialize_grads=True
        )
        for maps in (found, expected)
    ]
    for pair in zip(*gradients, strict=True):
        assert_close(*pair)
    Objective(network, HorizontalFlip())(images.detach(), target).total.backward()
