"""Argument checks that more than one room needs: what came, what is allowed, by the argument's name."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor has no values to look at: under ``torch.compile``, ``make_fx``, or a fake tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_meta
    )


def check_images(images: Tensor, *, name: str = "images", unit_range: bool = False) -> None:
    """Check for a batch of float images ``(N, C, H, W)``.

    Args:
        images: what the caller gave.
        name: how the caller knows it.
        unit_range: also ask for values in [0, 1]; not looked at while tracing.

    Raises:
        TypeError: it is no tensor, or holds no floating point numbers.
        ValueError: its shape or its values are not allowed.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor (N, C, H, W), got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {images.dtype}: convert them, for example with "
            "torchvision.transforms.v2.functional.to_dtype(images, torch.float32, scale=True)"
        )
    if images.ndim != 4:
        raise ValueError(f"{name} must have four dimensions (N, C, H, W), got shape {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(images.shape)}")
    if unit_range and not is_traced(images):
        low, high = (value.item() for value in images.detach().aminmax())
        rounding = 8 * torch.finfo(images.dtype).eps  # resampling ones may give one and a bit
        if not (low >= -rounding and high <= 1 + rounding):  # the negation catches NaN too
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: "
                "augment before normalising"
            )
