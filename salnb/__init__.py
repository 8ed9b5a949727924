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
        trust,
    )
    from salnb._version import __version__
    from salnb.objective import Losses, Objective

__all__ = [
    "Losses",
    "Objective",
    "__version__",
    "augment",
    "data",
    "losses",
    "models",
    "results",
    "saliency",
    "statistics",
    "study",
    "timing",
    "train",
    "trust",
]

_MODULES = [name for name in __all__ if name.islower() and not name.startswith("_")]

__getattr__, __dir__ = lazy_names(
    __name__,
    {**dict.fromkeys(_MODULES, ()), "objective": ("Losses", "Objective"), "_version": ("__version__",)},
)
