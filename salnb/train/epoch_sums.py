"""What the steps of an epoch add up to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from salnb.objective import Losses

__all__ = ["TERMS", "EpochSums", "StepTerms"]

TERMS = ("class_loss", "invariance_loss", "saliency_loss", "total")
_AVERAGED = (*TERMS, "accuracy", "gamma")


class StepTerms(NamedTuple):
    """What one step found, left on its device until somebody looks."""

    step: int  # its number, from 1
    salient: bool  # whether it had a saliency loss
    values: Tensor  # (6,), the loss terms, the share of its originals classified correctly, and gamma

    @classmethod
    def of(cls, step: int, losses: Losses, labels: Tensor) -> "StepTerms":
        """Those of a step from its losses and the (N,) labels of its originals."""
        known = (labels >= 0).float().sum().clamp(min=1)
        right = (losses.logits[: len(labels)].argmax(1) == labels).float().sum() / known
        terms = [getattr(losses, term).detach().float() for term in TERMS]
        gamma = torch.as_tensor(losses.gamma, dtype=right.dtype, device=right.device)
        return cls(step, losses.has_saliency, torch.stack([*terms, right, gamma]))


@dataclass
class EpochSums:
    """Sums over the steps of an epoch: of terms, accuracy, gamma and time, and how many steps there were."""

    class_loss: float = 0.0
    invariance_loss: float = 0.0
    saliency_loss: float = 0.0
    total: float = 0.0
    accuracy: float = 0.0
    steps: float = 0.0
    salient_steps: float = 0.0
    seconds: float = 0.0
    gamma: float = 0.0

    def add(self, values: Iterable[float], *, salient: bool) -> None:
        """Add the values of a step, in the order of `StepTerms`."""
        for name, value in zip(_AVERAGED, values, strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.steps += 1
        self.salient_steps += salient

    def epoch_means(self) -> dict[str, float]:
        """Loss terms, accuracy and gamma of a step on average; the saliency loss over steps that had one."""
        steps = dict.fromkeys(("saliency_loss", "gamma"), max(self.salient_steps, 1.0))
        return {name: getattr(self, name) / steps.get(name, self.steps) for name in _AVERAGED}
