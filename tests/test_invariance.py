"""Losses that look at other images of the batch: eq. 6 on their scale, and the control of eq. 7."""

import pytest
import torch

from salnb.losses import invariance_loss, with_other_images
from tests.helpers.tolerances import assert_close


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_relative_invariance_loss_by_hand(distance):
    old, new = torch.rand(2, 5, 3, 2, 2, dtype=torch.float64)
    power = {"l1": 1, "l2": 2}[distance]

    def apart(i, j):
        return (new[i] - old[j]).abs().pow(power).mean()

    same = sum(apart(i, i) for i in range(5))
    others = sum(apart(i - 1, i) for i in range(5))
    found = invariance_loss([old], [new], distance=distance, relative=True)
    assert_close(found, same / others, 1e-5)
    # it has no unit, and layers are summed
    both = invariance_loss([old, 100 * old], [new, 100 * new], distance=distance, relative=True)
    assert_close(both, 2 * found, 1e-10)


def test_the_relative_invariance_loss_of_unrelated_images_is_about_one():
    old, new = torch.randn(2, 400, 20)
    assert 0.95 < invariance_loss([old], [new], relative=True) < 1.05
    assert invariance_loss([old], [old], relative=True) == 0


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("value", [0.0, 3.0, 1e10])
def test_layers_that_tell_no_images_apart_have_finite_gradients(distance, value):
    old = torch.full((4, 3), value)
    for difference in (0.0, 1.0):
        new = (old + difference).requires_grad_()
        loss = invariance_loss([old], [new], distance=distance, relative=True)
        loss.backward()
        assert loss.isfinite()
        assert new.grad.isfinite().all()


def test_one_image_is_relative_to_nothing():
    with pytest.raises(ValueError, match=r"relative compares different images.*two at least"):
        invariance_loss([torch.rand(1, 3)], [torch.rand(1, 3)], relative=True)


@pytest.mark.parametrize("n", [2, 3])
def test_shuffled_pairs_are_of_different_images_where_both_are_valid(n):
    maps, new_maps = torch.rand(2, n, 1, 2, 2)
    valid = torch.rand(n, 1, 2, 2) > 0.3
    a, b, both = with_other_images(maps, new_maps, valid)
    for i in range(n):
        assert torch.equal(a[i], maps[i])
        assert torch.equal(b[i], new_maps[i - 1])
        assert torch.equal(both[i], valid[i] & valid[i - 1])
    with pytest.raises(ValueError, match="two images at least, got 1"):
        with_other_images(maps[:1], maps[:1], valid[:1])


def test_images_that_differ_by_rounding_only_are_no_measure():
    """Relative to them a distance is small, and positive."""
    old = [torch.ones(2, 3)]
    loss = invariance_loss(old, [old[0] + 1e-4], relative=True)
    assert 0 < loss < 0.02
