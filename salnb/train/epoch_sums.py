"""What the steps of an epoch add up to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from salnb.objective import Losses

__all__ = ["TERMS", "EpochSums", "StepTerms"]

TERMS = ("class_loss", "invariance_loss", "saliency_loss", "total")
_AVERAGED = (*TERMS, "accuracy")


class StepTerms(NamedTuple):
    """What one step found, left on its device until somebody looks."""

    step: int  # its number, from 1
    salient: bool  # whether it had a saliency loss
    values: Tensor  # (5,), the loss terms and the share of its originals that were classified correctly

    @classmethod
    def of(cls, step: int, losses: Losses, labels: Tensor) -> "StepTerms":
        """Those of a step from its losses and the (N,) labels of its originals."""
        right = (losses.logits[: len(labels)].argmax(1) == labels).float().mean()
        terms = [getattr(losses, term).detach().float() for term in TERMS]
        return cls(step, losses.has_saliency, torch.stack([*terms, right]))


@dataclass
class EpochSums:
    """Sums over the steps of an epoch: of loss terms, accuracy and time, and how many steps there were."""

    class_loss: float = 0.0
    invariance_loss: float = 0.0
    saliency_loss: float = 0.0
    total: float = 0.0
    accuracy: float = 0.0
    steps: float = 0.0
    salient_steps: float = 0.0
    seconds: float = 0.0

    def add(self, values: Iterable[float], *, salient: bool) -> None:
        """Add the values of a step, in the order of `StepTerms`."""
        for name, value in zip(_AVERAGED, values, strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.steps += 1
        self.salient_steps += salient

    def epoch_means(self) -> dict[str, float]:
        """Loss terms and accuracy of a step on average; the saliency loss over the steps that had one."""
        steps = {"saliency_loss": max(self.salient_steps, 1.0)}
        return {name: getattr(self, name) / steps.get(name, self.steps) for name in _AVERAGED}
