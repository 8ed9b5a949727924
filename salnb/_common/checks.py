"""Checks of arguments; each error names the argument, what came and what is allowed."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from salnb._common.catalog import unknown as unknown


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
            f"{name} must be of a floating-point dtype, got {images.dtype}: scale integer images to "
            "[0, 1], as torchvision.transforms.v2.functional.to_dtype(images, torch.float32, scale=True) does"
        )
    if unit_range and not is_traced(images):
        low, high = (value.item() for value in images.detach().aminmax())
        rounding = 8 * torch.finfo(images.dtype).eps  # resampling ones may give one and a bit
        if not (low >= -rounding and high <= 1 + rounding):  # the negation catches NaN too
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: "
                "augment before normalising"
            )


def check_finite(values: Tensor, *, name: str) -> None:
    """Raise a ValueError if `values` holds a NaN or an infinity; not looked at while tracing.

    This waits for the device.
    """
    if is_traced(values):
        return
    bad = ~torch.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite values, the first at index {first}"
        )


def check_target(target: Tensor | int | None, n: int, num_classes: int) -> None:
    """Raise unless `target` gives each of `n` images a class or class weights (this waits for the device).

    The range of classes is not looked at while tracing.

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
        if weights or is_traced(target):
            return
        low, high = int(target.min()), int(target.max())
    else:
        low = high = target
    if low < 0 or high >= num_classes:
        raise ValueError(f"target must lie in 0 … {num_classes - 1}, got {low if low < 0 else high}")


def check_labels(target: Tensor, num_classes: int) -> None:
    """Raise a ValueError if `target` has labels (N,) outside 0 … `num_classes` - 1, or not K weights (N, K).

    Only looks at values on a CPU: a GPU would have to be waited for, and raises an error of its own.
    """
    if target.ndim == 2 and target.shape[1] != num_classes:
        raise ValueError(f"target weights must be ({len(target)}, {num_classes}), got {tuple(target.shape)}")
    if target.ndim != 1 or target.device.type != "cpu" or is_traced(target):
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"target must lie in 0 … {num_classes - 1}, got {low if low < 0 else high}")


def check_second_derivative(maps: Tensor) -> None:
    """Raise a RuntimeError if an operation that `maps` were computed with cannot be differentiated again.

    PyTorch would say so in the backward pass, in words that do not tell why; asked for the gradients of given
    tensors only, it may leave the operation's share out without a word.
    """
    seen, ahead = set(), [maps.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        if node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            try:
                node(*[None] * len(node._input_metadata))  # type: ignore[operator]
            except RuntimeError as error:
                raise RuntimeError(
                    "the saliency term differentiates the model twice, and one of its operations has no "
                    f"second derivative ({error}): replace the operation, or use gamma=0"
                ) from None
