"""Networks that work in place on the images, and whose state moves: neither is seen afterwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salnb import Objective, saliency, trust
from salnb.augment import HorizontalFlip
from tests.helpers.methods import cheap
from tests.helpers.surroundings import (
    GRAPH,
    METHODS,
    TRAINING,
    First,
    Moving,
    assert_as_found,
    explain,
    images,
    state_of,
)
from tests.helpers.tolerances import assert_close

# --- works in place on its input ----------------------------------------------------------------------------


def set_item(x):
    x[:, 0] = 0.5
    return x


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "add_": lambda x: x.add_(0.1),
    "mul_": lambda x: x.mul_(2),
    "clamp_": lambda x: x.clamp_(0.2, 0.8),
    "normalise": lambda x: x.sub_(0.5).div_(0.2),
    "set-item": set_item,
    "part": lambda x: (x[:, 1:].mul_(3), x)[1],
    "data": lambda x: (x.data.mul_(1.5), x)[1],
    "no-grad": lambda x: (x.detach().add_(0.3), x)[1],
}


@TRAINING
@GRAPH
@METHODS
@pytest.mark.parametrize("first", IN_PLACE)
def test_the_images_never_change(first, method, create_graph, training):
    model = First(IN_PLACE[first]).train(training)
    outside = First(lambda x: IN_PLACE[first](x * 1)).train(training)
    x = images()
    before = x.clone()
    found = explain(method, model, x, create_graph=create_graph)
    assert torch.equal(x, before)
    assert x._version == 0
    assert_close(found, explain(method, outside, x))


@METHODS
def test_images_that_need_a_gradient_or_share_memory_are_left_alone(method):
    model = First(nn.ReLU(inplace=True)).eval()
    x = images().requires_grad_()
    found = explain(method, model, x)
    assert x.grad is None
    assert x.requires_grad
    assert_close(explain(method, model, x[:1].detach().expand(2, -1, -1, -1))[:1], found[:1])


def test_curves_leave_the_images_alone():
    model, x, maps = First(lambda x: x.mul_(2)).eval(), images(), torch.rand(2, 1, 8, 8)
    grey = torch.full((2, 3, 8, 8), 0.5)
    before = x.clone(), grey.clone()
    trust.deletion_curve(model, x, maps, replacement=grey, steps=3)
    trust.insertion_curve(model, x, maps, replacement=grey, steps=3)
    assert torch.equal(x, before[0])
    assert torch.equal(grey, before[1])


# --- has a state that moves ---------------------------------------------------------------------------------


@TRAINING
@GRAPH
@METHODS
def test_state_is_left_as_it_was_found(method, create_graph, training):
    model = First(Moving()).train(training)
    model.rest[0].weight.grad = torch.ones_like(model.rest[0].weight)
    before, mode = state_of(model), [module.training for module in model.modules()]
    first = explain(method, model, images(), create_graph=create_graph)
    second = explain(method, model, images(), create_graph=create_graph)
    assert torch.equal(first, second)
    if create_graph:  # the graph has what the pass has seen
        first.square().sum().backward()
        model.rest[0].weight.grad = None
        model.zero_grad()
    assert_as_found(model, before)
    assert [module.training for module in model.modules()] == mode


@TRAINING
@METHODS
def test_state_is_left_as_it_was_found_by_an_error(method, training):
    def fail(x):
        raise RuntimeError("from the network")

    model = First(Moving()).train(training)
    model.rest[8].forward = fail
    before = state_of(model)
    with pytest.raises(RuntimeError, match="from the network"):
        explain(method, model, images())
    assert_as_found(model, before)
    assert torch.is_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0


@METHODS
def test_a_model_that_changes_its_mode_is_left_in_the_one_it_had(method):
    model = First(lambda x: (model.rest.train(), x)[1]).eval()
    explain(method, model, images())
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@METHODS
def test_scripted_buffers_are_left_as_they_were(method):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x):
            self.n += 1
            return x * self.n

    model = First(torch.jit.script(Counter())).eval()
    explain(method, model, images())
    assert model.first.n.item() == 0


@TRAINING
def test_curves_leave_the_model_as_it_was(training):
    model, x, maps = First(Moving()).train(training), images(), torch.rand(2, 1, 8, 8)
    before = state_of(model)
    for target in (None, 1):
        trust.deletion_curve(model, x, maps, target, replacement=torch.tensor(0.5), steps=3)
        assert_as_found(model, before)


class Growing(nn.Module):
    """A forward pass that adds to the module, and whose result depends on what is there."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.average = x.detach().mean() if not hasattr(self, "average") else self.average / 2
        if "count" not in self._buffers:
            self.register_buffer("count", torch.zeros(1), persistent=False)
        self.count += 1
        self.last = {"x": x}
        return x * self.calls * self.average * self.count


