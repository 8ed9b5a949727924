"""`Objective(balance=…)`: the weight of the saliency term as a share of the class loss's gradient.

A constant weight is strongest when the network is untrained and next to nothing later, as the two gradients
shrink at different rates. Here the weight follows their lengths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from salnb._common.buffers import OwnBuffers

__all__ = ["EVERY", "Balance"]

# of the steps with a saliency term, the first and each tenth after it are measured: two gradients each
EVERY = 10
# what one measurement adds to the moving averages, which so look back over some fifty of these steps
_NEW = 0.2
# a term so weak that it would take more is rounding noise, as where both maps are equal
_HIGHEST = 1e4


class Balance(OwnBuffers):
    """The weight with which the saliency term's gradient has a share of the class loss's length.

    The lengths are those of the gradients of alpha · class loss and of the unweighted saliency loss with
    respect to all parameters of the model, of the same batch, and their moving averages are compared.

    Args:
        share: ρ, the length wanted of the weighted saliency term's gradient over that of the class loss.

    The averages are saved in the state of the objective. They stay float32 in `half()` and the like.
    """

    lengths: Tensor
    _keeps_dtype = True  # float16 would round and overflow the lengths

    def __init__(self, share: float):
        # of the class loss's and the saliency loss's gradient; zero: nothing has been measured
        super().__init__(lengths=[0.0, 0.0])
        self.lengths = self.lengths.float()  # whatever the default dtype is
        self.share = share

    @property
    def weight(self) -> Tensor:
        """The weight, a float32 scalar on the module's device.

        It is one before anything was measured, and zero where the first measurements were not finite.
        """
        classes, salience = self.lengths
        measured = salience > 0
        weight = self.share * classes / salience.where(measured, 1)
        return weight.where(measured, 1).clamp(max=_HIGHEST)

    def resume(self, lengths: Tensor) -> None:
        """Go on from lengths that were saved."""
        if self.lengths.is_meta:
            self.to_empty(device="cpu")
        self.lengths.copy_(lengths)

    def measure(
        self,
        classes: Tensor,
        salience: Tensor,
        parameters: Sequence[Tensor],
        processes: tuple[str, int] | None,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Take the lengths of a batch into the averages.

        Args:
            classes: the class loss, weighted.
            salience: the saliency loss, unweighted.
            parameters: of the model, those that are trained.
            processes: the name and number of those whose mean gradient is measured; None: this one's own.
            scale: what both losses are multiplied with while their gradients are taken, for float16.

        Both keep their graphs. What is not finite is left out; the returned boolean says whether it was not.
        """
        if not parameters:
            raise ValueError("balance compares gradients of parameters, and no parameter requires one")
        found = torch.stack([_length(loss * scale, parameters, processes) for loss in (classes, salience)])
        with torch.no_grad():
            found = found.to(self.lengths) / scale
            known, finite = (self.lengths > 0).all(), found.isfinite().all()
            averaged = torch.where(known, torch.lerp(self.lengths, found, _NEW), found)
            # a class loss of no length is no weight, until a measurement is finite
            before = self.lengths.where(known, torch.arange(2, dtype=torch.float32, device=found.device))
            self.lengths.copy_(torch.where(finite, averaged, before))
        return finite


def _length(loss: Tensor, parameters: Sequence[Tensor], processes: tuple[str, int] | None) -> Tensor:
    if not loss.requires_grad:
        return loss.new_zeros(())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        whole = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
        gradient = torch.cat([g.flatten().to(loss.dtype) for g in whole])
        if processes is not None:
            gradient = _mean_over(gradient, *processes)
        return gradient.norm()


def _mean_over(gradient: Tensor, group: Any, size: int) -> Tensor:
    """As `torch.distributed.all_reduce` does it, but as a function of tensors, which can be traced."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(gradient, "sum", group)) / size
