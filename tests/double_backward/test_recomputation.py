"""What saved-tensor hooks recompute runs in the modes of the forward pass, and what they hand out is checked."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from salnb.double_backward import fast_double_backward
from tests.helpers.checkpointing import LAYERS, Segment, network, stored
from tests.helpers.tolerances import assert_close


def in_a_new_thread(work):
    """Where no context has been entered before."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize("run", [lambda work: work(), in_a_new_thread], ids=["here", "in a new thread"])
def test_the_context_by_itself(run):
    run(compare_with_stored)


def compare_with_stored():
    model = network(Segment(*LAYERS["linear"]()))
    gradients = []
    for m in (model, stored(model)):
        x = torch.ones(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        with fast_double_backward():
            score = m(x)[:, 0].sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        gradients.append(torch.autograd.grad(gradient.square().sum(), m[0].weight)[0])
    assert_close(*gradients)


class Square(nn.Module):
    """Its weight is as large as its transpose."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


def test_what_is_unpacked_is_what_was_saved():
    """Hooks that PyTorch was given past the class: what recomputes in them runs other functions."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), Square(), nn.Linear(8, 4)).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    transposed = saved_tensors_hooks(lambda t: t, lambda t: t.t() if t.shape == (8, 8) else t)
    with fast_double_backward(), transposed:
        score = model(x)[:, 0].sum()
    with pytest.raises(RuntimeError, match="the backward pass of Affine got a tensor of shape"):
        torch.autograd.grad(score, x, create_graph=True)
    cut = saved_tensors_hooks(lambda t: t, lambda t: t[:1])
    for function in (
        F.relu,
        partial(F.max_pool2d, kernel_size=2),
        lambda t: F.batch_norm(t, None, None, training=True),
    ):
        with fast_double_backward(), cut:
            score = function(x).sum()
        with pytest.raises(RuntimeError, match="where the forward pass saved"):
            torch.autograd.grad(score, x, create_graph=True)
