"""CUDA graphs of the eager step, `Objective.compile(mode="cuda-graphs")`: on a GPU only, experimental."""

import copy

import pytest
import torch
from torch import nn

from salnb import Objective, models
from salnb.augment import AUGMENTATIONS, Affine
from salnb.double_backward import use_fused_batch_norm
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import relative_difference

TARGET = torch.arange(4)


def pair(model, device, augmentation=None, **options):
    """The same objective eager and captured."""
    torch.manual_seed(0)
    eager = Objective(model, augmentation or Affine(), **options).to(device)
    captured = copy.deepcopy(eager)
    captured.compile(mode="cuda-graphs")
    return eager, captured


def step(objective, images, precision=None):
    objective.zero_grad()
    torch.manual_seed(11)
    with torch.autocast("cuda", precision, enabled=precision is not None):
        losses = objective(images, TARGET.to(images.device), torch.Generator(images.device).manual_seed(7))
    losses.total.backward()
    return losses, torch.cat([p.grad.flatten() for p in objective.parameters()])


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_steps_are_those_of_the_eager_objective(cuda, precision, memory_format):
    eager, captured = (each.to(memory_format=memory_format) for each in pair(conv_bn(), cuda, every=2))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (eager, captured)]
    for _ in range(4):
        images = torch.rand(4, 3, 16, 16).to(cuda, memory_format=memory_format)
        (expected, gradient), (found, other) = (step(each, images, precision) for each in (eager, captured))
        # in half precision ReLUs switch on rounding, and the two drift apart
        tolerance, cosine = (1e-3, 0.9999) if precision is None else (0.1, 0.9)
        assert relative_difference(found.total, expected.total) < tolerance
        assert torch.cosine_similarity(other, gradient, dim=0) > cosine
        # the objective's own are scales of float16, which eager steps leave to the GradScaler
        for buffer, reference in zip(captured.model.buffers(), eager.model.buffers(), strict=True):
            assert relative_difference(buffer.float(), reference.float()) < tolerance
        for optimizer in optimizers:
            optimizer.step()
    assert len(captured._compiled._graphs) == 2


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation(name, cuda):
    """In float64, where nothing is rounded much."""
    eager, captured = pair(conv_bn().double(), cuda, augmentation=AUGMENTATIONS[name]())
    for _ in range(2):
        images = torch.rand(4, 3, 16, 16).double().to(cuda)
        (expected, gradient), (found, other) = (step(each, images) for each in (eager, captured))
        assert relative_difference(found.total, expected.total) < 1e-9
        assert relative_difference(other, gradient) < 1e-7


def test_what_is_kept_is_not_overwritten_and_dropout_goes_on(cuda):
    model = nn.Sequential(*list(conv_bn())[:-1], nn.Dropout(0.5), nn.Linear(6, 4))
    _, captured = pair(model, cuda)
    images = torch.rand(4, 3, 16, 16).to(cuda)
    losses = [captured(images, TARGET.to(cuda)) for _ in range(3)]
    kept = [each.total.item() for each in losses]
    captured(images, TARGET.to(cuda))
    assert [each.total.item() for each in losses] == kept
    assert len(set(kept)) == 3
    sum(each.total for each in losses).backward()


def test_numbers_drawn_on_the_host_are_refused(cuda):
    """A graph would have drawn them once."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.rest = conv_bn()

        def forward(self, x):
            return self.rest(x * torch.rand(()).item())

    _, captured = pair(Noisy(), cuda)
    with pytest.raises(RuntimeError, match="random numbers are drawn on its device"):
        captured(torch.rand(4, 3, 16, 16).to(cuda), TARGET.to(cuda))


def test_a_network_of_table_4_with_the_fused_kernels(cuda):
    """The switch belongs to what a graph holds for."""
    pytest.importorskip("triton")
    eager, captured = pair(models.build("resnet18", 10), cuda)
    images = torch.rand(4, 3, 64, 64).to(cuda)
    try:
        for enabled in (False, None, True):
            use_fused_batch_norm(enabled)
            (_, gradient), (_, other) = (step(each, images) for each in (eager, captured))
            assert relative_difference(other, gradient) < 1e-2
    finally:
        use_fused_batch_norm(None)
    assert len(captured._compiled._graphs) == 3
