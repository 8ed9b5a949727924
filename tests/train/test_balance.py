"""Runs with `balance`, and what every run says of its maps."""

import re

import pytest
import torch

from salnb import data, results
from salnb.__main__ import main
from salnb.agreement import Agreement, agreement
from salnb.augment import AUGMENTATIONS
from salnb.study import match_weight
from salnb.train import fit
from salnb.train.checkpoint import load_checkpoint, save_checkpoint
from salnb.train.config import Config
from tests.helpers import runs
from tests.helpers.runs import rows, settings, silent, without_times

pytestmark = pytest.mark.usefixtures("cache")

BALANCED = {"balance": 0.3, "score": "log_prob", "model": "small_silu", "normalize": "zscore"}


def test_a_run_records_the_weights_that_it_chose(tmp_path):
    out = tmp_path / "run"
    summary = fit(settings(out, **BALANCED), log=silent)
    assert summary["gammas"] == [row["gamma"] for row in rows(out)]
    assert len(set(summary["gammas"])) > 1
    assert all(gamma > 0 for gamma in summary["gammas"])
    for row in rows(out):
        assert row["total"] > row["class_loss"]


def test_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path, cache):
    whole = fit(settings(tmp_path / "whole", **BALANCED), log=silent)
    config = settings(tmp_path / "run", **BALANCED)
    process, pipe = runs.start(config, cache=cache, inject=runs.stop_before_a_checkpoint_has_its_name)
    runs.wait_for(pipe, "here")
    assert runs.kill(process)
    found = fit(config, resume=True, log=silent)
    assert found["parameters_sha256"] == whole["parameters_sha256"]
    assert found["gammas"] == whole["gammas"]
    assert without_times(rows(tmp_path / "run")) == without_times(rows(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": 0.3, "gamma": 0.0}, "balance=0.3 with gamma=0.0"),
        ({"balance": 0.3, "gamma": 0.5}, "balance chooses gamma"),
        ({"balance": 0.3, "alpha": 0.0}, "balance is a share of the class loss"),
        ({"balance": -0.3}, "balance must be at least 0"),
        ({"balance": float("nan")}, "balance must be"),
        ({"score": "logits"}, "score 'logits' is unknown.*did you mean 'logit'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(out="run", **changes)


def test_no_weight_is_matched_to_one_that_is_chosen():
    plain = {"data": "cifar10", "gamma": 1.0}
    with pytest.raises(ValueError, match=r"balance chooses the weight.*got 0.3"):
        match_weight(plain, plain | {"balance": 0.3})


def test_settings_that_a_record_is_too_old_to_have_are_at_their_defaults():
    config = Config(out="run")
    older = {k: v for k, v in config.to_dict().items() if k not in ("balance", "score", "shuffle_pairs")}
    assert config.differences(older) == ""
    assert Config(out="run", score="log_prob").differences(older) == "score 'logit' (now 'log_prob')"


def test_a_checkpoint_from_before_is_resumed(tmp_path, whole):
    """Sums and the objective's state had less in them."""
    out = tmp_path / "run"
    done = settings(out, epochs=3)
    fit(settings(tmp_path / "first", epochs=3), log=silent)
    state = load_checkpoint(tmp_path / "first" / "checkpoints")
    del state["sums"]["gamma"]
    save_checkpoint(out / "checkpoints", state["step"], state)
    older = {k: v for k, v in done.to_dict().items() if k not in ("balance", "score", "shuffle_pairs")}
    results.write_record(out / "config.json", older)
    assert fit(done, resume=True, log=silent)["parameters_sha256"] == whole[1]["parameters_sha256"]


# --- how far maps agree ------------------------------------------------------------------------------------


def test_a_run_records_how_far_its_maps_agree(whole):
    out, summary = whole
    state = load_checkpoint(out / "checkpoints")["objective"]
    from salnb import models

    model = models.build("small", 10)
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    test = data.load("cifar10", 32).test
    draw = torch.Generator().manual_seed(0)
    images = test.images / 255
    found = agreement(model.eval(), AUGMENTATIONS["affine"](), images, test.labels, draw, num_classes=10)
    for name in Agreement._fields:
        assert summary[f"test_{name}"] == pytest.approx(getattr(found, name).double().mean().item(), rel=1e-5)
    assert summary["test_agreement_augmentation"] == "affine"


def test_the_reference_is_measured_as_all_are(tmp_path):
    summaries = [
        fit(settings(tmp_path / str(number), epochs=1, **changes), log=silent)
        for number, changes in enumerate(({"gamma": 0.0}, {"gamma": 0.0, "augmentation": "identity"}))
    ]
    for summary in summaries:
        assert summary["test_agreement_augmentation"] == "affine"
        assert -1 <= summary["test_correlation"] <= 1
        assert 0 < summary["test_half_area"] <= 0.5


def test_the_command_says_how_far_maps_agree_before_it_says_how_accurate_they_are(tmp_path, capsys):
    options = [
        "--data",
        "cifar10",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--balance",
        "0.3",
    ]
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 0
    *_, maps, accuracy = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"maps under affine: correlation \S+, of 4×4 blocks \S+, with another image's map \S+, eq. 7 \S+, "
        r"half of a map on \S+% of the pixels",
        maps,
    )
    assert accuracy.startswith("test accuracy")


def test_what_cannot_be_measured_costs_nothing_else(tmp_path, monkeypatch):
    from salnb.train import evaluate

    def broken(*args, **options):
        raise RuntimeError("no maps")

    monkeypatch.setattr(evaluate, "agreement", broken)
    summary = fit(settings(tmp_path / "run", epochs=1), log=silent)
    assert summary["test_correlation"] is None
    assert summary["missing"]["test_correlation"] == "RuntimeError: no maps"
    assert summary["test_accuracy"] >= 0


def test_a_run_with_few_labels(tmp_path):
    changes = {"labels_per_class": 1, "confidence": 0.01, "consistency": 0.5, "test_angle": 60.0, "epochs": 1}
    summary = fit(settings(tmp_path / "run", **changes), log=silent)
    assert 0 <= summary["train_accuracy"] <= 1
    assert 0 <= summary["test_accuracy_turned_30"] <= 1
    assert 0 <= summary["test_accuracy_turned_60"] <= 1
    assert summary["total"] > summary["class_loss"] + summary["saliency_loss"]
    with pytest.raises(ValueError, match=r"labels_per_class and confidence go together"):
        Config(out="run", labels_per_class=1)
    with pytest.raises(ValueError, match=r"labels_per_class must be at most \d+, the images of class"):
        fit(settings(tmp_path / "more", labels_per_class=20, confidence=0.9), log=silent)
