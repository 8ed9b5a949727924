"""Every way back: the right place again, and never a pixel that was filled in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salnb import augment
from tests.helpers.tolerances import RELATIVE, assert_close
from tests.helpers.waves import HEIGHT, WIDTH, generator, smooth

# name: augmentation, tolerance of the round trip on valid pixels, least share of pixels that must be valid
ROUND_TRIPS = {
    "horizontal flip": (augment.HorizontalFlip(p=1), 0, 1),
    "vertical flip": (augment.VerticalFlip(p=0.5), 0, 1),
    "both flips": (augment.Sequential(augment.HorizontalFlip(), augment.VerticalFlip()), 0, 1),
    "no rotation": (augment.Rotation(0), 1e-12, 1),
    "rescale": (augment.Rescale(), 2e-3, 0.7),
    "rotation": (augment.Rotation(30), 2e-3, 0.6),
    "affine": (augment.Affine(), 3e-3, 0.5),
    "resized crop": (augment.ResizedCrop(), 2e-3, 0.2),
    "crop of everything": (augment.ResizedCrop(scale=(1, 1), ratio=(WIDTH / HEIGHT,) * 2), 1e-12, 1),
    "crop and flip": (augment.Sequential(augment.ResizedCrop(), augment.HorizontalFlip()), 2e-3, 0.2),
    "rotation and shear": (
        augment.Sequential(augment.Rotation(20), augment.Affine(0, (0, 0), (1, 1), 20)),
        2e-3,
        0.5,
    ),
    "rotation, contrast, rescale": (
        augment.Sequential(augment.Rotation(20), augment.Contrast(factor=(1, 1)), augment.Rescale()),
        5e-3,
        0.5,
    ),
    "nested": (
        augment.Sequential(
            augment.Rotation(20), augment.Sequential(augment.VerticalFlip(), augment.Rescale())
        ),
        2e-3,
        0.5,
    ),
    "contrast": (augment.Contrast(factor=(1, 1)), 0, 1),
    "identity": (augment.Identity(), 0, 1),
}
# every registered one that has a way back, as it is
INVERTIBLE = [name for name, make in augment.AUGMENTATIONS.items() if make().invertible]
invertible = pytest.mark.parametrize("name", INVERTIBLE)
round_trips = pytest.mark.parametrize(("aug", "tolerance", "share"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)


@round_trips
def test_round_trip(aug, tolerance, share):
    maps = smooth()
    params = aug.make_params(maps, generator(2))
    back, valid = aug.inverse(aug.images(maps, params), params)
    assert ((back - maps).abs() * valid).max() <= tolerance
    assert valid.double().mean() >= share


@round_trips
def test_carry_moves_maps_as_images(aug, tolerance, share):
    maps = smooth()
    params = aug.make_params(maps, generator(3))
    carried, valid = aug.carry(maps, params)
    assert_close(carried[valid], aug.images(maps, params)[valid])
    # ones stay ones exactly where nothing filled in was read
    ones = aug.images(torch.ones_like(maps), params)
    assert ones[valid].min() > 1 - 1e-9
    if "crop" not in str(aug).lower():  # a crop reads its outer pixels again instead of zeros
        assert torch.equal(valid, ones > 1 - 1e-9)


@round_trips
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_valid_never_marks_a_filled_in_pixel(aug, tolerance, share, seed, dtype):
    maps = smooth(dtype=dtype)
    params = aug.make_params(maps, generator(seed))
    new = aug.images(maps, params)
    filled = aug.images(torch.ones_like(maps), params) < 1 - 1e-3
    back, valid = aug.inverse(new.masked_fill(filled, torch.nan), params)
    assert back[valid].isfinite().all()
    # and ones come back as ones: nothing that was filled in has any weight
    back, again = aug.inverse(aug.images(torch.ones_like(maps), params), params)
    assert torch.equal(again, valid)
    assert (back[valid] - 1).abs().max() <= 100 * RELATIVE[dtype]


@invertible
def test_round_trip_of_what_is_registered(name):
    """The map expected of the augmented image, brought back, is the map."""
    maps, aug = smooth(), augment.AUGMENTATIONS[name]()
    params = aug.make_params(maps.expand(-1, 3, -1, -1), generator(2))
    back, valid = aug.inverse(aug.carry(maps, params)[0], params)
    assert ((back - maps).abs() * valid).max() <= 2e-2
    assert valid.any()


@invertible
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_what_is_registered_never_calls_a_filled_in_pixel_valid(name, seed, dtype):
    maps, aug = smooth(dtype=dtype), augment.AUGMENTATIONS[name]()
    params = aug.make_params(maps, generator(seed))
    new, _ = aug.carry(maps, params)
    ones, _ = aug.carry(torch.ones_like(maps), params)
    back, valid = aug.inverse(new.masked_fill(ones < 1 - 1e-3, torch.nan), params)
    assert back[valid].isfinite().all()
    back, again = aug.inverse(ones, params)
    assert torch.equal(again, valid)
    assert (back[valid] - 1).abs().max() <= 100 * RELATIVE[dtype]


# a crop of a few pixels, enlarged, is no longer smooth
AS_SMOOTH = {
    "resized_crop": lambda: augment.ResizedCrop(scale=(0.6, 1)),
    "simclr": lambda: augment.SimCLR(scale=(0.6, 1)),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(names=st.lists(st.sampled_from(INVERTIBLE), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_inverse_of_a_composition_is_the_inverses_in_reverse(names, seed):
    steps = [AS_SMOOTH.get(name, augment.AUGMENTATIONS[name])() for name in names]
    aug, new = augment.Sequential(*steps), smooth()
    params = aug.make_params(new, generator(seed))
    pulled, valid = aug.inverse(new, params)
    step_by_step, ones = new, torch.ones_like(new)
    for step, drawn in zip(steps[::-1], params.steps[::-1], strict=True):
        step_by_step, _ = step.inverse(step_by_step, drawn)
        ones, step_valid = step.inverse(ones, drawn)
        ones = ones * step_valid
    both = valid & (ones > 1 - 1e-9)
    assert ((pulled - step_by_step).abs() * both).max() < 2e-2
