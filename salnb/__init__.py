"""salnb: saliency map based data augmentation (arXiv 2205.14686) in PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salnb import data, models, results, saliency, train

__version__ = "0.1.0"

__all__ = ["__version__", "data", "models", "results", "saliency", "train"]


def __getattr__(name: str) -> Any:
    # on first use only: torch takes seconds to load, and a mistyped option should be answered before that
    if name in __all__:
        return importlib.import_module(f"salnb.{name}")
    raise AttributeError(f"module 'salnb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
