"""Networks with segments that are recomputed in the backward pass."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Segment(nn.Module):
    """A part of a network that is recomputed in the backward pass, or stored."""

    def __init__(self, *layers, recompute=True, **options):
        super().__init__()
        self.layers, self.recompute, self.options = nn.Sequential(*layers), recompute, options

    def forward(self, x):
        if not self.recompute:
            return self.layers(x)
        return checkpoint(self.layers, x, **{"use_reentrant": False} | self.options)


def stored(model):
    """A copy without recomputation."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Segment):
            module.recompute = False
    return twin


class Sum(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], 1)


class Attention(nn.Module):
    def forward(self, x):
        rows = x.flatten(2)
        return F.scaled_dot_product_attention(rows, rows, rows).reshape(x.shape)


class Smoothed(nn.Module):
    """Reads what it moved in the same pass, as spectral norm does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.abs().mean())
        return x * self.mean


class Counts(nn.Module):
    """Whole numbers in buffers: one that moves, and a table."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("order", torch.arange(5, -1, -1))

    def forward(self, x):
        self.calls += 1
        return x[:, self.order] * self.calls


class Differentiable(nn.Module):
    """A buffer that has a gradient."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(6, 1, 1, dtype=torch.float64, requires_grad=True))

    def forward(self, x):
        return x * self.scale


class Functional(nn.Module):
    """Statistics without a module of their own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=True)


# what a segment is made of, from (N, 6, 8, 8) to (N, 6, 8, 8)
LAYERS = {
    "linear": lambda: [nn.Flatten(), nn.Linear(384, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8),
                       nn.Linear(8, 384), nn.Unflatten(1, (6, 8, 8))],
    "convolution": lambda: [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)],
    "evaluation": lambda: [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6).eval(), nn.ReLU()],
    "cumulative": lambda: [nn.BatchNorm2d(6, momentum=None), nn.Conv2d(6, 6, 1)],
    "norms": lambda: [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, track_running_stats=True), nn.SiLU()],
    "pooling": lambda: [nn.MaxPool2d(2), nn.Conv2d(6, 6, 1), nn.Upsample(scale_factor=2)],
    "concatenation": lambda: [Sum(nn.Conv2d(6, 2, 1), nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU()))],
    "attention": lambda: [Attention(), nn.Conv2d(6, 6, 1)],
    "dropout": lambda: [nn.Conv2d(6, 6, 1), nn.Dropout(0.4), nn.ReLU()],
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 3, padding=1)), nn.Tanh()],
    "its own buffer": lambda: [nn.Conv2d(6, 6, 1), Smoothed(), nn.Tanh()],
    "whole numbers": lambda: [nn.Conv2d(6, 6, 1), Counts(), nn.Tanh()],
    "differentiable buffer": lambda: [nn.Conv2d(6, 6, 1), Differentiable(), nn.Tanh()],
    "functional norm": lambda: [nn.Conv2d(6, 6, 1), Functional(), nn.ReLU()],
    "nested": lambda: [Segment(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()), nn.Conv2d(6, 6, 1), nn.ReLU()],
    "hard sigmoid": lambda: [nn.Conv2d(6, 6, 1), nn.Hardsigmoid(), nn.Hardswish()],
}  # fmt: skip


def network(*middle):
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 4)]
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), *middle, *head).double()
