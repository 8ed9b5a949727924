"""Images without labels: their own classes where the network is confident, by hand."""

import pytest
import torch
import torch.nn.functional as F

from salnb import Objective, data
from salnb.augment import HorizontalFlip, MixUp
from salnb.losses import saliency_loss
from salnb.objective.unlabelled import own_classes
from salnb.saliency import vanilla_gradient
from tests.helpers.networks import conv_bn
from tests.helpers.tolerances import assert_close

TARGET = torch.tensor([2, -1, 0, -1, -1, 3])


def parts(confidence=0.6, **options):
    torch.manual_seed(0)
    model = conv_bn().double().eval()
    with torch.no_grad():
        model[-1].weight *= 40  # some are confident and some are not
    objective = Objective(model, HorizontalFlip(p=1), confidence=confidence, **options)
    return objective, model, torch.rand(6, 3, 8, 8, dtype=torch.float64)


def sure_ones(model, images, confidence=0.6):
    probability, own = model(images).softmax(1).max(1)
    sure = [i for i in range(6) if TARGET[i] < 0 and probability[i] >= confidence]
    assert 0 < len(sure) < 3
    return sure, own


def middle(model, images):
    """A confidence that some of the unlabelled images have and some have not."""
    probability = model(images).softmax(1).amax(1)[TARGET < 0].sort().values
    return ((probability[0] + probability[1]) / 2).item()


def test_the_terms_by_hand():
    _, model, images = parts()
    confidence = middle(model, images)
    objective, *_ = parts(confidence, consistency=0.5)
    found, flipped = objective(images, TARGET), images.flip(-1)
    sure, own = sure_ones(model, images, confidence)
    known = [i for i in range(6) if TARGET[i] >= 0]
    classes = (
        F.cross_entropy(model(images[known]), TARGET[known])
        + F.cross_entropy(model(flipped[known]), TARGET[known])
    ) / 2
    consistent = F.cross_entropy(model(flipped[sure]), own[sure], reduction="sum") / 3
    used = sorted([*known, *sure])
    target = torch.where(TARGET < 0, own, TARGET)[used]
    maps, new_maps = (vanilla_gradient(model, x[used], target) for x in (images, flipped))
    salience = saliency_loss(maps, new_maps.flip(-1))
    assert_close(found.class_loss, classes, 1e-9)
    assert_close(found.consistency_loss, consistent, 1e-9)
    assert_close(found.saliency_loss, salience, 1e-9)
    assert_close(found.total, classes + 0.5 * consistent + salience, 1e-9)


def test_with_labels_for_all_it_is_the_objective_without():
    objective, model, images = parts(consistency=1.0)
    target = torch.arange(6) % 4
    found, expected = objective(images, target), Objective(model, HorizontalFlip(p=1))(images, target)
    assert_close(found.total, expected.total, 1e-10)
    assert found.consistency_loss == 0


def test_without_a_label_or_a_confident_image_nothing_is_learnt_from():
    objective, _, images = parts(1.0, consistency=1.0)
    losses = objective(images, torch.full((6,), -1))
    losses.total.backward()
    assert losses.total == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_own_classes_have_no_gradient():
    logits = torch.randn(6, 4, requires_grad=True)
    own = own_classes(logits, TARGET, 0.3)
    assert not own.target.requires_grad
    assert own.target[[0, 2, 5]].tolist() == [2, 0, 3]
    assert not (own.labelled & own.confident).any()


@pytest.mark.usefixtures("traced")
def test_compiled_steps_are_the_eager_ones():
    _, model, images = parts()
    eager, compiled = (
        parts(middle(model, images), consistency=0.5, balance=0.4)[0].train() for _ in range(2)
    )
    compiled.compile(backend="eager")
    ours, theirs = (o(images, TARGET, torch.Generator().manual_seed(1)) for o in (compiled, eager))
    for name in ("total", "class_loss", "consistency_loss", "saliency_loss", "gamma"):
        assert_close(torch.as_tensor(getattr(ours, name)), torch.as_tensor(getattr(theirs, name)), 1e-6)
    for losses in (ours, theirs):
        losses.total.backward()
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"confidence must be a probability, from 0 to 1, got 1\.5"):
        parts(1.5)
    with pytest.raises(ValueError, match="consistency is for images without labels"):
        parts(0.0, consistency=1.0)
    objective, _, images = parts(0.0)
    with pytest.raises(ValueError, match="target must lie in 0 … 3, got -1"):
        objective(images, TARGET)
    mixing = Objective(conv_bn().double(), MixUp(), confidence=0.5)
    with pytest.raises(ValueError, match="target must be labels"):
        mixing(images, torch.rand(6, 4).softmax(1))


# --- the data ----------------------------------------------------------------------------------------------


def test_hidden_labels():
    labels = torch.arange(10).repeat(40)
    split = data.Arrays(torch.arange(400).view(400, 1, 1, 1).to(torch.int16), labels)
    found = data.hide_labels(split, 4, torch.Generator().manual_seed(0))
    known = found.labels >= 0
    assert sorted(found.images[~known].flatten().tolist() + found.images[known].unique().tolist()) == list(
        range(400)
    )
    assert (found.labels[known] == labels[found.images[known].flatten().long()]).all()
    assert found.labels[known].bincount().tolist() == [4 * 3] * 10
    assert known.float().mean() == 0.25
    again = data.hide_labels(split, 4, torch.Generator().manual_seed(0))
    assert torch.equal(again.images, found.images)
    with pytest.raises(
        ValueError, match="labels_per_class must be at most 40, the images of class 0, got 41"
    ):
        data.hide_labels(split, 41, torch.Generator())
