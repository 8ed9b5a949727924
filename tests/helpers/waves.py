"""Smooth images, which resampling hardly blurs."""

import torch

N, HEIGHT, WIDTH = 6, 40, 56


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n=N, height=HEIGHT, width=WIDTH, dtype=torch.float64, channels=1):
    """Sums of a few long waves in [0, 1]: resampling twice costs them little."""
    y = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]
    x = torch.linspace(0, 1, width, dtype=torch.float64)
    phase = torch.rand(n, channels, 1, 1, dtype=torch.float64, generator=generator(1)) * 6
    return (0.5 + 0.25 * torch.sin(4 * x + phase) + 0.25 * torch.cos(3 * y - 2 * x + phase)).to(dtype)
