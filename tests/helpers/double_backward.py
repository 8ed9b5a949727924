"""What the tests of the fast double backward compare: operators and networks, plain and fast."""

import contextlib

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from salnb.double_backward import fast_double_backward
from tests.helpers.tolerances import assert_close

aten = torch.ops.aten


class Calls(TorchDispatchMode):
    """Records the operators that reach the dispatcher, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))

    def arguments(self, operator):
        return [args for func, args in self.seen if func is operator]


def random(*shape, dtype=torch.float64, grad=True, device="cpu"):
    return torch.randn(*shape, dtype=dtype).to(device).requires_grad_(grad)


def same(actual, expected):
    """Whether two running statistics are equal; on a GPU, where cuDNN has its own kernel, but for rounding."""
    if actual.device.type == "cpu":
        return torch.equal(actual, expected)
    return torch.allclose(actual, expected, rtol=10 * torch.finfo(torch.float32).eps)


def second_order(function, inputs):
    """Value, first and second derivatives of a nonlinear functional of ``function(*inputs)``."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    y = function(*inputs)
    first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
    penalty = sum((g * g.detach().cos() + g.square()).sum() for g in first)
    second = torch.autograd.grad(penalty, wanted)
    return y, *first, *second


def agree(actual, expected, tolerance=None):
    """The tensors are equal up to the tolerance, those that are zero but for rounding only zero as well."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        zero = 100 * torch.finfo(e.dtype).eps
        if e.abs().max() > zero:
            assert_close(a, e, tolerance)
        else:
            assert a.abs().max() <= zero


def check(function, inputs):
    """Plain and fast agree in everything ``second_order`` returns."""
    expected = second_order(function, inputs)
    with fast_double_backward():
        actual = second_order(function, inputs)
    agree(actual, expected)


def saliency_step(model, images, target, context=contextlib.nullcontext):
    """Logits, and the gradient of cross-entropy and saliency loss with respect to the parameters."""
    parameters = list(model.parameters())
    images = images.detach().requires_grad_()
    with context():
        logits = model(images)
        score = logits.gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        a, b = gradient.abs().amax(1).div(gradient.abs().amax((1, 2, 3)).view(-1, 1, 1)).chunk(2)
        loss = F.cross_entropy(logits, target) + (a - b).square().mean()
    return logits, gradient, *torch.autograd.grad(loss, parameters)


def batch(dtype=torch.float64):
    return torch.randn(6, 3, 16, 16).to(dtype), torch.randint(0, 5, (6,))
