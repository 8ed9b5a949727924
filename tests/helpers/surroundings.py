"""What the tests of saliency methods in unusual surroundings share."""

import pytest
import torch
from torch import nn

from salnb import saliency
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn

METHODS = pytest.mark.parametrize("method", saliency.METHODS)
GRAPH = pytest.mark.parametrize("create_graph", [False, True], ids=["map", "map-with-graph"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def images(n=2, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def explain(method, model, x, target=1, **kwargs):
    return saliency.METHODS[method](model, x, target, **cheap(method, still=True), **kwargs)


class First(nn.Module):
    """A network that begins with a function of the images."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest = first, conv_bn()

    def forward(self, x):
        return self.rest(self.first(x))


class Moving(nn.Module):
    """All the state that a forward pass may move, in train and in eval mode, and which its result depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("later", None)
        self.alias = self.mean
        self.plain = torch.ones(1)
        self.calls = 0
        self.cached = None

    def forward(self, x):
        self.counter += 1
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        self.replaced = self.replaced + self.mean
        self.later = x.detach().amax()
        self.plain.add_(0.25)
        self.calls += 1
        self.cached = x.detach()
        return x * (1 + self.replaced.view(1, 3, 1, 1)) * self.plain + self.calls


def state_of(model):
    """Tensors and plain values of all modules, and which objects they are."""
    tensors = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in (*vars(module).items(), *module._buffers.items(), *module._parameters.items())
        if value is None or isinstance(value, torch.Tensor | int | float)
    }
    values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    return tensors, values


def assert_as_found(model, before):
    now = state_of(model)[0]
    identical, values = before
    assert now.keys() == identical.keys()
    for key, value in now.items():
        assert value is identical[key], key
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, values[key]), key
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)


class Meanwhile(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
