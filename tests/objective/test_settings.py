"""Settings that are assigned to an objective after it was made: those of the next call, or refused there."""

import copy
import warnings

import pytest
import torch
from torch import nn

from salnb import Objective
from salnb.augment import Contrast, HorizontalFlip
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 1, 2, 3])


def made(**settings):
    return Objective(conv_bn().double().eval(), HorizontalFlip(), **settings)


def step(objective):
    """Losses and gradients of one training step, always of the same images."""
    torch.manual_seed(3)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    losses = objective(images, TARGET, torch.Generator().manual_seed(7), step=0)  # with balance it measures
    losses.total.backward()
    found = [losses.total.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)]
    objective.zero_grad()
    return found


WRONG = {
    "alpha": float("nan"),
    "beta": -1,
    "gamma": -1.0,
    "consistency": "much",
    "confidence": 2.0,
    "balance": -0.1,
    "every": 0,
    "warmup": -1,
    "pool": 0,
    "num_classes": 0,
    "layers": "0",
    "layer_distance": "far",
    "layer_relative": 1,
    "method": "gradients",
    "method_options": {"samples": 3},
    "score": "probability",
    "normalize": "range",
    "distance": "l3",
    "detach_original": 0,
    "shuffle_pairs": None,
    "originals_only": "yes",
    "class_loss": 3,
    "output": "logits",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_at_first_is_refused_later_by_the_same_words(name):
    with pytest.raises((TypeError, ValueError)) as first:
        made(**{name: WRONG[name]})
    objective = made()
    step(objective)
    with pytest.raises(type(first.value)) as later:  # noqa: PT012, where it is checked is left open
        setattr(objective, name, WRONG[name])
        step(objective)
    assert str(later.value) == str(first.value)


CHANGES = {
    "alpha": {"alpha": 0.5},
    "eq. 6": {"beta": 2.0, "layers": ["0"]},
    "eq. 6, weighted": {"beta": 2.0, "layers": {"0": 0.5, "3": 1.0}},
    "gamma": {"gamma": 3},
    "no saliency": {"gamma": 0},
    "balance": {"balance": 0.3},
    "method": {"method": "guided_backprop"},
    "options": {"method": "grad_cam", "method_options": {"layer": "0"}},
    "score": {"score": "log_prob"},
    "no normalisation": {"normalize": None},
    "distance": {"distance": "cosine", "pool": 2},
    "augmentation": {"augmentation": Contrast()},
    "a loss of one's own": {"class_loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
    "originals": {"originals_only": True, "detach_original": True},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("traced")
def test_what_is_assigned_later_is_as_if_it_had_been_given(change, compiled):
    objective = made()
    network = copy.deepcopy(objective.model)
    if compiled:
        objective.compile(backend="eager")
    step(objective)
    for name, value in CHANGES[change].items():
        setattr(objective, name, value)
    fresh = Objective(network, **{"augmentation": HorizontalFlip(), **CHANGES[change]})
    for got, expected in zip(step(objective), step(fresh), strict=True):
        assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("traced")
def test_a_share_that_is_changed_takes_part_in_the_next_step(compiled):
    once, other = made(balance=0.3), made(balance=0.3)
    other.load_state_dict(once.state_dict())
    if compiled:
        once.compile(backend="eager")
    for objective in (once, other):
        step(objective)
        objective.balance = 0.1
        assert objective.balance.share == 0.1
    for got, expected in zip(step(once), step(other), strict=True):
        assert_close(got, expected, 1e-10)
    assert once.current_gamma() == pytest.approx(other.current_gamma())


def test_settings_that_belong_together_are_looked_at_together():
    objective = made()
    objective.beta = 1.0  # wrong, until the layers follow
    objective.layers = ("0",)
    assert step(objective)
    objective.layers["nowhere"] = 1.0
    with pytest.raises(ValueError, match="layers 'nowhere' is unknown"):
        step(objective)


def test_another_model_is_checked_too():
    objective = made(beta=1.0, layers=["3"])
    objective.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    with pytest.raises(ValueError, match="layers '3' is unknown"):
        step(objective)


def test_a_model_of_which_nothing_is_trained_is_warned_about():
    objective = made()
    objective.model.requires_grad_(False)
    with pytest.warns(UserWarning, match="no parameter requires a gradient"):
        step(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            objective(torch.rand(4, 3, 8, 8, dtype=torch.float64), TARGET)
        step(objective.eval())
        without = made(gamma=0.0)
        without.model.requires_grad_(False)
        without(torch.rand(4, 3, 8, 8, dtype=torch.float64), TARGET)
        next(reversed([*objective.model.parameters()])).requires_grad_()
        step(objective.train())


def test_modules_and_parameters_among_the_settings():
    """None becomes a part of the objective, which would have other parameters then."""
    objective, images, target = (
        Objective(conv_bn(), HorizontalFlip()),
        torch.rand(4, 3, 8, 8),
        torch.arange(4),
    )
    parts = len(objective.state_dict())
    objective.output = nn.Identity()
    objective(images, target).total.backward()
    objective.output = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"output must have no parameters and buffers, .* got a Linear"):
        objective(images, target)
    objective.output = None
    for name in ("alpha", "beta", "gamma", "consistency", "confidence", "balance"):
        for learnt in (nn.Parameter(torch.tensor(0.5)), torch.tensor(0.5, requires_grad=True)):
            with pytest.raises(TypeError, match=rf"{name} must be .* that requires no gradient"):
                Objective(conv_bn(), HorizontalFlip(), **{name: learnt})
    objective.alpha = nn.Parameter(torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"alpha must be .* that requires no gradient"):
        objective(images, target)
    objective.alpha = torch.tensor(0.5)
    objective(images, target).total.backward()
    assert len(objective.state_dict()) == parts
