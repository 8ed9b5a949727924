"""The fast double backward of whole networks: the same numbers, and what they cost."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from salnb.double_backward import fast_double_backward
from tests.helpers.double_backward import Calls, agree, aten, batch, saliency_step, same
from tests.helpers.networks import Residual
from tests.helpers.tolerances import FROM_FLOAT64, NONDETERMINISM, assert_close

# of twelve layers in float32; a GPU chooses among algorithms that sum in other ways
ROUNDING = {"cpu": 5e-6, "cuda": FROM_FLOAT64}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_network(dtype, training, device):
    model = Residual().to(device, dtype).train(training)
    other = copy.deepcopy(model)
    images, target = (t.to(device) for t in batch(dtype))
    expected = saliency_step(model, images, target)
    actual = saliency_step(other, images, target, fast_double_backward)
    agree(actual, expected, ROUNDING[device.type] if dtype is torch.float32 else None)
    for a, e in zip(other.buffers(), model.buffers(), strict=True):
        assert same(a, e)


def test_the_gradient_against_finite_differences(random, device):
    """The oracle that shares no code: perturb each parameter of a network in training."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 2)
    ).double().to(device)  # fmt: skip
    images, names = random(4, 2, 4, 4), [n for n, _ in model.named_parameters()]

    def loss(*values):
        with fast_double_backward():
            score = (
                torch.func.functional_call(model, dict(zip(names, values, strict=True)), images)
                .square()
                .sum()
            )
            return torch.autograd.grad(score, images, create_graph=True)[0].square().sum()

    assert gradcheck(loss, tuple(model.parameters()), nondet_tol=NONDETERMINISM[device.type])


def test_channels_last_is_kept(device):
    model = Residual().to(device, memory_format=torch.channels_last)
    images, target = (t.to(device) for t in batch(torch.float32))
    images = images.contiguous(memory_format=torch.channels_last)
    expected = saliency_step(copy.deepcopy(model), images, target)
    with fast_double_backward():
        features = model.norm(model.stem(images))
    assert features.is_contiguous(memory_format=torch.channels_last)
    actual = saliency_step(model, images, target, fast_double_backward)
    agree(actual, expected, ROUNDING[device.type])


def test_autocast():
    """Convolutions run in bfloat16 where autocast runs them so, in both backwards too."""
    model = Residual()
    images, target = batch(torch.float32)

    @contextlib.contextmanager
    def fast():
        with torch.autocast("cpu", torch.bfloat16), fast_double_backward():
            yield

    expected = saliency_step(
        copy.deepcopy(model), images, target, lambda: torch.autocast("cpu", torch.bfloat16)
    )
    with Calls() as calls:
        actual = saliency_step(copy.deepcopy(model), images, target, fast)
    exact = saliency_step(model, images, target)
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert a.dtype == e.dtype
        if x.abs().max() > 1e-5:  # as near to the float32 result as plain autocast is
            assert (a - x).norm() <= 1.5 * (e - x).norm() + 2e-2 * x.norm()
    for operator in (aten.convolution.default, aten.convolution_backward.default):
        assert {args[0].dtype for args in calls.arguments(operator)} == {torch.bfloat16}


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_make_fx_traces_the_whole_step(tracing_mode):
    """The compiled path: one graph of forward, inner gradient, losses and parameter gradients."""
    model = Residual().double()
    images, target = batch()
    names = [n for n, _ in model.named_parameters()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def step(parameters, buffers, images, target):
        images = images.detach().requires_grad_()
        values = dict(zip(names, parameters, strict=True)) | buffers
        with fast_double_backward():
            logits = torch.func.functional_call(model, values, images)
            score = logits.gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, images, create_graph=True)
            loss = F.cross_entropy(logits, target) + gradient.square().mean()
        return torch.autograd.grad(loss, parameters)

    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    fresh = lambda: {n: b.clone() for n, b in buffers.items()}  # noqa: E731
    graph = make_fx(step, tracing_mode=tracing_mode)(parameters, fresh(), images, target)
    other = torch.randn_like(images)
    for given in (images, other):
        used, left = fresh(), fresh()
        expected = step(parameters, left, given, target)
        agree(graph(parameters, used, given, target), expected)
        for name, value in left.items():
            assert torch.equal(used[name], value)

    # PyTorch's own double backward convolves with kernels as large as the feature map
    with Calls() as calls:
        graph(parameters, fresh(), images, target)
    assert {tuple(args[1].shape[2:]) for args in calls.arguments(aten.convolution.default)} == {
        (3, 3),
        (1, 1),
    }


def test_the_inner_gradient_computes_no_weight_gradients():
    """With respect to the images only, the weights' gradients would cost as much again for nothing."""
    model, (images, target) = Residual().double(), batch()
    with fast_double_backward():
        score = model(images.requires_grad_()).gather(1, target[:, None]).sum()
        with Calls() as recorded:
            torch.autograd.grad(score, images, create_graph=True)
    masks = recorded.arguments(aten.convolution_backward.default)
    assert len(masks) == 3
    assert not any(args[-1][1] for args in masks)


def test_each_second_weight_gradient_is_one_ordinary_weight_gradient():
    model, (images, target) = Residual().double(), batch()
    with Calls() as recorded:
        saliency_step(model, images, target, fast_double_backward)
    backward = recorded.arguments(aten.convolution_backward.default)
    assert sum(args[-1][1] for args in backward) == 2 * 3  # of the class path and of the saliency path
    assert sum(args[-1][0] for args in backward) == 2 * 3 - 1  # the images need no gradient of the loss
    kernels = {tuple(args[1].shape[2:]) for args in recorded.arguments(aten.convolution.default)}
    assert kernels == {(3, 3), (1, 1)}


def test_no_gradients_are_computed_for_frozen_parameters():
    model, (images, target) = Residual().double().requires_grad_(False), batch()
    model.head.requires_grad_(True)
    images.requires_grad_()
    with Calls() as recorded:
        with fast_double_backward():
            score = model(images).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        gradient.square().sum().backward()
    assert not any(args[-1][1] for args in recorded.arguments(aten.convolution_backward.default))
    assert model.head.weight.grad is not None


def test_a_graph_can_be_differentiated_twice_and_accumulated():
    model, (images, target) = Residual().double(), batch()
    expected = saliency_step(copy.deepcopy(model).eval(), images, target)
    model.eval()
    images.requires_grad_()
    with fast_double_backward():
        logits = model(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), images, create_graph=True)
    assert_close(gradient, expected[1])
    loss = gradient.square().sum()
    once = torch.autograd.grad(loss, model.stem.weight, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(loss, model.stem.weight)[0])
