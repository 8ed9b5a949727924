"""The one table of tolerances: how far two computations of the same thing may be apart."""

import torch

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def relative_difference(actual, expected):
    """Largest absolute difference over the largest absolute value expected (0 where both are zero)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    gap = (actual - expected).abs().max().item()
    return gap / scale if scale else gap


def assert_close(actual, expected, tolerance=None):
    """Assert equality up to the dtype's tolerance, or up to the one given."""
    limit = RELATIVE[expected.dtype] if tolerance is None else tolerance
    gap = relative_difference(actual, expected)
    assert gap <= limit, f"relative difference {gap:.3g}, allowed {limit:.3g}"
