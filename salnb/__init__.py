"""salnb: saliency map based data augmentation (arXiv 2205.14686) in PyTorch."""

__version__ = "0.1.0"
