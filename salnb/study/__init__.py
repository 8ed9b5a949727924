"""Studies: grids of training runs, how they are run, and what they cost."""

from typing import TYPE_CHECKING

from salnb._common.lazy import lazy_names

if TYPE_CHECKING:
    from salnb.study.grids import STUDIES, Training, trainings
    from salnb.study.runner import run
    from salnb.study.scale import Scale, load_scale
    from salnb.study.values import read
    from salnb.study.weights import choose_gammas, match_weight

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
        "grids": ("STUDIES", "Training", "trainings"),
        "runner": ("run",),
        "scale": ("Scale", "load_scale"),
        "values": ("read",),
        "weights": ("choose_gammas", "match_weight"),
    },
)
