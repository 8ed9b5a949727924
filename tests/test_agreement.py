"""How far maps agree: by hand, and at the ends of the scale."""

import pytest
import torch
from torch import nn

from salnb.agreement import BLOCK, agreement
from salnb.augment import AUGMENTATIONS, HorizontalFlip, Identity, Rotation
from salnb.losses import saliency_loss
from salnb.saliency import vanilla_gradient
from salnb.trust import correlation, half_area
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

LABELS = torch.tensor([0, 3, 1, 1])


def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def measured(model, augmentation, **options):
    return agreement(
        model, augmentation, images(), LABELS, torch.Generator().manual_seed(0), num_classes=4, **options
    )


def test_maps_that_are_the_same_agree_completely():
    found = measured(conv_bn().eval(), Identity())
    for each in (found.correlation, found.correlation_4x4):
        assert_close(each, torch.ones(4).double(), 1e-6)
    assert found.map_distance == 0
    assert (found.correlation_others < 0.9).all()


def test_an_equivariant_network_agrees_and_its_pairs_of_others_do_not():
    class Equivariant(nn.Module):
        def forward(self, x):
            return torch.stack([(x**2).sum((1, 2, 3)) * (k + 1) for k in range(4)], 1)

    found = measured(Equivariant(), HorizontalFlip(p=1))
    assert (found.correlation > 0.999).all()
    assert (found.correlation_others.abs() < 0.5).all()


@pytest.mark.parametrize("score", ["logit", "log_prob"])
def test_by_hand(score):
    model, augmentation = conv_bn().eval(), Rotation(30)
    found = measured(model, augmentation, score=score, normalize="zscore")
    params = augmentation.make_params(images(), torch.Generator().manual_seed(0))
    maps = [
        vanilla_gradient(model, x, LABELS, score=score)
        for x in (images(), augmentation.images(images(), params))
    ]
    a, b, valid = augmentation.align(*maps, params)
    assert_close(found.correlation, correlation(a, b, valid), 1e-5)
    assert_close(found.correlation_others, correlation(a, b.roll(1, 0), valid & valid.roll(1, 0)), 1e-5)
    assert_close(found.map_distance, saliency_loss(a, b, valid, normalize="zscore"), 1e-5)
    assert_close(found.half_area, (half_area(maps[0]) + half_area(maps[1])) / 2, 1e-5)
    for i in range(4):
        blocks = []
        for map_ in (a[i, 0], b[i, 0]):
            rows = [
                map_[y : y + BLOCK, x : x + BLOCK][valid[i, 0, y : y + BLOCK, x : x + BLOCK]].mean()
                for y in range(0, 16, BLOCK)
                for x in range(0, 16, BLOCK)
            ]
            blocks.append(torch.stack(rows))
        seen = ~blocks[0].isnan()
        pair = torch.stack([block[seen] for block in blocks])
        assert_close(found.correlation_4x4[i].float(), torch.corrcoef(pair)[0, 1], 1e-4)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation(name):
    model = conv_bn().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measured(model, AUGMENTATIONS[name]())
    assert all(field.isfinite().all() for field in found)
    assert (found.correlation.abs() <= 1 + 1e-6).all()
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_seed_draws_the_same_transformations():
    model = conv_bn().eval()
    for ours, theirs in zip(measured(model, Rotation(30)), measured(model, Rotation(30)), strict=True):
        assert torch.equal(ours, theirs)


def test_other_errors_are_those_of_the_parts():
    with pytest.raises(ValueError, match="score 'x' is unknown"):
        measured(conv_bn(), Rotation(30), score="x")
    with pytest.raises(ValueError, match="normalize must be one of"):
        measured(conv_bn(), Rotation(30), normalize="x")
    with pytest.raises(ValueError, match="two classes or more"):
        agreement(conv_bn(num_classes=1), Rotation(30), images(), LABELS * 0, num_classes=1, score="log_prob")
