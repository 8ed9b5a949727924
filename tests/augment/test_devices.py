"""Every augmentation on the device that is tested, with numbers drawn there or on the CPU."""

import pytest
import torch
from torch.utils import _pytree as pytree

from salnb.augment import AUGMENTATIONS

EVERY = pytest.mark.parametrize("name", AUGMENTATIONS)
CLASSES = 5


def batch(device, dtype=torch.float32):
    images = torch.rand(6, 3, 18, 14, dtype=torch.float64)
    return images.to(device, dtype), (torch.arange(6) % CLASSES).to(device)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_shape_dtype_and_device(name, dtype, device):
    images, labels = batch(device, dtype)
    maps = torch.rand(6, 1, 18, 14).to(images)
    augmented = AUGMENTATIONS[name]()(images, labels, num_classes=CLASSES)
    first, second, valid = augmented.align(maps, maps)
    assert (augmented.images.shape, augmented.images.dtype) == (images.shape, dtype)
    assert augmented.images.device == images.device
    assert first.shape == second.shape == valid.shape == maps.shape
    assert first.dtype == second.dtype == dtype
    assert valid.dtype == torch.bool
    assert augmented.images.isfinite().all()
    assert augmented.images.min() >= 0
    assert augmented.images.max() <= 1 + 8 * torch.finfo(dtype).eps


@EVERY
def test_a_generator_of_the_cpu_draws_the_same_for_any_device(name, device):
    images, _ = batch(device)
    here, there = (
        AUGMENTATIONS[name]().make_params(pixels, torch.Generator().manual_seed(2))
        for pixels in (images, images.cpu())
    )
    for tensor, same in zip(pytree.tree_leaves(here), pytree.tree_leaves(there), strict=True):
        assert tensor.device == images.device
        # what is computed from what was drawn may be rounded in another way
        torch.testing.assert_close(tensor.cpu(), same)


@EVERY
def test_a_generator_of_the_device_serves_it_and_the_cpu(name, device):
    images, labels = batch(device)
    for pixels, target in ((images, labels), (images.cpu(), labels.cpu())):
        first, again, other = (
            AUGMENTATIONS[name]()(
                pixels, target, num_classes=CLASSES, generator=torch.Generator(device).manual_seed(seed)
            )
            for seed in (0, 0, 1)
        )
        assert all(tensor.device == pixels.device for tensor in pytree.tree_leaves(first.params))
        assert torch.equal(first.images, again.images)
        if name != "identity":
            assert not torch.equal(first.images, other.images)
