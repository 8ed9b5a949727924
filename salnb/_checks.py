"""Checks of arguments; each error names the argument, what came and what is allowed."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor has no values to look at: under `torch.compile`, `make_fx`, or a fake tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_meta
    )


def check_images(images: Tensor, *, name: str = "images", unit_range: bool = False) -> None:
    """Raise unless `images` is a floating-point (N, C, H, W) tensor with at least one sample.

    Args:
        images: what the caller gave.
        name: how the caller knows it.
        unit_range: also ask for values in [0, 1]; not looked at while tracing.

    Raises:
        TypeError: not a tensor, or not of a floating-point dtype.
        ValueError: not four-dimensional, empty, or out of range.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (N, C, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"{name} must have four dimensions, (N, C, H, W), none of them zero, got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"{name} must be of a floating-point dtype, got {images.dtype}: scale integer images to [0, 1], for "
            "example with torchvision.transforms.v2.functional.to_dtype(images, torch.float32, scale=True)"
        )
    if unit_range and not is_traced(images):
        low, high = (value.item() for value in images.detach().aminmax())
        rounding = 8 * torch.finfo(images.dtype).eps  # resampling ones may give one and a bit
        if not (low >= -rounding and high <= 1 + rounding):  # the negation catches NaN too
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: augment before normalising"
            )


def check_finite(values: Tensor, *, name: str) -> None:
    """Raise a ValueError if `values` holds a NaN or an infinity (this waits for the device)."""
    bad = ~torch.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite values, the first at index {first}"
        )


def check_target(target: Tensor | int | None, n: int, num_classes: int) -> None:
    """Raise unless `target` gives each of `n` images a class or class weights (this waits for the device).

    Raises:
        TypeError: neither None, an int, an integer tensor nor a floating-point tensor of weights.
        ValueError: a class outside 0 … `num_classes` - 1, or a shape other than (n,) or (n, num_classes).
    """
    if target is None:
        return
    if isinstance(target, bool) or not isinstance(target, int | Tensor):
        raise TypeError(f"target must be None, an int or a tensor, got {type(target).__name__}")
    if isinstance(target, Tensor):
        shape, weights = tuple(target.shape), target.is_floating_point()
        if weights and shape != (n, num_classes):
            raise ValueError(f"target weights must have shape ({n}, {num_classes}), (N, K), got {shape}")
        if not weights and (target.dtype == torch.bool or target.is_complex()):
            raise TypeError(f"target must hold integer classes or floating-point weights, got {target.dtype}")
        if not weights and shape != (n,):
            raise ValueError(f"target must have shape ({n},), one class per image, got {shape}")
        if weights:
            return
        low, high = int(target.min()), int(target.max())
    else:
        low = high = target
    if low < 0 or high >= num_classes:
        raise ValueError(f"target must lie in 0 … {num_classes - 1}, got {low if low < 0 else high}")
