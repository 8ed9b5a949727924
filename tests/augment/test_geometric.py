"""Flips, affine movements and crops: right place, right way back, and never a pixel that was filled in."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from salnb import augment
from salnb.augment import pieces
from salnb.augment import warp as kernels
from tests.helpers.tolerances import assert_close
from tests.helpers.waves import HEIGHT, WIDTH, N, generator, smooth

floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def vignette(n=N, dtype=torch.float64):
    """Smooth images that fade out towards the rim, where rounding a coordinate then costs next to nothing."""
    fade = [torch.linspace(0, math.pi, size, dtype=torch.float64).sin().square() for size in (HEIGHT, WIDTH)]
    return (smooth(n, channels=3) * fade[0][:, None] * fade[1]).to(dtype)


def affine_params(dtype=torch.float64, **given):
    """The params of one movement for one image, still where nothing is given."""
    still = {"angle": 0.0, "scale": 1.0, "translate": (0.0, 0.0), "shear": (0.0, 0.0)} | given
    return augment.AffineParams(*(torch.tensor([value], dtype=dtype) for value in still.values()))


def test_valid_excludes_what_left_the_frame_between_two_resamplings():
    """Enlarging and then shrinking by the same factor is no movement, but the rim is lost on the way."""
    larger, smaller = augment.Rescale((2, 2)), augment.Rescale((0.5, 0.5))
    maps = smooth()
    apart = augment.Sequential(larger, augment.Contrast(factor=(1, 1)), smaller)
    joined = augment.Sequential(larger, smaller)
    middle = torch.zeros_like(maps, dtype=torch.bool)
    middle[..., 11:-11, 15:-15] = True
    for aug, expected in ((joined, 1.0), (apart, 0.25)):
        params = aug.make_params(maps)
        back, valid = aug.inverse(aug.images(maps, params), params)
        assert ((back - maps).abs() * valid).max() < 5e-3
        assert valid.double().mean() == pytest.approx(expected, abs=0.05)
        assert valid[middle].all()
    _, carried = apart.carry(maps, params := apart.make_params(maps))
    assert torch.equal(carried, apart.images(torch.ones_like(maps), params) > 1 - 1e-9)


def test_geometric_steps_in_a_row_are_one_resampling(monkeypatch):
    calls = []
    sample = torch.nn.functional.grid_sample
    monkeypatch.setattr(
        kernels.F,
        "grid_sample",
        lambda images, *rest, **named: calls.append(1) or sample(images, *rest, **named),
    )
    aug = augment.Sequential(
        augment.HorizontalFlip(),
        augment.Rotation(),
        augment.Sequential(augment.Rescale(), augment.Affine()),
        augment.Contrast(),
    )
    maps = smooth()
    params = aug.make_params(maps)
    new = aug.images(maps, params)
    assert len(calls) == 1
    aug.inverse(new, params)
    assert len(calls) == 2
    flips = augment.Sequential(augment.HorizontalFlip(), augment.Contrast(), augment.VerticalFlip())
    flips(maps).align(maps, maps)
    assert len(calls) == 2


def test_one_resampling_is_sharper_than_two():
    maps = smooth()
    turn, back = augment.Rotation((17, 17)), augment.Rotation((-17, -17))
    joined = augment.Sequential(turn, back)
    params = joined.make_params(maps)
    assert_close(joined.images(maps, params), maps)
    apart = back.images(turn.images(maps, params.steps[0]), params.steps[1])
    assert (apart - maps)[..., 12:-12, 12:-12].abs().max() > 1e-5


def test_sequence_is_its_steps_in_order():
    maps = smooth()
    steps = (augment.Affine(), augment.ResizedCrop(), augment.HorizontalFlip(), augment.Rotation())
    aug = augment.Sequential(*steps)
    params = aug.make_params(maps, generator(4))
    one_by_one, real = maps, torch.ones_like(maps)
    for step, drawn in zip(steps, params.steps, strict=True):
        one_by_one, real = step.images(one_by_one, drawn), step.images(real, drawn)
    # where no step filled anything in, resampling once or four times differs by a little blur only
    assert ((aug.images(maps, params) - one_by_one).abs() * (real > 1 - 1e-9)).max() < 1e-2


@floats
@pytest.mark.parametrize("angle", [0, 12.5, -30, 90, 200])
def test_rotation_agrees_with_torchvision(angle, dtype):
    images = vignette(1, dtype)
    ours = augment.Rotation().images(images, affine_params(dtype, angle=angle))
    theirs = tv.rotate(images, angle, interpolation=InterpolationMode.BILINEAR)
    assert_close(ours, theirs)


@floats
@pytest.mark.parametrize(
    ("angle", "shift", "scale", "shear"),
    [
        (0, (3, -5), 1, (0, 0)),
        (0, (0, 0), 1.3, (0, 0)),
        (0, (0, 0), 1, (15, 0)),
        (0, (0, 0), 1, (0, -20)),
        (25, (-4, 7), 0.7, (10, -15)),
    ],
    ids=["shift", "scale", "shear x", "shear y", "all"],
)
def test_affine_agrees_with_torchvision(angle, shift, scale, shear, dtype):
    images = vignette(1, dtype)
    fraction = (shift[0] / WIDTH, shift[1] / HEIGHT)
    params = affine_params(torch.float64, angle=angle, scale=scale, translate=fraction, shear=shear)
    # torchvision's affine turns clockwise, its rotate does not
    theirs = tv.affine(images, -angle, list(shift), scale, list(shear), InterpolationMode.BILINEAR)
    assert_close(augment.Affine().images(images, params), theirs)


@floats
@pytest.mark.parametrize("loop", [False, True], ids=["at once", "one by one"])
def test_resized_crop_agrees_with_torchvision(loop, dtype, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL_IMAGE", 0 if loop else math.inf)
    images = vignette(dtype=dtype)
    aug = augment.ResizedCrop()
    params = aug.make_params(images, generator(5))
    theirs = [
        tv.resized_crop(image, *box, size=[HEIGHT, WIDTH], antialias=False)
        for image, box in zip(images, params.box.tolist(), strict=True)
    ]
    assert_close(aug.images(images, params), torch.stack(theirs))


@floats
def test_rotation_agrees_with_kornia(dtype):
    kornia = pytest.importorskip("kornia.augmentation")
    images = vignette(dtype=dtype)
    aug = augment.Rotation()
    params = aug.make_params(images, generator(6))
    theirs = kornia.RandomRotation(30.0, p=1.0, align_corners=False)
    drawn = theirs.forward_parameters(images.shape) | {"degrees": params.angle}
    assert_close(aug.images(images, params), theirs(images, params=drawn))


@floats
def test_affine_agrees_with_kornia(dtype):
    kornia = pytest.importorskip("kornia.augmentation")
    images = vignette(dtype=dtype)
    aug = augment.Affine(shear=0)  # kornia shears in another order
    params = aug.make_params(images, generator(7))
    theirs = kornia.RandomAffine(30.0, (0.1, 0.1), (0.8, 1.2), p=1.0)
    drawn = theirs.forward_parameters(images.shape) | {
        "angle": -params.angle,  # kornia's RandomAffine turns clockwise
        "scale": params.scale[:, None].expand(-1, 2),
        "translations": params.translate * torch.tensor([WIDTH, HEIGHT]),
    }
    assert_close(aug.images(images, params), theirs(images, params=drawn))


def test_positive_angles_turn_counter_clockwise():
    images = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    images[0, 0, 2, 4] = 1  # to the right of the centre
    turned = augment.Rotation().images(images, affine_params(angle=90.0))
    assert turned[0, 0, 0, 2] == pytest.approx(1)  # now above it


@pytest.mark.parametrize(("degrees", "turns"), [(90.0, 1), (180.0, 2), (270.0, 3)])
def test_quarter_turns_of_a_square_are_exact_and_valid_everywhere(degrees, turns):
    images = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    params = affine_params(angle=degrees)
    turned = augment.Rotation().images(images, params)
    assert_close(turned, images.rot90(turns, (2, 3)), 1e-12)
    back, valid = augment.Rotation().inverse(turned, params)
    assert_close(back, images, 1e-12)
    assert valid.all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (6, 1), (2, 3)])
def test_small_frames(height, width):
    images = torch.rand(4, 3, height, width)
    for aug in (augment.Affine(), augment.ResizedCrop(), augment.HorizontalFlip()):
        new = aug(images)
        assert new.images.isfinite().all()
        assert new.align(images[:, :1], new.images[:, :1])[2].shape == (4, 1, height, width)


def test_cutting_one_by_one_has_the_gradient_of_cutting_at_once(monkeypatch):
    images = smooth().requires_grad_()
    aug = augment.ResizedCrop()
    params = aug.make_params(images, generator(12))
    gradients = []
    for small in (0, math.inf):
        monkeypatch.setattr(pieces, "SMALL_IMAGE", small)
        gradients += torch.autograd.grad(aug.images(images, params).square().sum(), images)
    assert_close(*gradients)


def test_crop_boxes_fit_and_follow_the_ranges():
    aug = augment.ResizedCrop(scale=(0.3, 0.5), ratio=(0.8, 1.25))
    top, left, height, width = aug.make_params(torch.rand(500, 3, 64, 48), generator(8)).box.unbind(-1)
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 64
    assert (left + width).max() <= 48
    area, ratio = height * width / (64 * 48), width / height
    assert 0.28 < area.min() < 0.32 < 0.48 < area.max() < 0.52
    assert 0.77 < ratio.min() < ratio.max() < 1.3


def test_crop_where_no_box_fits_takes_the_middle():
    aug = augment.ResizedCrop(scale=(1, 1), ratio=(1, 1))
    box = aug.make_params(torch.rand(2, 3, 20, 30)).box
    assert box.tolist() == [[0, 5, 20, 20]] * 2


@pytest.mark.parametrize(("size", "box"), [((20, 60), [0, 15, 20, 30]), ((60, 20), [17, 0, 25, 20])])
def test_there_the_box_has_the_nearest_ratio_that_is_allowed(size, box):
    aug = augment.ResizedCrop(scale=(1, 1), ratio=(0.8, 1.5))
    assert aug.make_params(torch.rand(1, 3, *size)).box.tolist() == [box]


def test_flips_are_exact_in_any_precision():
    images = torch.rand(8, 3, 6, 7, dtype=torch.bfloat16)
    params = augment.FlipParams(torch.arange(8) % 2 == 0)
    new = augment.HorizontalFlip().images(images, params)
    assert torch.equal(new[::2], images[::2].flip(-1))
    assert torch.equal(new[1::2], images[1::2])
    upside_down = augment.VerticalFlip().images(images, params)
    assert torch.equal(upside_down[::2], images[::2].flip(-2))


def test_ranges_are_used_in_full():
    params = augment.Affine(20, (0.1, 0.2), (0.5, 2), 5).make_params(torch.rand(2000, 1, 2, 2), generator(9))
    bounds = {"angle": (-20, 20), "scale": (0.5, 2), "shear": (-5, 5)}
    for name, (low, high) in bounds.items():
        values = getattr(params, name)
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    assert params.translate.abs().amax(0).tolist() == pytest.approx([0.1, 0.2], rel=0.02)


def test_the_largest_shear_is_rounded_by_no_more_than_what_valid_allows_for():
    """And a larger one by more, which is why it is refused: pixels of the frame's edge would be taken for valid."""
    n, size = 200, 64
    draw = torch.rand(n, 3, dtype=torch.float64, generator=generator(13))
    off = {}
    for limit in (augment.Affine(shear=45).shear[1], 70.0):
        parts = (
            720 * draw[:, 0] - 360,
            torch.ones(n),
            torch.zeros(n, 2),
            limit * (2 * draw[:, 1:].round() - 1),
        )
        exact, rounded = (
            kernels.coordinates(kernels.affine_warp(*(part.to(dtype) for part in parts)).backward, size, size)
            for dtype in (torch.float64, torch.float32)
        )
        inside = exact.abs().amax(1) <= size / 2
        off[limit] = ((exact - rounded).abs().amax(1) * inside).max().item()
    allowed = kernels.slack((size, size), torch.float32)
    assert off[45.0] < allowed < off[70.0]


def test_autocast_does_not_move_pixels():
    maps = smooth(dtype=torch.float32)
    aug = augment.Sequential(augment.Affine(), augment.Rotation())
    params = aug.make_params(maps, generator(10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = aug.images(maps, params)
    assert_close(inside, aug.images(maps, params))


def test_wrong_way_back_is_noticed():
    """Turned by the wrong sign, the maps differ by far more than by the right one."""
    maps = smooth()
    aug = augment.Rotation((20, 20))
    params = aug.make_params(maps)
    new = aug.images(maps, params)
    right, valid = aug.inverse(new, params)
    wrong, also = aug.inverse(new, replace(params, angle=-params.angle))
    both = valid & also
    assert (
        math.sqrt(((right - maps)[both] ** 2).mean())
        < 1e-3
        < 0.1
        < math.sqrt(((wrong - maps)[both] ** 2).mean())
    )
