"""The one table of tolerances: how far two computations of the same thing may be apart."""

import torch

# of results of one dtype on one device
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# of float32 without TF32, on any device, and float64 on the CPU: of a map or a loss, and of a second derivative
FROM_FLOAT64, GRADIENT_FROM_FLOAT64 = 2e-5, 2e-4
# of two runs in float64: some kernels of a GPU add in whatever order
NONDETERMINISM = {"cpu": 0.0, "cuda": 1e-10}
# of squares of what float64 rounds
ZERO = 1e-28


def relative_difference(actual, expected):
    """Largest absolute difference over the largest absolute value expected, where that is not about zero."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    gap = (actual - expected).abs().max().item()
    return gap / scale if scale > ZERO else gap


def assert_close(actual, expected, tolerance=None):
    """Assert equality up to the dtype's tolerance, or up to the one given."""
    limit = RELATIVE[expected.dtype] if tolerance is None else tolerance
    gap = relative_difference(actual, expected)
    assert gap <= limit, f"relative difference {gap:.3g}, allowed {limit:.3g}"


def assert_agrees(actual, exact, tolerance=FROM_FLOAT64):
    """Assert that a result in float32, of any device, is that of float64 on the CPU."""
    assert (actual.dtype, exact.dtype, exact.device.type) == (torch.float32, torch.float64, "cpu")
    assert_close(actual.detach().cpu().double(), exact.detach(), tolerance)


def in_one(tensors):
    """All tensors in one vector, where a gradient that is zero but for rounding does not matter."""
    return torch.cat([tensor.flatten() for tensor in tensors])
