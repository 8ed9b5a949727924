"""float32 on the device agrees with float64 on the CPU: maps, augmentations, losses, steps, measures."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from salnb import Objective, losses, saliency, trust
from salnb.augment import AUGMENTATIONS, Affine
from tests.helpers.methods import cheap
from tests.helpers.networks import FunctionalReLUs, Residual, conv_bn
from tests.helpers.tolerances import FROM_FLOAT64, GRADIENT_FROM_FLOAT64, assert_agrees, in_one

NETWORKS = {"modules": conv_bn, "functions": FunctionalReLUs, "residual": Residual}
TARGET = torch.tensor([0, 1, 2, 3])
CLASSES = 4


def images(n=4, size=16):
    return torch.rand(n, 3, size, size)


def exactly(thing):
    """A copy in float64: a module, or the tensors of a structure."""
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing).double()
    return pytree.tree_map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, thing)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", saliency.METHODS)
def test_maps_and_their_gradients(method, network, training, device):
    model, x = NETWORKS[network]().train(training), images()
    found = []
    for twin, pixels in ((exactly(model), x.double()), (model.to(device), x.to(device))):
        options = cheap(method, still=True)
        maps = saliency.METHODS[method](twin, pixels, TARGET.to(pixels.device), create_graph=True, **options)
        gradients = torch.autograd.grad(maps.square().sum(), twin.parameters(), materialize_grads=True)
        found.append((maps, in_one(gradients)))
    (exact, exact_gradient), (maps, gradient) = found
    assert maps.device.type == device.type
    assert_agrees(maps, exact)
    assert_agrees(gradient, exact_gradient, GRADIENT_FROM_FLOAT64)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations(name, device):
    """But for a few pixels, which rounding moves to another grey level, or across the edge of a mask."""
    aug, x = AUGMENTATIONS[name](), images()
    maps, new_maps = torch.rand(2, len(x), 1, 16, 16)
    drawn = aug.make_params(x, torch.Generator().manual_seed(3))

    def everything(x, maps, new_maps, target, params):
        first, second, valid = aug.align(maps, new_maps, params)
        first, second = first.where(valid, 0), second.where(valid, 0)
        return aug.images(x, params), first, second, valid, aug.targets(target, params, CLASSES)

    given = x, maps, new_maps, TARGET, drawn
    exact = everything(*exactly(given))
    found = everything(*pytree.tree_map(lambda tensor: tensor.to(device), given))
    for actual, wanted in zip(found, exact, strict=True):
        assert actual.device.type == device.type
        far = (actual.cpu().double() - wanted.double()).abs() > FROM_FLOAT64
        assert far.double().mean() <= 0.005


@pytest.mark.parametrize("distance", sorted(losses.DISTANCES))
@pytest.mark.parametrize("normalize", sorted(losses.NORMALIZATIONS))
def test_the_saliency_loss(normalize, distance, device):
    maps, valid = torch.rand(2, 4, 1, 9, 7), torch.rand(4, 1, 9, 7) < 0.7
    found = []
    for both in (maps.double(), maps.to(device)):
        both.requires_grad_()
        loss = losses.saliency_loss(*both, valid.to(both.device), normalize=normalize, distance=distance)
        found.append((loss, *torch.autograd.grad(loss, both)))
    for exact, actual in zip(*found, strict=True):
        assert_agrees(actual, exact)


def test_the_other_losses(device):
    logits, weights, features = torch.randn(6, 4), torch.rand(6, 4).softmax(1), torch.randn(2, 6, 5)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    for target in (labels, weights):
        exact = losses.class_loss(logits.double(), exactly(target))
        assert_agrees(losses.class_loss(logits.to(device), target.to(device)), exact)
    for distance in ("l1", "l2"):
        exact, found = (
            losses.invariance_loss([old], [new], distance=distance)
            for old, new in (features.double(), features.to(device))
        )
        assert_agrees(found, exact)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_a_step_of_the_objective(method, device):
    augmentation, x = Affine(20, translate=(0.1, 0.1)), images()
    params = augmentation.make_params(x, torch.Generator().manual_seed(3))
    objective = Objective(
        conv_bn(), augmentation, alpha=0.3, beta=0.5, gamma=2.0, layers=["3"], method=method,
        method_options=cheap(method, still=True), normalize="l2",
    )  # fmt: skip
    found = []
    twins = (
        (exactly(objective), x.double(), exactly(params)),
        (objective.to(device), x.to(device), params.to(device)),
    )
    for twin, pixels, drawn in twins:
        twin.augmentation.make_params = lambda images, generator, drawn=drawn: drawn
        step = twin(pixels, TARGET.to(pixels.device))
        step.total.backward()
        terms = torch.stack([step.class_loss, step.invariance_loss, step.saliency_loss, step.total])
        found.append((terms, in_one(p.grad for p in twin.parameters()), in_one(twin.model[1].running_var)))
    for exact, actual in zip(*found, strict=True):
        assert actual.device.type == device.type
        assert_agrees(actual, exact, GRADIENT_FROM_FLOAT64)


def test_measures_of_trust(device):
    model, x = conv_bn().eval(), images()
    maps, others = torch.rand(2, 4, 1, 16, 16)
    masks = torch.rand(4, 1, 16, 16) < 0.4
    measures = {
        "share": lambda model, x, maps, others, masks: trust.share_on_object(maps, masks),
        "hit": lambda model, x, maps, others, masks: trust.pointing_hit(maps, masks),
        "deletion": lambda model, x, maps, *_: trust.deletion_curve(model, x, maps, 1, replacement=x.flip(0)),
        "insertion": lambda model, x, maps, *_: trust.insertion_curve(model, x, maps, replacement=0 * x),
    }
    for measure in measures.values():
        exact = measure(exactly(model), *exactly((x, maps, others, masks)))
        given = (tensor.to(device) for tensor in (x, maps, others, masks))
        assert_agrees(measure(copy.deepcopy(model).to(device), *given), exact)
    for measure in (trust.correlation, trust.rank_correlation):  # which compute in float64 themselves
        found = measure(maps.to(device), others.to(device))
        assert found.device.type == device.type
        assert_agrees(found.float(), measure(maps.double(), others.double()))
