"""The methods against their definitions once more, slow and plain."""

import torch
from torch import nn

from salnb import saliency
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close


class Weighted(nn.Module):
    """Two scores, the second the sum of the pixels with one weight for each channel."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, x):
        score = (x * self.weights.view(1, -1, 1, 1)).sum((1, 2, 3))
        return torch.stack([0 * score, score], 1)


def test_the_highest_channel_has_the_gradient_alone_where_several_are_as_high(device):
    model = Weighted([0.5, -2.0, 2.0]).to(device)
    maps = saliency.vanilla_gradient(model, torch.rand(1, 3, 4, 5).double().to(device), 1, create_graph=True)
    assert_close(maps, torch.full_like(maps, 2.0))
    maps.sum().backward()
    gradient = model.weights.grad
    assert sorted(gradient.abs().tolist()) == [0, 0, 20]  # a slope of 1 for each pixel
    assert (gradient * model.weights >= 0).all()


class Squares(nn.Module):
    """Two scores, the second half the sum of squares: its gradient is the image."""

    def forward(self, x):
        score = x.square().sum((1, 2, 3)) / 2
        return torch.stack([0 * score, score], 1)


def test_smoothgrad_by_its_definition(device):
    """Gaussian noise of a share of each image's own range, signed gradients averaged, then eq. 2."""
    x = torch.stack([torch.rand(3, 4, 5), 10 * torch.rand(3, 4, 5) + 100]).double().to(device)
    found = saliency.smoothgrad(
        Squares(), x, 1, n_samples=3, noise_level=0.5, generator=torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for _ in range(3)]
    for i, image in enumerate(x):
        noisy = [image + 0.5 * (image.max() - image.min()) * noise[i] for noise in noises]
        mean = sum(noisy) / 3
        assert_close(found[i, 0], mean.abs().max(0).values)


def test_smoothgrad_asks_about_the_class_of_the_clean_image(device):
    model, x = conv_bn().double().eval().to(device), torch.rand(4, 3, 12, 12).double().to(device)
    predicted = model(x).argmax(1)
    found, expected = (
        saliency.smoothgrad(
            model, x, target, n_samples=2, noise_level=1.0, generator=torch.Generator().manual_seed(0)
        )
        for target in (None, predicted)
    )
    assert_close(found, expected)


def bilinear(image, size):
    """An image enlarged between the centres of its pixels, one pixel of the result after another."""
    high, wide = image.shape
    new = torch.empty(size, dtype=image.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * high / size[0] - 0.5, 0), high - 1)
            x = min(max((j + 0.5) * wide / size[1] - 0.5, 0), wide - 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, high - 1), min(left + 1, wide - 1)
            a, b = y - top, x - left
            new[i, j] = (1 - a) * ((1 - b) * image[top, left] + b * image[top, right])
            new[i, j] += a * ((1 - b) * image[down, left] + b * image[down, right])
    return new


def test_grad_cam_by_its_definition(device):
    layer = nn.Conv2d(3, 4, 3, stride=2)
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 5, 3))
    model = nn.Sequential(layer, head).double().to(device)
    x = torch.rand(2, 3, 9, 11).double().to(device)
    activation = layer(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(head(activation)[:, 2].sum(), activation)
    found = saliency.grad_cam(model, x, 2)
    assert found.shape == (2, 1, 9, 11)
    for i in range(2):
        weighted = [channel.mean() * kept for channel, kept in zip(slope[i], activation[i], strict=True)]
        assert_close(found[i, 0], bilinear(sum(weighted).clamp(min=0).detach().cpu(), (9, 11)).to(device))
