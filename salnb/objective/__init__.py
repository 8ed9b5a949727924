"""The whole objective (Section 4 of the paper, eq. 8): class, invariance and saliency loss of a model."""

from salnb.objective.objective import Objective
from salnb.objective.terms import Losses

__all__ = ["Losses", "Objective"]
