"""What is made on one device and used on the other: random numbers, checkpoints, records."""

import copy

import torch

from salnb import Objective, results, saliency, trust
from salnb.augment import Affine
from salnb.train.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import GRADIENT_FROM_FLOAT64, relative_difference

TARGET = torch.tensor([0, 1, 2, 3])


def images(device):
    return torch.rand(4, 3, 16, 16).to(device)


def both(device):
    """Generators of the CPU and of the device."""
    return [torch.Generator(where).manual_seed(5) for where in ("cpu", device)]


def test_noise_of_either_device(device):
    model, x = conv_bn().eval(), images("cpu")
    for generator in both(device):
        state = generator.get_state()
        found = saliency.smoothgrad(copy.deepcopy(model).to(device), x.to(device), 1, generator=generator)
        generator.set_state(state)
        on_cpu = saliency.smoothgrad(model, x, 1, generator=generator)
        assert found.device.type == device.type
        assert relative_difference(found.cpu(), on_cpu) < GRADIENT_FROM_FLOAT64


def test_equal_pixels_are_drawn_by_either_device(device):
    model, x = conv_bn().eval().to(device), images(device)
    for generator in both(device):
        state = generator.get_state()
        curves = []
        for _ in range(2):
            generator.set_state(state)
            curves.append(
                trust.deletion_curve(
                    model, x, torch.ones_like(x[:, :1]), 1, replacement=0 * x, generator=generator
                )
            )
        assert curves[0].device.type == device.type
        assert relative_difference(*curves) < 1e-6


def test_a_step_draws_from_either_device(device):
    objective, x = Objective(conv_bn(), Affine()).to(device), images(device)
    for generator in both(device):
        losses = objective(x, TARGET.to(device), generator)
        losses.total.backward()
        assert losses.total.isfinite()


def test_a_checkpoint_of_the_device_is_read_on_the_cpu(tmp_path, device):
    """Parameters, running statistics, momentum and the step: what follows is the same up to rounding."""

    def trained(objective, optimizer, steps):
        where = next(objective.parameters()).device
        for _ in range(steps):
            optimizer.zero_grad()
            objective(x.to(where), TARGET.to(where), torch.Generator().manual_seed(7)).total.backward()
            optimizer.step()
        return objective

    def make(where):
        objective = Objective(conv_bn(), Affine(), every=2).to(where)
        return objective, torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9)

    x = images("cpu")
    objective, optimizer = make(device)
    trained(objective, optimizer, 3)
    save_checkpoint(tmp_path, 3, {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()})
    state = load_checkpoint(tmp_path)
    leaves = torch.utils._pytree.tree_leaves(state)
    assert {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)} == {"cpu"}

    resumed, resumed_optimizer = make("cpu")
    resumed.load_state_dict(state["objective"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert resumed.steps_done == 3
    assert results.parameters_sha256(resumed.model) == results.parameters_sha256(objective.model)
    trained(objective, optimizer, 2)
    trained(resumed, resumed_optimizer, 2)
    for there, here in zip(objective.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)
