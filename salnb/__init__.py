"""salnb: saliency map based data augmentation (arXiv 2205.14686) in PyTorch."""

from salnb import augment, data, losses, models, saliency
from salnb.objective import Losses, Objective

__version__ = "0.1.0"

__all__ = ["Losses", "Objective", "__version__", "augment", "data", "losses", "models", "saliency"]
