"""Weights of the saliency loss: the choice of the best, and terms that pull equally."""

import pytest
import torch

import salnb.losses
from salnb import data, models
from salnb.augment import Affine
from salnb.objective import Objective
from salnb.study import choose_gammas, match_weight, weights
from salnb.train.setup import derived_seed

pytestmark = pytest.mark.usefixtures("cache")

TRAINING = {"batch_size": 4, "epochs": 2, "device": "cpu", "save_minutes": 0}


def gamma_record(gamma, seed, accuracy, data="svhn", **changes):
    result = {"validation_accuracy": accuracy, "test_accuracy": 1 - accuracy}
    factors = {"data": data, "network": "small", "gamma": f"{gamma:g}", "seed": seed}
    return {"status": "done", "factors": factors, "result": result} | changes


def failed(record):
    return {k: v for k, v in record.items() if k != "result"} | {
        "status": "failed",
        "error": "MemoryError: 3",
    }


def test_the_weight_is_the_best_on_the_validation_split():
    records = [
        *(gamma_record(0, seed, 0.99) for seed in (7, 8)),  # the reference is no candidate
        *(gamma_record(0.1, seed, 0.5) for seed in (7, 8)),
        *(gamma_record(1, seed, accuracy) for seed, accuracy in ((7, 0.4), (8, 0.7))),
        *(gamma_record(10, seed, 0.3) for seed in (7, 8)),
        gamma_record(0.1, 7, 0.2, "cifar10"),
        gamma_record(1, 7, 0.1, "cifar10"),
    ]
    assert choose_gammas(records) == {"svhn": 1.0, "cifar10": 0.1}
    # of equals the smallest, in whatever order
    equal = [gamma_record(gamma, 7, 0.5) for gamma in (3, 10, 0.3, 1)]
    assert choose_gammas(equal) == {"svhn": 0.3}
    assert choose_gammas([*equal, failed(gamma_record(0.1, 7, 0.9))]) == {"svhn": 0.3}


def test_without_a_training_there_is_no_choice():
    records = [gamma_record(0, 7, 0.5), failed(gamma_record(1, 7, 0.5)), gamma_record(1, 7, 0.5, "cifar10")]
    with pytest.raises(
        RuntimeError, match="no weight can be chosen for svhn, as all its runs failed: MemoryError: 3"
    ):
        choose_gammas(records)


def test_an_accuracy_that_is_no_number_is_no_choice():
    with pytest.raises(
        ValueError, match=r"validation_accuracy must be a finite number, got nan in the record"
    ):
        choose_gammas([gamma_record(1, 7, 0.5), gamma_record(3, 7, float("nan"))])


SETTINGS = {"data": "cifar10", "model": "small", "augmentation": "affine", "gamma": 2.0, **TRAINING}
CHANGES = [
    {"normalize": "sum"}, {"normalize": "none"}, {"distance": "cosine"}, {"pool": 4},
    {"method": "guided_backprop"}, {"method": "grad_cam"}, {"method": "smoothgrad", "samples": 2},
]  # fmt: skip


def pull(settings, weight):
    """The length of the gradient of the weighted term, by hand: over four batches of an untrained network."""
    torch.manual_seed(derived_seed(0, "weights"))
    options = {"n_samples": settings["samples"]} if "samples" in settings else None
    objective = Objective(
        models.build("small", 10), Affine(), alpha=0.0, gamma=weight, method_options=options,
        **{k: settings[k] for k in ("method", "normalize", "distance", "pool") if k in settings},
    )  # fmt: skip
    split, generator, lengths = data.load("cifar10", 32).train, torch.Generator().manual_seed(0), []
    for images, labels, _ in data.batches(split, 32, torch.device("cpu"), batch_size=4, seed=0):
        objective.zero_grad()
        objective(images, labels, generator).total.backward()
        gradient = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
        lengths.append(gradient.norm().item())
    assert len(lengths) == 4
    return sum(lengths) / 4


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_matched_term_pulls_as_strongly(changes):
    changed = SETTINGS | changes
    weight = match_weight(SETTINGS, changed)
    assert pull(changed, weight) == pytest.approx(pull(SETTINGS, 2.0), rel=0.06)  # it has two digits
    assert pull(changed, 2.0) != pytest.approx(pull(SETTINGS, 2.0), rel=0.06)


def test_a_factor_on_the_loss_is_undone(monkeypatch):
    assert match_weight(SETTINGS, SETTINGS) == 2.0
    weights._gradient_length.cache_clear()
    loss = salnb.losses.saliency_loss
    monkeypatch.setattr(
        "salnb.objective.terms.saliency_loss",
        lambda *a, **k: loss(*a, **k) * (50.0 if k["pool"] == 2 else 1.0),
    )
    strong = match_weight(SETTINGS, SETTINGS | {"pool": 2})
    monkeypatch.undo()
    weights._gradient_length.cache_clear()
    assert match_weight(SETTINGS, SETTINGS | {"pool": 2}) == pytest.approx(50 * strong, rel=0.05)


def test_a_weight_is_matched_whatever_else_is_trained_with():
    """Other terms, and when the term enters, do not count; the generators are left alone."""
    other = {"beta": 0.5, "layers": ("network.stage1",), "alpha": 0.3, "warmup": 100, "every": 3, "seed": 5}
    before = torch.random.get_rng_state()
    changes = {"normalize": "sum"}
    assert match_weight(SETTINGS | other, SETTINGS | other | changes) == match_weight(
        SETTINGS, SETTINGS | changes
    )
    assert torch.equal(torch.random.get_rng_state(), before)
