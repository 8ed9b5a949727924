"""What users bring along: functions without a graph, modules that make their weights anew, other spellings."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune, spectral_norm

from salnb import Objective, losses, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.swish import Swish


class ByNumPy(Swish):
    @staticmethod
    def backward(ctx, grad):
        z, g = (t.detach().numpy() for t in (*ctx.saved_tensors, grad))
        s = 1 / (1 + np.exp(-z))
        return torch.from_numpy(s * (1 + z * (1 - s)) * g)


class WithoutGrad(Swish):
    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return Swish.backward(ctx, grad)


class Network(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)
        self.activation = activation

    def forward(self, x):
        return self.last(self.second(self.activation(self.first(x))).relu().mean((2, 3)))


class Complex(nn.Module):
    def forward(self, x):
        return x + 0j


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 8, 8, generator=generator), torch.arange(4)


@pytest.mark.parametrize("function", [ByNumPy, WithoutGrad])
def test_a_backward_pass_that_leaves_autograd_is_refused(function, batch):
    network = Network(function.apply)
    with pytest.raises(
        RuntimeError, match=f"the Function {function.__name__} returns tensors without a graph"
    ):
        Objective(network, HorizontalFlip())(*batch)
    with pytest.raises(RuntimeError, match="leave create_graph out"):
        saliency.vanilla_gradient(network, *batch, create_graph=True)
    expected = saliency.vanilla_gradient(Network(F.silu), *batch)
    torch.testing.assert_close(saliency.vanilla_gradient(network, *batch), expected)


def test_a_backward_pass_with_a_graph_has_the_right_gradient(batch):
    found = []
    for activation in (Swish.apply, F.silu):
        network = Network(activation)
        Objective(network, HorizontalFlip())(*batch, torch.Generator().manual_seed(0)).total.backward()
        found.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*found)


def test_another_network_is_checked_again(batch):
    objective = Objective(Network(F.silu), HorizontalFlip())
    objective(*batch)
    objective.model = Network(ByNumPy.apply)
    with pytest.raises(RuntimeError, match="second derivative"):
        objective(*batch)


@pytest.mark.parametrize("change", [lambda m: prune.l1_unstructured(m, "weight", 0.5), spectral_norm])
def test_weights_that_are_made_anew_are_left_as_found(change, batch):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    change(network[0])
    with torch.no_grad():
        network(batch[0])
    before = network[0].weight
    saliency.vanilla_gradient(network, *batch)
    assert network[0].weight is before
    copy.deepcopy(network)


def test_a_counter_of_numpy_is_put_back(batch):
    network = Network(F.silu)
    network.count = np.int64(0)
    network.activation = lambda x: setattr(network, "count", network.count + 1) or F.silu(x)
    saliency.smoothgrad(network, *batch, n_samples=3)
    assert network.count == 0


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: x - x.clamp(max=0),
        lambda x: -torch.clamp(-x, max=0),
        lambda x: -torch.minimum(-x, x.new_zeros(())),
    ],
)
def test_what_is_left_of_a_relu_by_subtraction_is_told(spelling, batch):
    with pytest.warns(UserWarning, match="ReLUs that no rule reaches"):
        saliency.guided_backprop(Network(spelling), *batch)


def test_a_clamp_elsewhere_is_not_told(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saliency.guided_backprop(Network(lambda x: x.relu().clamp(max=3)), *batch)


def test_an_expert_without_images(batch):
    class Experts(Network):
        def __init__(self):
            super().__init__(F.relu)
            self.expert = nn.BatchNorm2d(6)

        def forward(self, x):
            features = self.first(x).relu()
            chosen = x.mean((1, 2, 3)) > 0.9
            features = features.index_add(0, chosen.nonzero()[:, 0], self.expert(features[chosen]))
            return self.last(features.mean((2, 3)))

    network = Experts().eval()
    Objective(network, HorizontalFlip())(*batch).total.backward()
    assert network.first.weight.grad.isfinite().all()


def test_which_samples_count_is_checked():
    maps, masks = torch.rand(4, 1, 8, 8), torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    known = torch.tensor([True, False, True, False])
    losses.outside_loss(maps, masks, known)
    for wrong in (known[:, None], known.float(), known[:2]):
        with pytest.raises(ValueError, match=r"known must be bool of \(4,\)"):
            losses.outside_loss(maps, masks, wrong)


def test_wrong_kinds_of_arguments_are_named(batch):
    network = Network(F.relu)
    for name in ("originals_only", "detach_original", "shuffle_pairs", "layer_relative"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            Objective(network, HorizontalFlip(), **{name: "no"})
    with pytest.raises(TypeError, match="method_options must be a mapping"):
        Objective(network, HorizontalFlip(), method_options="layer")
    with pytest.raises(ValueError, match="method"):
        Objective(network, HorizontalFlip(), method=["grad_cam"])
    with pytest.raises(TypeError, match="create_graph must be True or False, got 1"):
        saliency.vanilla_gradient(network, *batch, create_graph=1)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, whose layers"):
        saliency.grad_cam(lambda x: network(x), *batch)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        saliency.vanilla_gradient(nn.Linear, *batch)


def test_complex_logits_are_refused(batch):
    network = nn.Sequential(Network(F.relu), Complex())
    for call in (partial(saliency.vanilla_gradient, network), Objective(network, HorizontalFlip())):
        with pytest.raises(ValueError, match=r"model must return real logits, got torch\.complex64"):
            call(*batch)
