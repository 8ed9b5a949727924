"""salnb: saliency map based data augmentation (arXiv 2205.14686) in PyTorch."""

from salnb import data, models, saliency

__version__ = "0.1.0"

__all__ = ["__version__", "data", "models", "saliency"]
