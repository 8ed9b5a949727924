"""Compiled steps of models whose random numbers a graph would not draw as they do: refused, by what they do."""

import copy
import threading

import pytest
import torch
from torch import nn

from salnb import Objective
from salnb.augment import HorizontalFlip
from salnb.objective.randomness import refuse_seeding
from tests.helpers.tolerances import assert_close

IMAGES, TARGET = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])


class Noisy(nn.Module):
    """Adds what a function of the features draws."""

    def __init__(self, noise):
        super().__init__()
        self.conv, self.head, self.noise = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), noise
        self.double()

    def forward(self, x):
        x = self.conv(x)
        return self.head((x + self.noise(x)).tanh().mean((2, 3)))


def forked(x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randn_like(x)


def forked_only(x):
    with torch.random.fork_rng():
        return torch.randn_like(x)


def seeded(x):
    torch.manual_seed(0)
    return torch.randn_like(x)


def seeded_elsewhere(x):
    torch.random.manual_seed(0)
    return torch.randn_like(x)


def set_back(x):
    state = torch.get_rng_state()
    noise = torch.randn_like(x)
    torch.set_rng_state(state)
    return noise


def own(x):
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))


def step(objective, seed=5):
    torch.manual_seed(seed)
    losses = objective(IMAGES, TARGET, torch.Generator().manual_seed(7))
    losses.total.backward()
    return losses.total.detach()


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (forked, "leaves PyTorch's random generators alone"),
        (forked_only, "set_rng_state, or fork_rng"),
        (seeded, "calls manual_seed"),
        (seeded_elsewhere, "calls manual_seed"),
        (set_back, "calls set_rng_state"),
        (own, "has a torch.Generator of its own"),
    ],
)
def test_what_a_graph_would_draw_otherwise_is_refused(noise, words):
    objective = Objective(Noisy(noise), HorizontalFlip())
    assert step(objective).isfinite()
    seeding, before = torch.manual_seed, torch.initial_seed()
    objective.compile(backend="eager")
    with pytest.raises(RuntimeError, match=words):
        step(objective, before)
    assert torch.manual_seed is seeding
    objective._compiled = None
    assert step(objective).isfinite()


def test_what_is_drawn_from_the_default_generator_is_drawn_in_each_step():
    eager = Objective(Noisy(torch.randn_like), HorizontalFlip())
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="eager")
    found = [step(compiled, seed) for seed in (1, 2, 1)]
    assert_close(found[0], step(eager, 1), 1e-10)
    assert found[0] == found[2] != found[1]


def test_another_thread_may_seed():
    with refuse_seeding():
        thread = threading.Thread(target=torch.random.set_rng_state, args=(torch.get_rng_state(),))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="calls seed"):
            torch.seed()


class Freezing(Noisy):
    def forward(self, x):
        self.head.bias.requires_grad_(False)
        return super().forward(x)


def test_a_parameter_that_a_forward_pass_freezes_is_named():
    objective = Objective(Freezing(torch.zeros_like), HorizontalFlip())
    objective.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"leaves requires_grad alone, but that of model\.head\.bias"):
        step(objective)
