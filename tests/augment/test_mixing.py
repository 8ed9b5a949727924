"""CutOut, MixUp, CutMix and AugMix: labels by real shares, maps carried forward by the same operation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from salnb import augment
from salnb.augment import augmix, mixing
from salnb.augment.warp import Warp, compose, resample
from tests.helpers.tolerances import assert_close

CLASSES = 4
ONE = {name: make() for name, make in augment.AUGMENTATIONS.items()}
mixing_ones = pytest.mark.parametrize("name", [name for name, aug in ONE.items() if aug.least_samples > 1])
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=5, height=16, width=12, dtype=torch.float64):
    images = torch.rand(n, 3, height, width, dtype=dtype, generator=generator(1))
    return (
        images,
        torch.arange(n) % CLASSES,
        torch.rand(n, 1, height, width, dtype=dtype, generator=generator(2)),
    )


@pytest.mark.parametrize("name", [name for name, aug in ONE.items() if not aug.invertible])
def test_there_is_no_inverse_and_the_error_says_what_to_do(name):
    aug = augment.AUGMENTATIONS[name]()
    images, _, maps = batch()
    params = aug.make_params(images)
    with pytest.raises(
        augment.NotInvertibleError, match=rf"{type(aug).__name__} has no inverse: use align\("
    ):
        aug.inverse(maps, params)
    inside = augment.Sequential(augment.Rotation(), aug, augment.HorizontalFlip())
    with pytest.raises(augment.NotInvertibleError, match=f"{type(aug).__name__} has no inverse"):
        inside.inverse(maps, inside.make_params(images))


@mixing_ones
def test_one_image_cannot_be_mixed(name):
    images, labels, _ = batch(1)
    for aug in (augment.AUGMENTATIONS[name](), augment.Sequential(augment.AUGMENTATIONS[name]())):
        with pytest.raises(ValueError, match="needs at least 2, got 1"):
            aug(images, labels, num_classes=CLASSES)


@mixing_ones
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), n=st.integers(2, 9))
def test_label_weights_sum_to_one_and_partners_differ(name, seed, n):
    images, labels, _ = batch(n)
    augmented = augment.AUGMENTATIONS[name]()(images, labels, num_classes=CLASSES, generator=generator(seed))
    assert augmented.targets.shape == (n, CLASSES)
    assert_close(augmented.targets.sum(1), torch.ones(n, dtype=torch.float64))
    assert augmented.targets.min() >= 0
    partner = augmented.params.partner
    assert (partner != torch.arange(n)).all()
    assert torch.equal(partner.sort().values, torch.arange(n))


@mixing_ones
def test_weights_may_be_mixed_again(name):
    images, labels, _ = batch()
    aug = augment.AUGMENTATIONS[name]()
    params = aug.make_params(images, generator(3))
    rows = torch.nn.functional.one_hot(labels, CLASSES).double()
    assert torch.equal(aug.targets(rows, params), aug.targets(labels, params, CLASSES))
    twice = augment.Sequential(augment.MixUp(), augment.CutMix())(images, labels, num_classes=CLASSES)
    assert_close(twice.targets.sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("target", "num_classes", "error", "message"),
    [
        (torch.arange(5), None, ValueError, "num_classes must be given"),
        (torch.arange(5), 4, ValueError, "labels from 0 to 3, got 0 to 4"),
        (torch.arange(5) - 1, 4, ValueError, "labels from 0 to 3, got -1 to 3"),
        (torch.rand(5), 4, TypeError, "integer labels .* got torch.float32"),
        (torch.rand(5, 3), 4, ValueError, "3 class weights, but num_classes is 4"),
        (torch.arange(5), 5.5, TypeError, "num_classes must be a whole number in .* got 5.5"),
        (torch.ones(5, 3).cfloat(), 3, TypeError, r"class weights \(N, K\), got torch.complex64"),
        (torch.arange(4), 4, ValueError, "drawn for 5 samples, but target has 4"),
    ],
    ids=[
        "no classes",
        "too high",
        "negative",
        "not integer",
        "another width",
        "no number",
        "complex",
        "another batch",
    ],
)
def test_bad_targets_are_refused(target, num_classes, error, message):
    aug = augment.MixUp()
    params = aug.make_params(batch()[0])
    with pytest.raises(error, match=message):
        aug.targets(target, params, num_classes)


def test_unsigned_labels_and_one_hot_integers_are_mixed():
    aug, labels = augment.MixUp(), torch.arange(5)
    params = aug.make_params(batch()[0])
    expected = aug.targets(labels, params, 5)
    for target in (labels.to(torch.uint16), torch.eye(5).long(), torch.eye(5).bool()):
        assert torch.equal(aug.targets(target, params, 5), expected)


@pytest.mark.parametrize("make", [augment.MixUp, augment.CutMix, lambda: augment.Sequential(augment.MixUp())])
def test_a_part_of_a_mixed_batch_has_no_params(make):
    params = make().make_params(batch()[0])
    for some in (slice(2, None), slice(2), torch.arange(2)):
        with pytest.raises(ValueError, match="Params have no parts, as each image's partner may be anywhere"):
            params[some]
    with pytest.raises(TypeError, match=r"params have parts by a slice, a mask or indices .*, got 0"):
        params[0]


def test_a_part_of_other_params():
    aug, images = augment.Affine(), batch()[0]
    params = aug.make_params(images)
    whole = aug.images(images, params)
    for some in (slice(2), torch.tensor([3, 1]), [0, 4]):
        assert_close(aug.images(images[some], params[some]), whole[some])
    with pytest.raises(TypeError, match="params have parts by a slice"):
        params[0]


@pytest.mark.parametrize(
    ("valid", "error"),
    [
        (torch.ones(5, 1, 16, 12), ValueError),
        (torch.ones(5, 1, 2, 2, dtype=torch.bool), ValueError),
        ([True], TypeError),
    ],
    ids=["floats", "shape", "list"],
)
def test_what_is_no_mask_is_not_carried(valid, error):
    aug, images = augment.CutOut(), batch()[0]
    with pytest.raises(error, match=r"valid must be .*bool"):
        aug.carry(images[:, :1], aug.make_params(images), valid)


def test_labels_of_single_image_augmentations_are_untouched():
    images, labels, _ = batch()
    for name in (name for name, aug in ONE.items() if aug.least_samples == 1):
        assert augment.AUGMENTATIONS[name]()(images, labels).targets is labels


@floats
def test_mixup_agrees_with_torchvision(dtype):
    images, labels, _ = batch(dtype=dtype)
    theirs = v2.MixUp(num_classes=CLASSES)
    weight = 0.3
    roll = torch.arange(5).roll(1)
    params = augment.MixUpParams(roll, torch.full((5,), weight, dtype=torch.float64))
    expected = theirs.transform(images, {"lam": weight, "labels": labels, "batch_size": 5})
    assert_close(augment.MixUp().images(images, params), expected)
    rows = torch.nn.functional.one_hot(labels, CLASSES)
    assert_close(
        augment.MixUp().targets(labels, params, CLASSES),
        weight * rows.double() + (1 - weight) * rows.roll(1, 0).double(),
    )


@floats
def test_cutmix_agrees_with_torchvision(dtype):
    images, labels, _ = batch(dtype=dtype)
    left, top, right, bottom = box = (2, 3, 9, 16)
    weight = 1 - 7 * 13 / (16 * 12)
    expected = v2.CutMix(num_classes=CLASSES).transform(
        images, {"box": box, "lam_adjusted": weight, "labels": labels, "batch_size": 5}
    )
    params = augment.CutMixParams(
        torch.arange(5).roll(1), torch.full((5,), weight), torch.tensor([[top, left, bottom, right]] * 5)
    )
    assert torch.equal(augment.CutMix().images(images, params), expected)


def test_cutmix_weight_is_the_real_area():
    """Count the pixels that were taken: the box is often clipped at the frame."""
    n = 200
    images = torch.arange(n, dtype=torch.float64)[:, None, None, None].expand(n, 1, 15, 17)
    augmented = augment.CutMix()(images, torch.arange(n), num_classes=n, generator=generator(4))
    own = (augmented.images == images).double().mean((1, 2, 3))
    assert_close(augmented.params.weight, own)
    assert_close(augmented.targets.diagonal(), own)
    box = augmented.params.box
    assert ((box[:, 0] == 0) | (box[:, 3] == 17)).any()


def test_shares_follow_alpha():
    images = torch.rand(4000, 1, 2, 2)
    near_half = augment.MixUp(alpha=50.0).make_params(images, generator(5)).weight
    at_ends = augment.MixUp(alpha=0.1).make_params(images, generator(5)).weight
    even = augment.MixUp(alpha=1.0).make_params(images, generator(5)).weight
    least = augment.MixUp(alpha=0.01).make_params(images, generator(5)).weight
    shares = ((near_half, 1 / (4 * 101)), (at_ends, 1 / (4 * 1.2)), (even, 1 / 12), (least, 1 / (4 * 1.02)))
    for weight, variance in shares:
        assert weight.mean().item() == pytest.approx(0.5, abs=0.03)
        assert weight.var().item() == pytest.approx(variance, rel=0.1)


def test_maps_are_mixed_as_the_images_are():
    images, _, maps = batch()
    for aug in (augment.MixUp(), augment.CutMix()):
        params = aug.make_params(images, generator(6))
        first, second, valid = aug.align(maps, maps * 2, params)
        assert torch.equal(first, aug.images(maps, params))
        assert torch.equal(second, maps * 2)
        assert valid.all()


def test_cutout_blanks_a_box_of_the_given_size_and_declares_it_invalid():
    images = torch.ones(300, 3, 16, 12)
    maps = torch.ones(300, 1, 16, 12)
    augmented = augment.CutOut(size=0.5)(images, generator=generator(7))
    hole = (augmented.images == 0).all(1, keepdim=True)
    first, second, valid = augmented.align(maps, maps)
    assert torch.equal(valid, ~hole)
    assert torch.equal(first, maps * ~hole)
    assert torch.equal(second, maps)
    area = hole.sum((1, 2, 3))
    assert area.max() == 8 * 6
    assert area.min() >= 4 * 3  # a quarter remains where the centre is a corner
    top, left, bottom, right = augmented.params.box.unbind(-1)
    assert torch.equal(area, (bottom - top) * (right - left))


def test_boxes_are_clipped_at_the_frame():
    centre, sides = torch.tensor([[0, 0], [5, 5], [9, 9]]), torch.tensor([[4, 6]] * 3)
    boxes = mixing.clipped_box(centre, sides, (10, 10))
    assert boxes.tolist() == [[0, 0, 2, 3], [3, 2, 7, 8], [7, 6, 10, 10]]


def test_what_was_filled_in_before_mixing_stays_invalid_after_it():
    """A turned image's corners are nobody's, and mixing carries them to the partner."""
    images, _, maps = batch()
    for mixed in (augment.MixUp(), augment.CutMix(), augment.CutOut()):
        aug = augment.Sequential(augment.Rotation((30, 30)), mixed, augment.HorizontalFlip(p=1))
        params = aug.make_params(images, generator(8))
        first, _, valid = aug.align(maps, maps, params)
        assert_close(first[valid], aug.images(maps, params)[valid])
        seen = augment.Rotation().images(torch.ones_like(maps), params.steps[0]) > 1 - 1e-9
        if isinstance(mixed, augment.MixUp):
            seen = seen & seen[params.steps[1].partner]
        elif isinstance(mixed, augment.CutMix):
            box = mixing.inside(params.steps[1].box, maps.shape[-2:])
            seen = torch.where(box, seen[params.steps[1].partner], seen)
        else:
            seen = seen & ~mixing.inside(params.steps[1].box, maps.shape[-2:])
        assert torch.equal(valid, seen.flip(-1))


# AugMix -----------------------------------------------------------------------------------------------------


def chain(*steps, n=2):
    """Params of one chain of weight one, without the original."""
    operations = torch.tensor([[[augmix.OPERATIONS.index(name) for name, _ in steps]]] * n)
    levels = torch.tensor([[[level for _, level in steps]]] * n, dtype=torch.float64)
    return augment.AugMixParams(operations, levels, torch.ones(n, 1), torch.ones(n))


@floats
@pytest.mark.parametrize("flat", [False, True], ids=["noise", "constant channels"])
def test_photometric_operations_agree_with_torchvision(dtype, flat):
    images = batch(dtype=dtype)[0] ** 3
    if flat:
        images = images[..., :1, :1].expand(-1, -1, 16, 12).contiguous()
    assert_close(augmix.autocontrast(images), tv.autocontrast(images))
    assert_close(augmix.equalize(images), torch.stack([tv.equalize(image) for image in images]))
    for bits in (1, 3, 4, 8):
        assert_close(augmix.posterize(images, torch.full((5,), bits)), tv.posterize(images, bits))
    threshold = torch.linspace(0, 1, 5, dtype=dtype)
    expected = [tv.solarize(image, level.item()) for image, level in zip(images, threshold, strict=True)]
    assert_close(augmix.solarize(images, threshold), torch.stack(expected))


def test_equalize_of_a_large_image_spreads_its_levels():
    images = torch.rand(2, 3, 64, 64) * 0.2 + 0.4
    new = augmix.equalize(images)
    assert_close(new, tv.equalize(images))
    assert new.amin() < 0.02
    assert new.amax() > 0.98


@pytest.mark.parametrize(
    ("name", "level", "movement"),
    [
        ("rotate", 3.0, {"angle": -9.0}),
        ("shear_x", 3.0, {"shear": [5.142764558, 0.0]}),  # arctan of 0.09
        ("shear_y", -3.0, {"shear": [0.0, -5.142764558]}),
        ("translate_x", 3.0, {"translate": [1, 0]}),
        ("translate_y", -3.0, {"translate": [0, -1]}),
    ],
)
def test_movements_agree_with_torchvision(name, level, movement):
    images = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    theirs = tv.affine(images, **(still | movement), interpolation=v2.InterpolationMode.BILINEAR)
    ours = augment.AugMix().images(images, chain((name, level)))
    assert_close(ours, theirs, 1e-8)


def test_a_chain_runs_in_order_and_movements_in_a_row_are_resampled_once():
    images, _, _ = batch(2)
    aug = augment.AugMix()
    params = chain(("solarize", 5.0), ("rotate", 3.0), ("translate_x", 2.0), ("posterize", 5.0))
    solarized = augmix.solarize(images, torch.full((2,), 128 / 255))
    joined = augment.Sequential(augment.Affine(), augment.Affine())
    zero = torch.zeros(2, dtype=torch.float64)
    pair = torch.zeros(2, 2, dtype=torch.float64)
    turn = augment.AffineParams(zero + 9, zero + 1, pair, pair)
    shift = augment.AffineParams(zero, zero + 1, torch.tensor([[2 / 30, 0.0]] * 2), pair)
    moved = joined.images(solarized, augment.SequentialParams((turn, shift)))
    assert_close(aug.images(images, params), augmix.posterize(moved, torch.full((2,), 2)), 1e-7)


@pytest.mark.parametrize("name", augmix.OPERATIONS[augmix.FIRST_GEOMETRIC :])
def test_no_movement_asks_for_a_resampling_of_its_own(name):
    images, _, _ = batch(2)
    steps = ("rotate", 3.0), (name, 2.0)
    first, second = (
        augmix.step_matrix(
            torch.tensor([augmix.OPERATIONS.index(step)] * 2), level.expand(2), images.shape[-2:]
        )
        for step, level in ((step, torch.tensor(level).double()) for step, level in steps)
    )
    expected = resample(images, Warp(compose(first, second)))
    assert_close(augment.AugMix().images(images, chain(*steps)), expected)


def test_maps_move_with_their_chain_and_are_mixed_by_the_weights_of_the_images():
    """With movements only, maps go through exactly what images go through."""
    _, _, maps = batch()
    aug = augment.AugMix(severity=5)
    params = aug.make_params(maps, generator(9))
    moving = params.operation % 5 + augmix.FIRST_GEOMETRIC
    params = augment.AugMixParams(moving, params.level, params.chain_weight, params.mixed_weight)
    first, _, valid = aug.align(maps, maps, params)
    assert_close(first, aug.images(maps, params))
    assert torch.equal(valid, aug.images(torch.ones_like(maps), params) > 1 - 1e-9)
    assert 0.2 < valid.double().mean() < 1


def test_photometric_operations_leave_maps_alone():
    images, _, maps = batch(2)
    params = chain(("equalize", 3.0), ("autocontrast", 3.0), ("solarize", 3.0), ("posterize", 3.0))
    first, second, valid = augment.AugMix().align(maps, maps, params)
    assert_close(first, maps)
    assert_close(second, maps)
    assert valid.all()
    assert not torch.equal(augment.AugMix().images(images, params), images)


def test_depth_and_weights():
    images = torch.rand(400, 3, 4, 4)
    params = augment.AugMix(width=4).make_params(images, generator(10))
    assert params.operation.shape == (400, 4, 3)
    lengths = (params.operation >= 0).sum(-1)
    assert lengths.unique().tolist() == [1, 2, 3]
    assert (params.operation[..., 0] >= 0).all()
    assert params.operation.unique().tolist() == list(range(-1, 9))
    assert_close(params.chain_weight.sum(-1), torch.ones(400))
    assert 0.1 <= params.level.abs().min() < params.level.abs().max() <= 3
    assert augment.AugMix(depth=2).make_params(images).operation.min() >= 0


def test_targets_of_both_halves_are_checked_unless_they_may_be_no_classes():
    labels, mixed = torch.tensor([0, 9]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="target must lie in 0 … 3, got 9"):
        mixing.both_targets(labels, mixed, 4)
    assert mixing.both_targets(labels, mixed, 4, check=False).tolist() == [0, 9, 0, 1]
