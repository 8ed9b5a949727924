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
