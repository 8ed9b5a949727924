"""`balance`: the saliency term's gradient has the length asked for, however the step is made."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from salnb import Objective
from salnb.augment import HorizontalFlip, Identity, Rotation
from salnb.data import Share
from salnb.objective.balance import EVERY
from salnb.train.setup import SharedDraw
from tests.helpers.networks import conv_bn
from tests.helpers.processes import in_two
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


def objective_of(balance=0.5, network=conv_bn, augmentation=None, **options):
    torch.manual_seed(0)
    return Objective(network().double(), augmentation or Rotation(20), balance=balance, alpha=0.7, **options)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=generator), TARGET


def draw(step):
    return torch.Generator().manual_seed(100 + step)


def length(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None]).norm()


def trained(objective, steps, start=0, call=None):
    """The losses of some steps of SGD."""
    optimizer, found = torch.optim.SGD(objective.parameters(), 0.05), []
    for step in range(start, start + steps):
        losses = (call or objective)(*batch(step), draw(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        found.append(losses)
    return found


def by_hand(steps, *, every=1, warmup=0, rho=0.5):
    """The weights of some steps of SGD, from the definition: two more passes each time."""
    plain, averages, weights = objective_of(balance=0.0), None, []
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    for step in range(steps):
        since, weight = step - warmup, 0.0
        if since >= 0 and since % every == 0:
            if since // every % EVERY == 0:
                found = []
                for term in ("class_loss", "saliency_loss"):
                    twin = copy.deepcopy(plain)
                    twin.gamma = 1.0
                    found.append(length(getattr(twin(*batch(step), draw(step)), term), twin.model).item())
                found[0] *= 0.7
                averages = (
                    found
                    if averages is None
                    else [0.8 * old + 0.2 * new for old, new in zip(averages, found, strict=True)]
                )
            weight = every * rho * averages[0] / averages[1]
        plain.gamma = weight
        losses = plain(*batch(step), draw(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        weights.append(weight)
    return weights, plain


@pytest.mark.parametrize("schedule", [{}, {"every": 2, "warmup": 3}], ids=["always", "scheduled"])
def test_the_weight_is_what_its_definition_says(schedule):
    steps = 2 * EVERY * schedule.get("every", 1) + 4
    objective = objective_of(**schedule)
    found = [float(losses.gamma) for losses in trained(objective, steps)]
    expected, plain = by_hand(steps, **schedule)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({weight for weight in found if weight}) == 3
    for ours, theirs in zip(objective.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, 1e-5)


def test_a_measured_step_has_the_share_that_was_asked_for():
    objective = objective_of(balance=0.3)
    losses = objective(*batch(0), draw(0))
    classes = length(0.7 * losses.class_loss, objective.model)
    salience = length(losses.gamma * losses.saliency_loss, objective.model)
    assert_close(salience / classes, torch.tensor(0.3).double(), 1e-6)
    assert_close(losses.total, 0.7 * losses.class_loss + losses.gamma * losses.saliency_loss, 1e-10)


def test_current_gamma_is_what_the_next_unmeasured_step_has():
    objective = objective_of(every=2)
    assert objective.current_gamma() == 2.0
    trained(objective, 4)
    expected = objective.current_gamma()
    assert float(objective(*batch(4), draw(4)).gamma) == pytest.approx(expected)
    assert objective.current_gamma() == 0


def test_evaluation_measures_nothing():
    objective = objective_of()
    trained(objective, 3)
    lengths, weight = objective.balance.lengths.clone(), objective.balance.weight
    assert float(objective.eval()(*batch(0)).gamma) == weight
    with torch.no_grad():
        objective.train()(*batch(0))
    fresh = objective_of()
    with torch.no_grad():
        assert float(fresh(*batch(0)).gamma) == 1
    assert torch.equal(objective.balance.lengths, lengths)
    assert not fresh.balance.lengths.any()


def test_resuming_changes_nothing_to_the_bit():
    steps = 2 * EVERY + 3
    whole, first, second = objective_of(), objective_of(), objective_of()
    trained(whole, steps)
    trained(first, 7)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["_extra_state"].shape == (3,)
    trained(second, steps - 7, start=7)
    for ours, theirs in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_from_before_loads():
    older, balanced = objective_of(balance=0.0), objective_of()
    trained(older, 5)
    balanced.load_state_dict(older.state_dict())
    assert balanced.steps_done == 5
    assert balanced.balance.weight == 1
    trained(balanced, 1)
    older.load_state_dict(balanced.state_dict())
    assert older.steps_done == 6
    assert older.current_gamma() == 1


def test_accumulated_calls_are_measured_as_they_come():
    objective = objective_of()
    weights = []
    for step in range(EVERY + 1):
        losses = objective(*batch(step), draw(step))
        (losses.total / 4).backward()
        weights.append(float(losses.gamma))
    assert len(set(weights)) == 2
    assert weights[0] == weights[EVERY - 1] != weights[EVERY]


@pytest.mark.usefixtures("traced")
def test_compiled_steps_are_the_eager_ones():
    eager, compiled = objective_of(), objective_of()
    compiled.compile(backend="eager")
    steps = EVERY + 3
    ours, theirs = trained(compiled, steps), trained(eager, steps)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.total, b.total, 1e-9)
        assert float(a.gamma) == pytest.approx(float(b.gamma), rel=1e-6)
    assert_close(compiled.balance.lengths, eager.balance.lengths, 1e-6)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_close(a, b, 1e-9)


def test_a_term_without_a_gradient_gets_no_huge_weight():
    """Equal maps have a distance of zero, and what is left of its gradient is rounding."""
    objective = objective_of(augmentation=Identity())
    for losses in trained(objective, 2):
        assert 0 < float(losses.gamma) <= 1e4
    assert all(p.isfinite().all() for p in objective.parameters())
    objective.balance.lengths.copy_(torch.tensor([1.0, 1e-9]))
    assert objective.balance.weight == 1e4


@pytest.mark.parametrize("which", [0, 1])
def test_a_measurement_with_one_length_that_is_not_finite_is_left_out(which):
    balance = objective_of().balance
    weight = torch.ones(2, requires_grad=True)
    balance.measure(weight.sum(), 2 * weight.sum(), [weight], None)
    before = balance.lengths.clone()
    losses = [weight.sum(), weight.sum()]
    losses[which] = losses[which] * torch.inf
    assert not balance.measure(*losses, [weight], None)
    assert torch.equal(balance.lengths, before)


def test_frozen_parameters_take_no_part():
    objective = objective_of()
    for parameter in objective.model[:3].parameters():
        parameter.requires_grad_(False)
    losses = objective(*batch(0), draw(0))
    trainable = nn.ParameterList(p for p in objective.parameters() if p.requires_grad)
    ratio = length(losses.gamma * losses.saliency_loss, trainable) / length(
        0.7 * losses.class_loss, trainable
    )
    assert_close(ratio, torch.tensor(0.5).double(), 1e-6)


def test_without_a_parameter_to_train_it_is_refused():
    objective = objective_of()
    objective.model.requires_grad_(False)
    with pytest.raises(ValueError, match="balance compares gradients of parameters"):
        objective(*batch(0), draw(0))


def test_half_precision_measures_finite_lengths():
    objective = Objective(conv_bn(), HorizontalFlip(), balance=0.5)
    with torch.autocast("cpu", dtype=torch.float16):
        losses = objective(batch(0)[0].float(), TARGET)
    exact = Objective(copy.deepcopy(objective.model), HorizontalFlip(), balance=0.5)
    weight = exact(batch(0)[0].float(), TARGET).gamma
    assert 0.2 < float(losses.gamma) / float(weight) < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": -0.1}, "balance must be a finite number of at least 0, got -0.1"),
        ({"balance": float("nan")}, "balance must be a finite number"),
        ({"balance": float("inf")}, "balance must be a finite number"),
        ({"balance": 0.3, "gamma": 0.0}, r"got balance=0.3 with gamma=0.0: for no saliency term.*balance=0"),
        ({"balance": 0.3, "gamma": 0.1}, "balance chooses gamma, which must be left at 1"),
        ({"balance": 0.3, "alpha": 0.0}, "balance is a share of the class loss"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(conv_bn(), HorizontalFlip(), **options)


# --- two processes -----------------------------------------------------------------------------------------

IMAGES = 8
STEPS = EVERY + 2


def groupnorm():
    """A network in which images do not depend on their neighbours."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def of_share(way, share):
    augmentation = HorizontalFlip() if share.of == 1 else SharedDraw(HorizontalFlip(), share)
    objective = objective_of(network=groupnorm, augmentation=augmentation)
    if way == "compiled":
        objective.compile(backend="eager")
    return objective


