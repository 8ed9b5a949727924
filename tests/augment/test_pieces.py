"""Only the chosen images of a batch: at once or one by one, and nothing of the caller's is handed out."""

import math

import pytest
import torch

from salnb import augment
from salnb.augment import pieces
from tests.helpers.waves import generator, smooth

formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


@formats
@pytest.mark.parametrize("chosen", [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], ids=str)
def test_one_by_one_is_as_at_once(chosen, memory_format, monkeypatch):
    images = smooth(4, channels=3).contiguous(memory_format=memory_format).requires_grad_()
    chosen, factor = torch.tensor(chosen, dtype=torch.bool), torch.arange(4.0, dtype=images.dtype)

    def kernel(some, values):
        return some.flip(-1) * values[:, None, None, None]

    expected = torch.where(chosen[:, None, None, None], kernel(images, factor), images)
    (slope,) = torch.autograd.grad(expected.square().sum(), images)
    for small in (0, math.inf):
        monkeypatch.setattr(pieces, "SMALL_IMAGE", small)
        found = pieces.apply_where(chosen, kernel, images, factor)
        assert torch.equal(found, expected)
        assert found.stride() == images.stride()
        assert torch.equal(torch.autograd.grad(found.square().sum(), images)[0], slope)


@formats
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_large_images_are_changed_as_small_ones_are(name, grad, memory_format, monkeypatch):
    images = torch.rand(6, 3, 12, 10, dtype=torch.float64, generator=generator(3))
    images = images.contiguous(memory_format=memory_format).requires_grad_(grad)
    maps = images.detach().mean(1, keepdim=True)
    aug, before = augment.AUGMENTATIONS[name](), images.detach().clone()
    params = aug.make_params(images, generator(4))
    found = []
    for small in (0, math.inf):
        monkeypatch.setattr(pieces, "SMALL_IMAGE", small)
        new = aug.images(images, params)
        slopes = torch.autograd.grad(new.square().sum(), images) if grad else ()
        found.append([new, *slopes, *aug.carry(maps, params)])
        assert new.requires_grad == grad
    for large, small in zip(*found, strict=True):
        torch.testing.assert_close(large, small, rtol=0, atol=1e-12)
    assert torch.equal(images, before)


def test_gradients_reach_the_weight_of_a_mix_of_large_images(monkeypatch):
    monkeypatch.setattr(pieces, "SMALL_IMAGE", 0)
    images, weight = torch.rand(2, 1, 3, 3), torch.tensor([0.25, 0.5], requires_grad=True)
    new = augment.MixUp().images(images, augment.MixUpParams(torch.tensor([1, 0]), weight))
    (slope,) = torch.autograd.grad(new.sum(), weight)
    difference = (images[0] - images[1]).sum()
    torch.testing.assert_close(slope, torch.stack([difference, -difference]))


@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "at once"])
@pytest.mark.parametrize(
    "aug",
    [
        augment.HorizontalFlip(0),
        augment.VerticalFlip(0),
        augment.Sequential(augment.HorizontalFlip(0), augment.VerticalFlip(0)),
        augment.AugMix(),
        augment.SimCLR(),
        augment.Identity(),
    ],
    ids=lambda aug: type(aug).__name__,
)
def test_new_images_are_never_the_callers(aug, small, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL_IMAGE", small)
    images = torch.rand(2, 3, 12, 10, generator=generator(1))
    before = images.clone()
    found = aug.images(images, aug.make_params(images, generator(2)))
    found.fill_(0.5)
    assert torch.equal(images, before)
