"""Saliency methods: which pixels a network's decision depends on (Section 2 of the paper, eq. 1–4)."""

from salnb.saliency.methods import (
    METHODS,
    deconvnet,
    grad_cam,
    guided_backprop,
    guided_grad_cam,
    smoothgrad,
    vanilla_gradient,
)

__all__ = [
    "METHODS",
    "deconvnet",
    "grad_cam",
    "guided_backprop",
    "guided_grad_cam",
    "smoothgrad",
    "vanilla_gradient",
]
