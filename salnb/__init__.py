"""salnb: saliency map based data augmentation (arXiv 2205.14686) in PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

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
    from salnb.objective import Losses, Objective

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    # on first use only: torch takes seconds to load, and a mistyped option is answered before that
    if name not in __all__:
        raise AttributeError(f"module 'salnb' has no attribute {name!r}")
    if name in ("Losses", "Objective"):
        return getattr(importlib.import_module("salnb.objective"), name)
    return importlib.import_module(f"salnb.{name}")


def __dir__() -> list[str]:
    return __all__