@GRAPH
@METHODS
def test_what_a_pass_adds_to_a_model_is_taken_away(method, create_graph):
    model = First(Growing()).eval()
    before, names = state_of(model), [set(vars(module)) for module in model.modules()]
    first, second = (explain(method, model, images(), create_graph=create_graph) for _ in range(2))
    assert torch.equal(first, second)
    assert_as_found(model, before)
    assert [set(vars(module)) for module in model.modules()] == names
    assert not model.first._non_persistent_buffers_set
    assert model.first.calls == 0


def test_each_sample_of_smoothgrad_meets_the_model_as_it_was():
    model = First(Growing()).eval()
    maps = saliency.smoothgrad(model, images(), 1, n_samples=3, noise_level=0.0)
    assert_close(maps, saliency.vanilla_gradient(model, images(), 1))


def test_what_a_model_builds_when_it_first_runs_stays():
    class Building(nn.Module):
        def forward(self, x):
            if not hasattr(self, "channels"):
                self.channels = x.shape[1]
                self.mix = nn.Conv2d(self.channels, 3, 1)
            return self.mix(x)

    model = First(Building()).eval()
    found = saliency.vanilla_gradient(model, images(), 1)
    assert model.first.channels == 3
    assert torch.equal(saliency.vanilla_gradient(model, images(), 1), found)


@GRAPH
@METHODS
def test_lazy_modules_are_built_by_the_first_pass(method, create_graph):
    torch.manual_seed(0)
    body = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    model = nn.Sequential(body, nn.Flatten(), nn.LazyLinear(4)).eval()
    first, second = (explain(method, model, images(), create_graph=create_graph) for _ in range(2))
    assert torch.equal(first, second)
    assert model[2].weight.shape == (4, 24)
    assert not isinstance(body[0], nn.LazyConv2d)


@METHODS
def test_an_objective_of_lazy_modules_builds_them(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LazyConv2d(6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(4)
    )
    objective = Objective(model, HorizontalFlip(), method=method, method_options=cheap(method))
    losses = objective(images(), torch.tensor([0, 1]))
    losses.total.backward()
    assert losses.saliency_loss > 0
    assert model[0].weight.grad.any()


def move_by_mode(bn, x):
    bn.train()
    bn(x)
    bn.eval()


def move_in_place(bn, x):
    bn.num_batches_tracked += 1
    bn.running_mean.add_(0.5)


MOVED = {
    "mode": move_by_mode,
    "functional": lambda bn, x: F.batch_norm(x, bn.running_mean, bn.running_var, training=True),
    "in place": move_in_place,
}


@GRAPH
@METHODS
@pytest.mark.parametrize("move", MOVED)
def test_batch_norm_in_eval_mode_that_moves_nonetheless_is_put_back(move, method, create_graph):
    norm = nn.BatchNorm2d(3)
    model = First(lambda x: (MOVED[move](norm, x), norm(x))[1])
    model.norm = norm
    model.eval()
    before = state_of(model)
    first, second = (explain(method, model, images(), create_graph=create_graph) for _ in range(2))
    assert torch.equal(first, second)
    assert_as_found(model, before)


@GRAPH
@METHODS
def test_parameters_that_a_pass_replaces_or_freezes_are_put_back(method, create_graph):
    def change(x):
        model.rest[0].weight = nn.Parameter(model.rest[0].weight.detach() / 2)
        model.scale.requires_grad_(False)
        return x * model.scale

    model = First(change).eval()
    model.scale = nn.Parameter(torch.ones(1))
    before = state_of(model)
    first, second = (explain(method, model, images(), create_graph=create_graph) for _ in range(2))
    assert torch.equal(first, second)
    assert_as_found(model, before)
    assert model.scale.requires_grad
