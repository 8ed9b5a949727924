"""salnb: saliency map based data augmentation (arXiv 2205.14686) in PyTorch."""

from typing import TYPE_CHECKING

from salnb._common.lazy import lazy_names

if TYPE_CHECKING:
    from salnb import (
        augment,
        data,
        losses,
        models,
        results,
        saliency,
        statistics,
        study,
        timing,
        train,
        trained,
        trust,
    )
    from salnb._version import __version__
    from salnb.objective import Losses, Objective
    from salnb.trained import load

__all__ = [
    "Losses",
    "Objective",
    "__version__",
    "augment",
    "data",
    "load",
    "losses",
    "models",
    "results",
    "saliency",
    "statistics",
    "study",
    "timing",
    "train",
    "trained",
    "trust",
]

_MODULES = [name for name in __all__ if name.islower() and not name.startswith("_") and name != "load"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(_MODULES, ()),
        "objective": ("Losses", "Objective"),
        "trained": ("trained", "load"),
        "_version": ("__version__",),
    },
)
