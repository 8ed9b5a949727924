"""The whole idea in one test: an equivariant network looks at the same place before and after a flip."""

import pytest
import torch

from salnb import augment
from tests.helpers.tolerances import assert_close


def symmetric_network(dtype=torch.float64):
    """Stride 1, kernels that equal their own mirror images and quarter turns, a global average: flips and
    quarter turns of the image leave its scores as they are, by construction."""
    layers = []
    for inputs, outputs in ((3, 4), (4, 4), (4, 5)):
        conv = torch.nn.Conv2d(inputs, outputs, 3, padding=1, dtype=dtype)
        weight = conv.weight.data
        weight = weight + weight.flip(-1)
        conv.weight.data = sum(weight.rot90(turns, (2, 3)) for turns in range(4)) / 8
        layers += [conv, torch.nn.Softplus()]
    return torch.nn.Sequential(*layers[:-1], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def saliency(network, images, labels):
    """Eq. 1 and 2 of the paper, written out."""
    images = images.detach().requires_grad_()
    score = network(images).gather(1, labels[:, None]).sum()
    return torch.autograd.grad(score, images)[0].abs().amax(1, keepdim=True)


@pytest.mark.parametrize(
    ("aug", "height", "width"),
    [
        (augment.HorizontalFlip(), 9, 12),
        (augment.VerticalFlip(), 9, 12),
        (augment.Sequential(augment.HorizontalFlip(), augment.VerticalFlip()), 9, 12),
        (augment.Rotation((90, 90)), 11, 11),
        (augment.Sequential(augment.HorizontalFlip(), augment.Rotation((-90, -90))), 11, 11),
    ],
    ids=["horizontal flip", "vertical flip", "both flips", "quarter turn", "flip and quarter turn"],
)
def test_equivariant_network_looks_at_the_same_place(aug, height, width, device):
    """The idea of the paper: of an equivariant network, the pulled-back saliency equals the original's."""
    images = torch.rand(8, 3, height, width, dtype=torch.float64).to(device)
    labels = torch.arange(8, device=device) % 5
    network = symmetric_network().to(device)
    augmented = aug(images, labels, generator=torch.Generator().manual_seed(11))
    maps, new_maps = saliency(network, images, labels), saliency(network, augmented.images, labels)
    first, second, valid = augmented.align(maps, new_maps)
    assert valid.all()
    assert_close(second, first, 1e-9)
    assert (new_maps - maps).abs().max() > 1e-3 * maps.max()  # without the way back they differ
