"""The sums of an epoch: what they add up, what they come to, and what checkpoints hold of them."""

from dataclasses import asdict

import torch

from salnb.objective import Losses
from salnb.train.epoch_sums import TERMS, EpochSums, StepTerms


def test_means_are_over_steps_and_of_the_saliency_loss_over_those_that_had_one():
    sums = EpochSums()
    sums.add([1.0, 2.0, 6.0, 9.0, 0.5, 4.0], salient=True)
    sums.add([3.0, 4.0, 0.0, 7.0, 1.0, 0.0], salient=False)
    means = sums.epoch_means()
    assert means == dict(zip((*TERMS, "accuracy", "gamma"), [2.0, 3.0, 6.0, 8.0, 0.75, 4.0], strict=True))


def test_without_a_saliency_loss_its_mean_is_zero():
    sums = EpochSums()
    sums.add([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], salient=False)
    assert sums.epoch_means()["saliency_loss"] == 0


def test_a_step_tells_its_terms_and_its_accuracy_on_the_originals():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    values = [torch.tensor(float(i), requires_grad=True) for i in range(4)]
    terms = StepTerms.of(
        7, Losses(*values, logits, has_saliency=True, gamma=torch.tensor(3.0)), torch.tensor([0, 0])
    )
    assert (terms.step, terms.salient) == (7, True)
    # total stands first among the losses and last among the terms
    assert terms.values.tolist() == [1.0, 2.0, 3.0, 0.0, 0.5, 3.0]
    assert not terms.values.requires_grad


def test_checkpoints_may_hold_a_part_of_the_sums():
    """Those saved at the end of an epoch once held the seconds alone."""
    assert EpochSums(**{"seconds": 0.5}) == EpochSums(seconds=0.5)
    sums = EpochSums(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 2.0, 7.0)
    assert EpochSums(**asdict(sums)) == sums
