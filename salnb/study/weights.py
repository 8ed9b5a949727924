"""Weights of the saliency loss: the best of several, and one that makes two losses equally strong."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from salnb import data
from salnb._common.devices import best_device
from salnb.statistics import mean, reached
from salnb.study.plans import Plan
from salnb.train.config import Config
from salnb.train.setup import derived_seed, make_objective, numerics

__all__ = ["choose_balances", "choose_gammas", "match_weight"]

# batches on which two losses are compared
_MATCHED_BATCHES = 4


def choose_gammas(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each data set, the weight with the highest mean accuracy on the validation split.

    Of weights that are equally good the smallest is taken. The reference, without a saliency loss, is no
    candidate: whether the loss helps is what the studies ask.

    Args:
        records: of the study "gamma".

    Raises:
        RuntimeError: for a data set, no run with a saliency loss succeeded.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        accuracies = found.setdefault(record["factors"]["data"], {})
        gamma = float(record["factors"]["gamma"])
        if record["status"] == "done" and gamma:
            accuracies.setdefault(gamma, []).append(reached(record, "validation_accuracy"))
    for name, accuracies in found.items():
        if not accuracies:
            errors = "; ".join(r["error"] for r in records if r["status"] == "failed")
            raise RuntimeError(f"no weight can be chosen for {name}, as all its runs failed: {errors}")
    return {
        name: max(sorted(accuracies), key=lambda gamma: mean(accuracies[gamma]))
        for name, accuracies in found.items()
    }


def choose_balances(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each arm of a plan that is tuned, the largest share of the gradient with which no run collapses.

    A run has collapsed if it failed, or if its training accuracy is below the share of its reference's that
    the plan's gate asks for. Where runs collapse with all shares, the smallest is taken.

    Args:
        plan: the plan.
        records: of the study of that choice.
    """
    found: dict[tuple[str, float, int], float] = {}
    for record in records:
        factors = record["factors"]
        accuracy = reached(record, "train_accuracy") if record["status"] == "done" else 0.0
        found[factors["arm"], float(factors["balance"]), factors["seed"]] = accuracy
    seeds = {seed for *_, seed in found}

    def sound(arm: str, balance: float) -> bool:
        reference = str(plan.arms[arm].reference)
        return all(
            found[arm, balance, seed] >= plan.gate.accuracy * found[reference, 0.0, seed] for seed in seeds
        )

    return {
        arm: max((b for b in balances if sound(arm, b)), default=min(balances))
        for arm, balances in plan.candidates().items()
        if plan.arms[arm].tuned
    }


def match_weight(settings: Mapping[str, Any], changed: Mapping[str, Any]) -> float:
    """The weight with which a changed saliency loss pulls as strongly at the start of a training run.

    Normalisations, distances and methods each have a unit of their own, so that a weight means nothing across
    them. What is held equal is the length of the term's gradient with respect to the parameters, averaged
    over a few batches of an untrained network.

    Args:
        settings: of a training run, its `gamma` included.
        changed: the same with another saliency loss.

    Returns:
        The weight for the latter, to two digits.

    Raises:
        ValueError: the weight is one that `balance` chooses, in units of the class loss already.
    """
    for each in (settings, changed):
        if each.get("balance"):
            raise ValueError(f"balance chooses the weight, so that none is matched, got {each['balance']}")
    alone = {"alpha": 0.0, "beta": 0.0, "layers": (), "gamma": 1.0, "warmup": 0, "every": 1}
    length, changed_length = (
        _gradient_length(Config(**{**each, **alone, "out": "unused"})) for each in (settings, changed)
    )
    weight = settings["gamma"] * length / changed_length if changed_length else settings["gamma"]
    return float(f"{weight:.2g}")


@functools.lru_cache(maxsize=32)  # each is compared with the same default
def _gradient_length(config: Config) -> float:
    device = torch.device("cpu" if config.device == "cpu" else best_device())
    with numerics(config):
        torch.manual_seed(derived_seed(0, "weights"))
        objective = make_objective(config, data.WHOLE).to(device)
        split = data.load(config.data, config.size, workers=config.workers).train
        generator, lengths = torch.Generator(device).manual_seed(0), []
        whole = data.batches(split, config.size, device, batch_size=config.batch_size, seed=0)
        for images, labels, _ in itertools.islice(whole, _MATCHED_BATCHES):
            objective.zero_grad()
            objective(images, labels, generator).total.backward()
            gradients = [p.grad for p in objective.parameters() if p.grad is not None]
            lengths.append(torch.nn.utils.get_total_norm(gradients).item())
    return mean(lengths)
