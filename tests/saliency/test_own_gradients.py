"""Models that take a gradient, or call `backward()`, in their own forward pass."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import Objective, saliency
from salnb.augment import HorizontalFlip
from tests.helpers.methods import WITH_RULE, cheap
from tests.helpers.surroundings import GRAPH, METHODS, explain
from tests.helpers.tolerances import assert_close


class Network(nn.Module):
    """A network whose forward pass does something with gradients before."""

    def __init__(self, before=lambda net, x: x):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.before = before

    def loss(self, x):
        return self.logits(x).square().mean()

    def logits(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))

    def forward(self, x):
        return self.logits(self.before(self, x))


def batch(n=2):
    return torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trains(net, x):
    with torch.enable_grad():
        net.loss(x.detach()).backward()
    return x


def trains_on_images(net, x):
    if x.requires_grad:
        net.loss(x).backward()
    return x


def forgets(net, x):
    net.zero_grad()
    return trains(net, x)


def moved_by_backward(net, x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        net.loss(z).backward(inputs=[z])
    return x + z.grad


def moved(net, x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net.loss(z), z)
    return x + gradient


def moved_beside(net, x):
    """A gradient of which a part goes by no layer."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net.loss(z) + z.square().sum(), z)
    return x + gradient


def moved_behind(net, x):
    """The same, after all layers have run."""
    net.logits(x)
    return moved_beside(net, x)


def moved_by_transform(net, x):
    return x + torch.func.grad(net.loss)(x).detach()


def gradients_of(model):
    return [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


@pytest.mark.parametrize("given", [False, True], ids=["without", "with-gradients"])
@pytest.mark.parametrize("before", [trains, trains_on_images, forgets])
@GRAPH
@METHODS
def test_gradients_of_parameters_are_left_as_found(method, create_graph, before, given):
    model = Network(before).double()
    if given:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, i) if i else None
    found = gradients_of(model)
    explain(method, model, batch(), create_graph=create_graph)
    for parameter, (grad, values) in zip(model.parameters(), found, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, values)


@METHODS
def test_gradients_that_are_overwritten_are_told(method):
    def zeroes(net, x):
        net.zero_grad(set_to_none=False)
        return trains(net, x)

    model = Network(zeroes).double()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(
        RuntimeError, match=r"a backward\(\) in .*was overwritten in place.*set \.grad to None"
    ):
        explain(method, model, batch())


def test_a_training_step_in_another_thread_keeps_its_gradients():
    def meanwhile(net, x):
        thread = threading.Thread(target=lambda: net.loss(x.detach()).backward())
        thread.start()
        thread.join()
        return x

    model, plain = Network(meanwhile).double(), Network().double()
    explain("vanilla_gradient", model, batch())
    plain.loss(batch()).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


MOVED = [moved, moved_by_backward, moved_beside, moved_behind, moved_by_transform]


@pytest.mark.parametrize("before", MOVED)
@METHODS
def test_what_a_gradient_in_the_forward_pass_adds_is_a_constant(method, before):
    model, plain = Network(before).double(), Network().double()
    x = batch()
    assert_close(explain(method, model, x), explain(method, plain, before(plain, x).detach()))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("method", WITH_RULE)
def test_a_relu_in_a_transform_is_named(method, create_graph):
    """The rule cannot reach the second derivative of a ReLU, but where it is not needed nothing is said."""
    model = Network(lambda net, x: x + torch.func.grad(lambda z: (net.logits(z) ** 3).sum())(x)).double()
    with pytest.warns(UserWarning, match="no rule reaches"):
        saliency.METHODS[method](model, batch(), 1, create_graph=create_graph, **cheap(method))


@pytest.mark.parametrize("before", [trains, trains_on_images, forgets])
def test_a_compiled_step_of_a_model_that_calls_backward_is_refused(before):
    objective = Objective(Network(before).double(), HorizontalFlip())
    objective.compile(backend="eager")
    with pytest.raises(
        RuntimeError, match=r"a backward\(\) of its own .*first\.weight.*leave compile\(\) out"
    ):
        objective(batch(), torch.arange(2))
    assert all(p.grad is None for p in objective.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("before", MOVED)
def test_an_objective_of_a_model_that_takes_a_gradient(before, compiled):
    totals = []
    fixed = Network().double()
    for first in (before, lambda net, x: x + (before(fixed, x) - x).detach()):
        net = Network(first).double()
        objective = Objective(net, HorizontalFlip())
        if compiled and not totals:
            objective.compile(backend="eager")
        losses = objective(batch(), torch.arange(2), torch.Generator().manual_seed(0))
        losses.total.backward()
        totals.append([losses.total, *(p.grad for p in net.parameters())])
    for a, b in zip(*totals, strict=True):
        assert_close(a, b)


def reads_one(net, x):
    return x if net.first.weight.grad is None else 2 * x


def reads_all(net, x):
    return x * (1 + sum(getattr(p, "grad", None) is not None for p in net.parameters()))


def leaves_it_to_pytorch(net, x):
    net.zero_grad()
    return x


@pytest.mark.parametrize("before", [reads_one, reads_all])
def test_a_compiled_step_of_a_model_that_reads_grad_is_refused(before):
    """It is None as a step is traced, and would be for ever."""
    objective = Objective(Network(before).double(), HorizontalFlip())
    objective(batch(), torch.arange(2)).total.backward()
    objective.compile(backend="eager")
    with pytest.raises(
        RuntimeError, match=r"does not read \.grad, .*\(tests\.saliency\.test_own_gradients\)"
    ):
        objective(batch(), torch.arange(2))


@pytest.mark.parametrize(
    "before", [leaves_it_to_pytorch, lambda net, x: x if (2 * x).grad is None else 0 * x]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_of_a_model_that_reads_no_parameters_grad_is_not(before):
    objective = Objective(Network(before).double(), HorizontalFlip())
    objective.compile(backend="eager")
    objective(batch(), torch.arange(2)).total.backward()
    assert all(p.grad.abs().max() > 0 for p in objective.parameters())
