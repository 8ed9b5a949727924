"""Gradients against finite differences in float64."""

import math

import torch


def assert_gradient(loss, parameters, tolerance=1e-6):
    """Assert that autograd's derivative of `loss()` along one direction is that of its values.

    The direction is half random, half the gradient, so that the derivative stands out from rounding.
    Returns the derivative relative to the value, so that a caller can tell that it is not zero.
    """
    parameters = list(parameters)
    value = loss()
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    direction = [_unit(gradients), _unit([torch.randn_like(p) for p in parameters])]
    direction = [a + b for a, b in zip(*direction, strict=True)]
    exact = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    assert math.isfinite(exact)
    # maps of ReLU networks jump wherever an activation changes its sign: only a small step meets none
    numeric = []
    for step in (1e-5, 1e-6, 1e-7, 1e-8):
        numeric.append(central_difference(loss, parameters, direction, step))
        if abs(exact - numeric[-1]) <= tolerance * abs(exact):
            return abs(exact) / max(abs(value.item()), 1e-300)
    raise AssertionError(f"autograd {exact!r}, finite differences {numeric}")


def _unit(tensors):
    norm = math.sqrt(sum(t.square().sum().item() for t in tensors)) or 1.0
    return [t / norm for t in tensors]


def central_difference(loss, parameters, direction, step):
    """Fourth-order central difference of `loss` along `direction`."""

    def at(t):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += t * d
        value = loss().item()
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p -= t * d
        return value

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
