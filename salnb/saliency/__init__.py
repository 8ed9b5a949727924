"""Saliency methods: which pixels a network's decision depends on (Section 2 of the paper, eq. 1–4)."""

from salnb.saliency.methods import *  # noqa: F403
from salnb.saliency.methods import __all__ as __all__
