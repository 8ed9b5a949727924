"""The class term of the objective: the paper's cross-entropy (eq. 5), or a loss of the user's own."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from salnb._common.checks import at_least_float32, check_target_of_logits
from salnb.augment.mixing import both_targets
from salnb.losses import class_loss

__all__ = ["ClassTerm"]


class ClassTerm(nn.Module):
    """The class loss of originals and augmented images, and the targets that the maps explain.

    Args:
        own: a function or module from logits (2N, K) and targets to a scalar; None is
            `salnb.losses.class_loss`.
    """

    def __init__(self, own: Callable[[Tensor, Tensor], Tensor] | None = None):
        super().__init__()
        if own is not None and not callable(own):
            raise TypeError(f"class_loss must be a function of logits and targets, got {type(own).__name__}")
        if isinstance(own, type):
            raise TypeError(
                f"class_loss must be a function or module, got the class {own.__name__}: make one"
            )
        self.own: Any = own

    def targets(self, target: Tensor, new_target: Tensor, logits: Tensor) -> Tensor:
        """Those of both halves: (2N,) labels or (2N, K) weights."""
        targets = both_targets(target, new_target, logits.shape[1], check=self.own is None)
        if self.own is not None:
            check_target_of_logits(targets, logits)
        return targets

    def explained(self, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor | None]:
        """What the maps explain, and which of the N pairs have a label; None: all.

        A loss of the user's own may ignore labels, by a number that is no class, or find no label in a row:
        there is nothing to explain, and the score is zero.
        """
        if self.own is None:
            return targets, None
        if targets.ndim == 1:
            known = (targets >= 0) & (targets < num_classes)
            targets = F.one_hot(targets.where(known, 0).long(), num_classes) * known[:, None]
        first, second = targets.ne(0).any(1).chunk(2)
        return targets.to(at_least_float32(targets).dtype), first & second

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar."""
        if self.own is None:
            return class_loss(logits, targets)
        logits = at_least_float32(logits)
        loss = self.own(logits, targets.long() if targets.ndim == 1 else targets.to(logits.dtype))
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"class_loss must return a scalar (reduction='mean', say), got {got}")
        return loss
