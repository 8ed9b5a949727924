"""Checkpoints whose name fits their content, and of which a part is missing or another's."""

import math

import pytest
import torch

from salnb.train import fit
from salnb.train.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.runs import check_same, silent

pytestmark = pytest.mark.usefixtures("cache")

DAMAGES = {
    "history, emptied": (
        lambda s: s.update(history=[]),
        "history must have a line for each of 1 epochs, got 0",
    ),
    "history, gone": (lambda s: s.update(history=None), "history must have a line"),
    "history, of strings": (lambda s: s.update(history=["{}"]), "history must have a line"),
    "a line without its loss": (
        lambda s: s["history"][0].pop("total"),
        "history must have numbers for total",
    ),
    "a line with a NaN": (lambda s: s["history"][0].update(total=math.nan), "numbers for total in each line"),
    "optimizer, emptied": (
        lambda s: s["optimizer"].update(state={}),
        "optimizer must have a state after 7 steps, got none",
    ),
    "optimizer, in part": (
        lambda s: s["optimizer"]["state"].update({0: {}}),
        "momentum_buffer of parameter 0",
    ),
    "another shape": (
        lambda s: s["optimizer"]["state"][1].update(momentum_buffer=torch.zeros(1)),
        r"of shape \(\d+,\) as momentum_buffer of parameter 1",
    ),
    "sums, emptied": (lambda s: s.update(sums={}), "sums must have numbers of 3 steps for class_loss"),
    "sums, as at first": (lambda s: s["sums"].update(steps=0.0), "sums must have numbers of 3 steps"),
    "schedule, emptied": (lambda s: s.update(schedule={}), "schedule must be at step 7, got None"),
    "another step": (
        lambda s: s.update(step=6),
        "step 6 is not that of 3 batches after 1 epochs of 4 batches",
    ),
    "an odd step": (lambda s: s.update(step="7"), "step 7 is not that of"),
    "a negative batch": (lambda s: s.update(epoch=2, batch=-2), "step 7 is not that of -2 batches"),
    "another count": (
        lambda s: s["objective"].update(_extra_state=torch.tensor(3)),
        "objective must be at step 7, got 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_lacks_a_part_is_named(stopped, whole, damage):
    """Its name fits its content: nobody would notice, and the rest of the run would be another one."""
    config, out = stopped
    change, message = DAMAGES[damage]
    state = load_checkpoint(out / "checkpoints")
    change(state)
    path = save_checkpoint(out / "checkpoints", 99, state)
    with pytest.raises(
        ValueError, match=rf"the run cannot go on from {path}: .*{message}.*; without this file"
    ):
        fit(config, resume=True, log=silent)
    path.unlink()
    fit(config, resume=True, log=silent)
    check_same(out, whole)
