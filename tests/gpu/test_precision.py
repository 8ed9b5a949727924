"""Less than float32, other layouts, compiled steps: they come near to float64 on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from salnb import Objective, saliency
from salnb.augment import AUGMENTATIONS, Rotation
from salnb.objective.precision import tf32
from tests.helpers.methods import cheap
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import GRADIENT_FROM_FLOAT64, assert_agrees, in_one, relative_difference

N = 8
TARGET = torch.arange(N) % 4


def objective_of(model):
    return Objective(model, Rotation(20), gamma=2.0, normalize="l2")


@pytest.fixture
def step():
    """An objective of a smooth network, a batch, and the total and the gradient of a step in float64."""
    augmentation, x = Rotation(20), torch.rand(N, 3, 16, 16)
    params = augmentation.make_params(x, torch.Generator().manual_seed(3))
    return Step(conv_bn(nn.SiLU), x, params)


class Step:
    """A step whose result is known."""

    def __init__(self, model, x, params):
        self.model, self.x, self.params = model, x, params
        exact = tree_map(torch.Tensor.double, params)
        self.exact = self.run(objective_of(copy.deepcopy(model).double()), x.double(), exact)

    def run(self, objective, x, params):
        """Total and gradient."""
        objective.zero_grad()
        objective.augmentation.make_params = lambda images, generator: params
        losses = objective(x, TARGET.to(x.device))
        losses.total.backward()
        return losses.total.detach(), in_one(p.grad for p in objective.parameters())

    def on(self, device):
        """Objective, images and what was drawn, there."""
        return objective_of(self.model.to(device)), self.x.to(device), self.params.to(device)

    def cosine(self, gradient):
        return torch.cosine_similarity(gradient.cpu().double(), self.exact[1], dim=0).item()


def supports(device, capability):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < capability:
        pytest.skip(f"needs a GPU of capability {capability[0]}.{capability[1]}")


def test_float32_is_rounded_to_tf32_where_that_is_allowed_and_only_there(cuda):
    supports(cuda, (8, 0))
    x, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    exact = torch.conv2d(x.double(), weight.double())
    matrix = torch.randn(512, 512)
    for allowed, low, high in ((False, 0, 1e-5), (True, 1e-5, 1e-2)):
        with tf32(allowed):
            found = torch.conv2d(x.to(cuda), weight.to(cuda))
            product = matrix.to(cuda) @ matrix.to(cuda)
        assert low <= relative_difference(found.cpu().double(), exact) < high
        assert low <= relative_difference(product.cpu().double(), matrix.double() @ matrix.double()) < high


def test_a_step_in_tf32(step, cuda):
    with tf32(True):
        total, gradient = step.run(*step.on(cuda))
    assert total.item() == pytest.approx(step.exact[0].item(), rel=2e-2)
    assert step.cosine(gradient) > 0.98


def test_a_step_in_bfloat16(step, device):
    supports(device, (8, 0))
    with torch.autocast(device.type, torch.bfloat16):
        total, gradient = step.run(*step.on(device))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(step.exact[0].item(), rel=0.1)
    assert step.cosine(gradient) > 0.9


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_float16_with_a_scaler_trains(step, way, device, monkeypatch):
    """The gradient is that of float64, and the scales of float16 are on the device, where nothing waits for them."""
    objective, x, params = step.on(device)
    objective.augmentation.make_params = lambda images, generator: params
    if way == "compiled":
        monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)  # as it was traced
        objective.compile(backend="eager")
    target = TARGET.to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    totals = []
    for number in range(8):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            losses = objective(x, target)
        scaler.scale(losses.total).backward()
        scaler.unscale_(optimizer)
        if number == 0:
            assert step.cosine(in_one(p.grad for p in objective.parameters())) > 0.97
        scaler.step(optimizer)
        scaler.update()
        totals.append(losses.total.item())
    assert totals[-1] < totals[0]
    assert scaler.get_scale() == 2**10  # nothing has overflowed
    assert {buffer.device.type for buffer in objective.buffers()} == {device.type}


def test_channels_last(step, device):
    objective, x, params = step.on(device)
    objective = objective.to(memory_format=torch.channels_last)
    formats = []
    objective.model[3].register_forward_pre_hook(
        lambda module, given: formats.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    total, gradient = step.run(objective, x.contiguous(memory_format=torch.channels_last), params)
    assert formats == [True]
    assert_agrees(total, step.exact[0])
    assert_agrees(gradient, step.exact[1], GRADIENT_FROM_FLOAT64)


def test_a_step_compiled_by_inductor(step, cuda):
    objective, x, params = step.on(cuda)
    objective.compile()
    for _ in range(2):
        total, gradient = step.run(objective, x, params)
        assert_agrees(total, step.exact[0], GRADIENT_FROM_FLOAT64)
        assert_agrees(gradient, step.exact[1], GRADIENT_FROM_FLOAT64)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_step_waits_for_nothing(name, step, cuda):
    """From the second one on, the host only hands out work."""
    objective, x, _ = step.on(cuda)
    objective.augmentation = AUGMENTATIONS[name]()
    target, generator = TARGET.to(cuda), torch.Generator(cuda).manual_seed(0)
    objective(x, target, generator).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(x, target, generator).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", saliency.METHODS)
def test_maps_in_bfloat16(method, device):
    supports(device, (8, 0))
    model, x = conv_bn().eval().to(device), torch.rand(4, 3, 16, 16).to(device)
    options = cheap(method, still=True)
    exact = saliency.METHODS[method](model, x, 1, **options)
    with torch.autocast(device.type, torch.bfloat16):
        found = saliency.METHODS[method](model, x, 1, **options)
    assert found.dtype == torch.float32
    cosine = torch.cosine_similarity(found.flatten(1), exact.flatten(1))
    assert cosine.min() > 0.9
