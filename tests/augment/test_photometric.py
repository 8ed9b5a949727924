"""Colour changes: torchvision's numbers with a factor for each sample, and maps left alone."""

import colorsys
import itertools
import warnings

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from salnb import augment
from salnb.augment import photometric
from tests.helpers.tolerances import assert_close

N = 6
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def images_of(dtype=torch.float64, channels=3):
    images = torch.rand(N, channels, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images[0, :, 0] = images[0, :1, 0]  # a row of greys, which have no hue
    images[1, -1] = images[1, 0]  # and red and blue alike
    return images.to(dtype)


def one_by_one(function, images, factors):
    return torch.stack([function(*pair) for pair in zip(images, factors.tolist(), strict=True)])


@floats
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_contrast_agrees_with_torchvision(dtype, channels):
    images, factor = images_of(dtype, channels), torch.linspace(0, 2, N)
    ours = augment.Contrast().images(images, augment.ContrastParams(factor))
    assert_close(ours, one_by_one(tv.adjust_contrast, images, factor))


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_hue_agrees_with_torchvision(channels):
    images, turn = images_of(torch.float32, channels), torch.linspace(-0.5, 0.5, N)
    assert_close(photometric.adjust_hue(images, turn), one_by_one(tv.adjust_hue, images, turn))


def test_hue_agrees_with_the_standard_library():
    """In float64, where torchvision rounds to float32 on its way."""
    images, turn = images_of(), torch.linspace(-0.5, 0.5, N, dtype=torch.float64)

    def by_pixel(image, shift):
        pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.flatten(1).T.tolist()]
        turned = [colorsys.hsv_to_rgb((hue + shift) % 1, *rest) for hue, *rest in pixels]
        return torch.tensor(turned, dtype=torch.float64).T.reshape(image.shape)

    assert_close(photometric.adjust_hue(images, turn), one_by_one(by_pixel, images, turn))


@floats
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_jitter_agrees_with_torchvision_in_every_order(dtype, channels):
    def hue_in_full(image, shift):  # torchvision's rounds to float32
        return photometric.adjust_hue(image[None], torch.tensor([shift], dtype=torch.float64))[0]

    hue_step = tv.adjust_hue if dtype == torch.float32 else hue_in_full
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, hue_step]
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images = images_of(dtype, channels).repeat(4, 1, 1, 1)
    draws = torch.rand(24, 4, dtype=torch.float64)
    factors, hue = 0.6 + 0.8 * draws[:, :3], draws[:, 3] - 0.5
    ours = augment.ColorJitter().images(images, augment.JitterParams(factors, hue, orders))
    for image, sample_factors, turn, order, new in zip(images, factors, hue, orders, ours, strict=True):
        for kind in order.tolist():
            image = functions[kind](image, [*sample_factors.tolist(), turn.item()][kind])
        # four steps, each rounded
        assert_close(new, image, 4e-6 if dtype == torch.float32 else 1e-10)


@floats
def test_grayscale_agrees_with_torchvision(dtype):
    images = images_of(dtype)
    gray = torch.arange(N) % 2 == 0
    new = augment.Grayscale().images(images, augment.GrayscaleParams(gray))
    assert_close(new[gray], tv.rgb_to_grayscale(images[gray], num_output_channels=3))
    assert torch.equal(new[~gray], images[~gray])


def test_jitter_draws_every_order_and_leaves_what_p_spares():
    images = images_of().repeat(100, 1, 1, 1)
    aug = augment.ColorJitter(p=0.5)
    params = aug.make_params(images, torch.Generator().manual_seed(2))
    assert len(params.order.unique(dim=0)) == 24
    spared = (params.factors == 1).all(1)
    assert 0.4 < spared.double().mean() < 0.6
    assert (params.hue[spared] == 0).all()
    assert_close(aug.images(images, params)[spared], images[spared], 1e-12)


@pytest.mark.parametrize(
    "name", [name for name, make in augment.AUGMENTATIONS.items() if isinstance(make(), augment.Photometric)]
)
def test_maps_stay_as_they_are(name):
    aug = augment.AUGMENTATIONS[name]()
    maps, new_maps = torch.rand(2, N, 1, 9, 11)
    first, second, valid = aug(images_of()).align(maps, new_maps)
    assert torch.equal(first, maps)
    assert torch.equal(second, new_maps)
    assert valid.all()


def test_channels_that_are_no_colours_are_refused():
    with pytest.raises(ValueError, match=r"1 \(grey\) or 3 .* channels, got 4"):
        augment.ColorJitter()(torch.rand(2, 4, 5, 5))


def test_simclr_is_crop_flip_jitter_and_grey():
    aug = augment.SimCLR(strength=1.0)
    assert [type(step).__name__ for step in aug.steps] == [
        "ResizedCrop",
        "HorizontalFlip",
        "ColorJitter",
        "Grayscale",
    ]
    jitter = aug.steps[2]
    for name in ("brightness", "contrast", "saturation"):
        assert getattr(jitter, name) == pytest.approx((0.2, 1.8))
    assert jitter.hue == pytest.approx((-0.2, 0.2))
    assert jitter.p == 0.8
    maps = torch.rand(N, 1, 9, 11)
    augmented = aug(images_of())
    _, pulled, valid = augmented.align(maps, torch.ones_like(maps))
    top, left, height, width = augmented.params.steps[0].box.unbind(-1)
    for index in range(N):
        outside = torch.ones(9, 11, dtype=torch.bool)
        outside[top[index] : top[index] + height[index], left[index] : left[index] + width[index]] = False
        assert not (valid[index, 0] & outside).any()
    assert (pulled[valid] - 1).abs().max() < 1e-6 if valid.any() else True


@pytest.mark.parametrize(
    "aug", [augment.Contrast(), augment.ColorJitter()], ids=lambda aug: type(aug).__name__
)
def test_vmap_has_a_rule_for_each_operation(aug):
    """Else PyTorch warns, and calls the operation for each sample."""
    images = torch.rand(2, 4, 3, 6, 5)
    params = aug.make_params(images[0])
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = torch.vmap(lambda batch: aug.images(batch, params))(images)
    finally:
        torch.set_warn_always(always)
    torch.testing.assert_close(found, torch.stack([aug.images(batch, params) for batch in images]))
