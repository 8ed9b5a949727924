"""Images without labels: where the network is confident, its own class takes the label's place.

For the saliency term, whose maps are of some class, and for a consistency of predictions to compare it with
(FixMatch: Sohn et al., 2020, arXiv 2001.07685).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from salnb._common.checks import at_least_float32

__all__ = ["OwnClasses", "class_and_consistency", "own_classes"]


class OwnClasses(NamedTuple):
    """What a batch with unlabelled images is trained on.

    Attributes:
        target: (N,), the label, or the class of the network's own where there is none.
        labelled: (N,), bool.
        confident: (N,), bool: unlabelled, and the network's probability of its class is high enough.
    """

    target: Tensor
    labelled: Tensor
    confident: Tensor

    @property
    def known(self) -> Tensor:
        """(N,), bool: there is a class whose maps can be compared."""
        return self.labelled | self.confident


def own_classes(logits: Tensor, target: Tensor, confidence: float) -> OwnClasses:
    """Give each image a class.

    Args:
        logits: of the originals, (N, K).
        target: (N,) labels; -1 marks an image without one.
        confidence: the least probability with which the network's own class counts.

    Raises:
        ValueError: the target holds weights of classes: images whose labels are mixed must have some.
    """
    if target.ndim != 1:
        raise ValueError(f"target must be labels (N,) with confidence > 0, got weights {tuple(target.shape)}")
    probability, own = at_least_float32(logits).softmax(1).max(1)
    labelled = target >= 0
    return OwnClasses(target.where(labelled, own), labelled, ~labelled & (probability >= confidence))


def class_and_consistency(logits: Tensor, own: OwnClasses) -> tuple[Tensor, Tensor]:
    """The class loss (eq. 5) of labelled images, and the consistency of predictions of the others.

    Args:
        logits: of originals and augmented images, (2N, K).
        own: the classes of the originals.

    Returns:
        The mean cross-entropy of both halves of the labelled images, zero if there is none; and that of the
        augmented ones of the confident images, summed and divided by the number of unlabelled ones.
    """
    each = F.cross_entropy(at_least_float32(logits), own.target.repeat(2), reduction="none").view(2, -1)
    labelled, confident = own.labelled.to(each.dtype), own.confident.to(each.dtype)
    classes = (each.mean(0) * labelled).sum() / labelled.sum().clamp(min=1)
    consistency = (each[1] * confident).sum() / (1 - labelled).sum().clamp(min=1)
    return classes, consistency
