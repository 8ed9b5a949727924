"""Studies: grids of training runs, how they are run, and what they cost."""

from typing import TYPE_CHECKING

from salnb._common.lazy import lazy_names

if TYPE_CHECKING:
    from salnb.study.grids import STUDIES, Scale, Training, load_scale, trainings
    from salnb.study.runner import choose_gammas, match_weight, read, run

__all__ = [
    "STUDIES",
    "Scale",
    "Training",
    "choose_gammas",
    "load_scale",
    "match_weight",
    "read",
    "run",
    "trainings",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "grids": ("STUDIES", "Scale", "Training", "load_scale", "trainings"),
        "runner": ("choose_gammas", "match_weight", "read", "run"),
    },
)
