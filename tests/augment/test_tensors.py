"""Augmentations of tensors of every kind: subclasses, of inference mode, of other default dtypes and devices."""

import pytest
import torch
from torchvision import tv_tensors

from salnb import augment
from salnb._common.checks import plain
from salnb.augment import AUGMENTATIONS
from tests.helpers.defaults import DTYPES, default_dtype

CLASSES = 5
every = pytest.mark.parametrize("name", [*AUGMENTATIONS, "grayscale"])


class Mine(torch.Tensor):
    """A subclass as users write them: with a method of its own, and nothing else."""


def build(name):
    return augment.Grayscale() if name == "grayscale" else AUGMENTATIONS[name]()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch():
    images = torch.rand(6, 3, 12, 10, generator=generator(1))
    return images, torch.arange(6) % CLASSES, torch.rand(6, 1, 12, 10, generator=generator(2))


def everything(aug, images, labels, maps, params=None):
    """All that an augmentation gives, and what it drew."""
    params = aug.make_params(images, generator(3)) if params is None else params
    results = [aug.images(images, params), aug.targets(labels, params, CLASSES)]
    results += [*aug.align(maps, maps.flip(0), params), *aug.carry(maps, params, maps > 0.3)]
    if aug.invertible:
        results += aug.inverse(maps, params)
    return [*results, *torch.utils._pytree.tree_leaves(params)]


def same(actual, expected):
    return [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(actual, expected, strict=True)]


@every
@pytest.mark.parametrize(
    "wrap",
    [tv_tensors.Image, tv_tensors.Video, lambda x: x.as_subclass(Mine), torch.nn.Parameter],
    ids=["Image", "Video", "a user's", "Parameter"],
)
def test_subclasses_are_taken_as_plain_tensors_and_come_back_as_such(name, wrap):
    images, labels, maps = batch()
    aug = build(name)
    expected = everything(aug, images, labels, maps)
    actual = everything(aug, wrap(images), labels.as_subclass(Mine), wrap(maps))
    assert {type(tensor) for tensor in actual} == {torch.Tensor}
    assert all(same(actual, expected))


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if AUGMENTATIONS[name]().unit_range])
@pytest.mark.parametrize("wrap", [tv_tensors.Image, lambda x: x.as_subclass(Mine)], ids=["Image", "a user's"])
def test_values_of_subclasses_are_checked(name, wrap):
    images, *_ = batch()
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from"):
        build(name)(wrap(255 * images))


def test_a_gradient_passes_through_a_subclass():
    images, *_ = batch()
    images = images.as_subclass(Mine).requires_grad_()
    augment.Rotation()(images).images.square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_plain_tensors_are_not_copied():
    tensor = torch.rand(3)
    assert plain(tensor) is tensor
    with torch.inference_mode():
        inside = torch.rand(3)
        assert plain(inside) is inside
    assert not plain(inside).is_inference()


@every
@pytest.mark.parametrize("made", ["images", "params", "both"])
def test_what_was_made_in_inference_mode_can_be_used_outside(name, made):
    images, labels, maps = batch()
    aug = build(name)
    expected = everything(aug, images, labels, maps)
    params = aug.make_params(images, generator(3))
    with torch.inference_mode():
        inside = [tensor.clone() for tensor in (images, labels, maps)]
        drawn = aug.make_params(images, generator(3))
    given = inside if made != "params" else [images, labels, maps]
    actual = everything(aug, *given, params if made == "images" else drawn)
    assert all(same(actual, expected))
    # autograd may save all of it
    images, maps = images.requires_grad_(), maps.requires_grad_()
    new = aug.images(images, drawn)
    first, second, _ = aug.align(maps, maps.flip(0), drawn)
    torch.autograd.backward([new.square().sum(), first.square().sum(), second.square().sum()])
    assert images.grad.isfinite().all()
    assert maps.grad.abs().sum() > 0


@every
def test_inside_inference_mode_it_does_not_matter_where_tensors_were_made(name):
    images, labels, maps = batch()
    aug = build(name)
    params = aug.make_params(images, generator(3))
    expected = everything(aug, images, labels, maps)
    with torch.inference_mode():
        for given in ((images, labels, maps), [tensor.clone() for tensor in (images, labels, maps)]):
            for drawn in (None, params):
                assert all(same(everything(aug, *given, drawn), expected))


@every
@pytest.mark.parametrize("default", DTYPES, ids=str)
def test_the_default_dtype_changes_nothing(name, default):
    images, labels, maps = batch()
    for dtype in (torch.float32, torch.float64, torch.float16):
        given = (images.to(dtype), labels, maps.to(dtype))
        expected = everything(build(name), *given)
        with default_dtype(default):
            assert all(same(everything(build(name), *given), expected))


@every
def test_the_default_device_changes_nothing(name):
    images, labels, maps = batch()
    expected = everything(build(name), images, labels, maps)
    with torch.device("meta"):
        assert all(same(everything(build(name), images, labels, maps), expected))


@every
def test_a_generator_of_the_cpu_serves_images_elsewhere(name):
    """On the device "meta" there are no values; that all is there shows that nothing of the CPU was left in."""
    images, labels, maps = (tensor.to("meta") for tensor in batch())
    results = everything(build(name), images, labels, maps)
    assert {tensor.device.type for tensor in results} == {"meta"}
    assert results[0].shape == images.shape
