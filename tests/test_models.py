"""Networks by name: what the catalogue says of them is true."""

import pytest
import torch
from torch import nn

from salnb import models
from salnb._common import catalog as _catalog


def on_paper(name, num_classes=7):
    """A network without memory for its weights: shapes are computed, numbers are not."""
    with torch.device("meta"):
        return models.build(name, num_classes)


def last_pixels(model, size):
    """Height and width of the last convolution's output."""
    seen = []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handle = convolutions[-1].register_forward_hook(lambda *args: seen.append(args[2].shape[-2:]))
    model(torch.zeros(2, 3, size, size, device="meta"))
    handle.remove()
    return tuple(seen[0])


@pytest.mark.parametrize("name", _catalog.NETWORKS)
def test_networks_give_logits_from_their_smallest_size_on(name):
    model, known = on_paper(name), _catalog.NETWORKS[name]
    for size in {known.smallest, known.smallest_for_cam, known.largest or 64, 224}:
        assert model(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 7)
    assert model.training


@pytest.mark.parametrize("name", _catalog.NETWORKS)
def test_the_last_convolution_keeps_pixels_from_the_size_on_that_the_catalogue_names(name):
    model, known = on_paper(name), _catalog.NETWORKS[name]
    assert min(last_pixels(model, known.smallest_for_cam)) > 1
    if known.smallest_for_cam > known.smallest:
        assert last_pixels(model, known.smallest_for_cam - 1) == (1, 1)


@pytest.mark.parametrize("name", ["vgg16", "densenet121"])
def test_networks_cannot_take_less_than_their_smallest_size(name):
    size = _catalog.NETWORKS[name].smallest
    on_paper(name)(torch.zeros(2, 3, size, size, device="meta"))
    with pytest.raises(RuntimeError):
        on_paper(name)(torch.zeros(2, 3, 15, 15, device="meta"))


@pytest.mark.parametrize("size", [192, 256])
def test_a_network_of_one_size_takes_no_other(size):
    with pytest.raises(AssertionError, match="Wrong image"):
        on_paper("vit_b_16")(torch.zeros(2, 3, size, size, device="meta"))
    with pytest.raises(ValueError, match=f"size must be 224 for vit_b_16, got {size}"):
        _catalog.check_size("vit_b_16", size)


@pytest.mark.parametrize("name", _catalog.NETWORKS)
def test_the_layers_to_compare_are_there(name):
    modules = dict(on_paper(name).named_modules())
    assert _catalog.NETWORKS[name].layers
    assert set(_catalog.NETWORKS[name].layers) <= set(modules)


def test_images_are_standardised_before_the_network_sees_them():
    model = models.build("small", 10)
    seen = []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model((mean + std).view(1, 3, 1, 1).expand(2, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.ones(2, 3, 32, 32))


def test_the_seed_decides_the_weights():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(models.build("small", 10).network.head.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_small_network_is_small():
    model = models.build("small", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


def test_without_batch_norm_an_image_does_not_depend_on_its_neighbours():
    images = torch.rand(6, 3, 32, 32)
    for name, alike in (("small_groupnorm", True), ("small", False)):
        model = models.build(name, 10)
        assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-5) is alike


def test_small_network_has_second_derivatives_in_float64():
    model = models.SmallResNet(3, norm=lambda channels: nn.GroupNorm(2, channels), width=2).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x).sum(1), image)


def test_networks_of_timm():
    pytest.importorskip("timm")
    model = models.build("timm:resnet10t", 5)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet81", "'resnet18'"), ("vgg16bn", "'vgg16_bn'"), ("timm:resnett18", "'timm:resnet18'")],
)
def test_unknown_networks_are_answered_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"model '{name}' is unknown \(did you mean {hint}\?\); known: "):
        models.build(name, 10)


def test_too_few_classes():
    with pytest.raises(ValueError, match=r"num_classes must lie in \[2, 1e\+06\], got 1"):
        models.build("small", 1)