def in_shares(share):
    def call(step):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(IMAGES, 3, 8, 8, dtype=torch.float64, generator=generator)
        return images[share.rank :: share.of], torch.arange(IMAGES)[share.rank :: share.of] % 4

    return call


def steps_of(objective, share, call):
    optimizer, weights, batches = torch.optim.SGD(objective.parameters(), 0.05), [], in_shares(share)
    for step in range(STEPS):
        losses = call(*batches(step), draw(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        weights.append(float(losses.gamma))
    parameters = torch.cat([p.detach().flatten() for p in objective.parameters()])
    return torch.tensor(weights), objective.balance.lengths.clone(), parameters


def both_ways(rank):
    """What one of the two processes comes to; its graphs run as they are traced."""
    torch.compile = lambda graph, **options: graph
    found, share = {}, Share(rank, 2)
    for way in ("eager", "compiled"):
        objective = of_share(way, share)
        found[way] = steps_of(objective, share, DistributedDataParallel(objective))
    return found


@pytest.fixture(scope="module")
def from_two_processes(tmp_path_factory):
    return in_two(tmp_path_factory.mktemp("ddp"), both_ways)


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.usefixtures("traced")
def test_two_processes_choose_what_one_would(from_two_processes, way):
    objective = of_share(way, Share())
    whole = steps_of(objective, Share(), objective)
    for found in from_two_processes:
        for ours, theirs in zip(found[way], whole, strict=True):
            assert_close(ours, theirs, 1e-5)


class Steep(nn.Module):
    """A network of float16 whose gradients, multiplied by the scale that they are taken at, overflow."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 4)).half()

    def forward(self, x):
        return 30 * self.net(x)


def test_the_term_waits_while_no_measurement_is_finite():
    torch.manual_seed(0)
    objective = Objective(Steep(), HorizontalFlip(), balance=0.1, normalize="none")
    images, target = torch.rand(4, 3, 8, 8).half(), torch.arange(4)
    found = [objective(images, target, draw(0)) for _ in range(8 * EVERY)]
    gammas = [float(losses.gamma) for losses in found]
    assert gammas[0] == 0  # it overflows at first
    assert 0 < gammas[-1] != 1
    assert set(gammas[: gammas.index(next(g for g in gammas if g))]) == {0.0}


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_lengths_keep_their_precision(convert):
    objective = objective_of()
    trained(objective, 2)
    lengths = objective.balance.lengths.clone()
    convert(objective)
    assert objective.balance.lengths.dtype is torch.float32
    assert torch.equal(objective.balance.lengths, lengths)
    assert torch.equal(objective.get_extra_state()[1:].float(), lengths)
