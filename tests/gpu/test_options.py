"""Every option of the objective on a GPU, eager and captured, is what it is in float64 on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from salnb import Objective
from salnb.augment import Affine, ColorJitter, CutMix, Sequential
from tests.helpers.tolerances import relative_difference

N, CLASSES = 6, 4
TARGET = torch.arange(N) % CLASSES


class Network(nn.Module):
    """Batch norm with and without weights, and an argument beside the images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
        self.norm, self.plain_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x, extra=0.0):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.plain_norm(self.second(x)))
        return self.head(x.mean((2, 3)) + extra)


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, 3, 16, 16, dtype=torch.float64, generator=generator)


# of each: what the objective is made with, and what it is called with beside the images
OPTIONS = {
    "as it is": ({}, {}),
    "balance": ({"balance": 0.3}, {}),
    "no labels": ({"confidence": 0.1, "consistency": 0.5}, {"target": torch.tensor([0, -1, 2, -1, 1, 3])}),
    "partners": ({}, {"partners": images(1)}),
    "masks": ({}, {"masks": images(2)[:, :1] < 0.5}),
    "pairs shuffled": ({"shuffle_pairs": True}, {}),
    "originals held": ({"detach_original": True}, {}),
    "originals only": ({"originals_only": True}, {}),
    "eq. 6": ({"beta": 0.5, "layers": ["norm"], "layer_relative": True}, {}),
    "log-probabilities": ({"score": "log_prob", "normalize": "zscore"}, {}),
    "pooled": ({"pool": 2}, {}),
    "an argument": ({}, {"model_kwargs": {"extra": torch.full((N, 8), 0.1, dtype=torch.float64)}}),
    "smoothed labels": ({"class_loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, {}),
    "weights": ({}, {"target": torch.full((N, CLASSES), 1 / CLASSES, dtype=torch.float64)}),
    "CutMix": ({"augmentation": CutMix()}, {}),
    "a sequence": ({"augmentation": Sequential(ColorJitter(), Affine(), CutMix())}, {}),
}


def step(objective, x, given):
    """Total and gradients of a step in which the CPU draws the same numbers each time."""
    objective.zero_grad()
    losses = objective(
        x, **{"target": TARGET.to(x.device), "generator": torch.Generator().manual_seed(5)} | given
    )
    losses.total.backward()
    gradients = [p.grad.flatten() for p in objective.parameters()]
    return torch.cat([losses.total.detach()[None], *gradients])


@pytest.mark.parametrize(("mode", "training"), [("eager", True), ("eager", False), ("captured", True)])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name, mode, training, cuda):
    options, given = OPTIONS[name]
    objective = Objective(Network().double(), **{"augmentation": Affine()} | options).train(training)
    exact = step(copy.deepcopy(objective), x := images(), given)
    objective.to(cuda)
    if mode == "captured":
        objective.compile(mode="cuda-graphs")
    found = step(objective, x.to(cuda), pytree.tree_map(lambda tensor: tensor.to(cuda), given))
    assert relative_difference(found.cpu(), exact) < 1e-7
