"""Pairs that the data bring along, masks of objects, and a class loss of the originals alone: by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F

from salnb import Objective
from salnb.augment import HorizontalFlip, Identity
from salnb.losses import outside_loss, saliency_loss
from salnb.saliency import vanilla_gradient
from tests.helpers.finite_differences import assert_gradient
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([0, 3, 1, 2])


def parts(augmentation=None, **options):
    torch.manual_seed(0)
    model = conv_bn().double().eval()
    images, partners = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64)
    masks = torch.rand(4, 1, 8, 8) < 0.3
    return Objective(model, augmentation or Identity(), **options), images, partners, masks


@pytest.mark.parametrize("augmentation", [Identity(), HorizontalFlip(p=1)], ids=["as they are", "flipped"])
def test_partners_are_augmented_in_the_originals_place(augmentation):
    objective, images, partners, _ = parts(augmentation, normalize="zscore")
    found = objective(images, TARGET, partners=partners)
    turn = (lambda x: x) if isinstance(augmentation, Identity) else (lambda x: x.flip(-1))
    model = objective.model
    maps, new_maps = (vanilla_gradient(model, x, TARGET) for x in (images, turn(partners)))
    assert_close(found.saliency_loss, saliency_loss(maps, turn(new_maps), normalize="zscore"), 1e-9)
    expected = F.cross_entropy(model(torch.cat([images, turn(partners)])), TARGET.repeat(2))
    assert_close(found.class_loss, expected, 1e-9)
    assert_close(objective(images, TARGET, partners=images).total, objective(images, TARGET).total, 1e-12)


def test_the_class_loss_of_the_originals_alone():
    objective, images, partners, _ = parts(originals_only=True)
    found = objective(images, TARGET, partners=partners)
    assert_close(found.class_loss, F.cross_entropy(objective.model(images), TARGET), 1e-9)
    assert len(found.logits) == 8
    own = Objective(objective.model, Identity(), originals_only=True, class_loss=F.cross_entropy)
    assert_close(own(images, TARGET, partners=partners).total, found.total, 1e-9)


def test_with_masks_the_term_is_the_square_outside_of_all_classes_at_once():
    objective, images, partners, masks = parts(score="log_prob")
    found = objective(images, TARGET, partners=partners, masks=masks)
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.model(pixels).log_softmax(1).sum(), pixels)
    outside = gradient.square().amax(1, keepdim=True) * ~masks
    assert_close(found.saliency_loss, outside.sum() / 4, 1e-9)
    loss = lambda: objective(images, TARGET, partners=partners, masks=masks).saliency_loss  # noqa: E731
    assert assert_gradient(loss, objective.parameters()) > 1e-4


def test_the_square_outside_at_its_ends():
    maps = torch.rand(3, 1, 4, 4)
    masks = torch.zeros_like(maps, dtype=torch.bool)
    assert outside_loss(maps, ~masks) == 0
    assert_close(outside_loss(maps, masks), maps.square().sum() / 3, 1e-6)
    known = torch.tensor([True, False, True])
    assert_close(outside_loss(maps, masks, known), maps[known].square().sum() / 2, 1e-6)
    assert outside_loss(maps, masks, known & ~known) == 0
    with pytest.raises(ValueError, match=r"masks must be bool of \(3, 1, 4, 4\)"):
        outside_loss(maps, masks.float())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("traced")
def test_compiled_steps_are_the_eager_ones(masked):
    eager, images, partners, masks = parts(originals_only=True, balance=0.4)
    compiled = copy.deepcopy(eager).train()
    compiled.compile(backend="eager")
    given = {"partners": partners, "masks": masks if masked else None}
    ours, theirs = (o(images, TARGET, **given) for o in (compiled, eager.train()))
    for losses in (ours, theirs):
        losses.total.backward()
    assert_close(ours.total, theirs.total, 1e-6)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-6)


def test_what_was_made_in_inference_mode_can_be_learnt_from():
    objective, *tensors = parts()
    with torch.inference_mode():
        images, partners, masks = (tensor.clone() for tensor in tensors)
    objective(images, TARGET, partners=partners, masks=masks).total.backward()


def test_what_is_refused():
    objective, images, partners, masks = parts()
    with pytest.raises(ValueError, match=r"partners must have the shape of images, \(4, 3, 8, 8\), got \(3,"):
        objective(images, TARGET, partners=partners[:3])
    with pytest.raises(
        ValueError, match=r"masks must be bool of \(4, 1, 8, 8\), got \(4, 1, 8, 8\) of torch.fl"
    ):
        objective(images, TARGET, masks=masks.float())
    with pytest.raises(ValueError, match="originals_only and confidence do not go together"):
        parts(originals_only=True, confidence=0.9)
