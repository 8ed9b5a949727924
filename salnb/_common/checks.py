"""Checks of arguments, each of whose errors names the argument, what came and what is allowed; dtypes."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from salnb._common.catalog import did_you_mean as did_you_mean
from salnb._common.catalog import unknown as unknown
from salnb._common.limits import check_integer


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor has no values to look at: while a graph is recorded, on "meta", or under `vmap`.

    A tensor of any other subclass has, and so it has under a dispatch mode that only watches.
    """
    return (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None  # make_fx, also where it records real tensors
        or isinstance(tensor, FakeTensor | FunctionalTensor)
        or tensor.is_meta
        or torch._is_functional_tensor(tensor)
        or is_batched(tensor)
    )


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor (N, C, H, W) lies in memory as (N, H, W, C), and not as (N, C, H, W) besides."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor is one of `vmap`, alone or with other transforms of `torch.func` around it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def plain(tensor: Tensor) -> Tensor:
    """The tensor as one of no subclass, which autograd may save; itself where it is that already.

    Subclasses that only add methods or metadata (those of `torchvision.tv_tensors`, a user's own) would come
    back from some operations and not from others; those that dispatch on their own are left alone. What was
    made in inference mode is copied outside of it.
    """
    if torch.compiler.is_compiling():
        return tensor
    if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        tensor = tensor.as_subclass(Tensor)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()
    return tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or float32 of what is less: squares and sums of half precision overflow soon."""
    return tensor.to(at_least_float32_dtype(tensor.dtype))


def at_least_float32_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 for what is less."""
    return torch.promote_types(dtype, torch.float32)


def check_images(images: Tensor, *, name: str = "images", unit_range: bool = False) -> Tensor:
    """The `images` as a `plain` tensor, if they are a floating-point (N, C, H, W) with at least one sample.

    Args:
        images: what the caller gave.
        name: how the caller knows it.
        unit_range: also ask for values in [0, 1]. Only looked at on a CPU, as a GPU would have to be waited
            for, and not while tracing.

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
    if unit_range and images.device.type == "cpu" and not is_traced(images):
        low, high = (value.item() for value in images.detach().aminmax())
        rounding = 8 * torch.finfo(images.dtype).eps  # resampling ones may give one and a bit
        if not (low >= -rounding and high <= 1 + rounding):  # the negation catches NaN too
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}: "
                "augment before normalising"
            )
    return plain(images)


def check_tensors(given: Mapping[str, Any]) -> None:
    """Raise a TypeError that names the first of these that is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_samples(name: str, given: Any, maps: Tensor) -> None:
    """Raise a TypeError or ValueError unless this is None, or says for which samples of the maps count."""
    if given is not None:
        check_tensors({name: given})
        n = len(maps)
        if given.dtype is not torch.bool or given.shape != (n,):
            raise ValueError(f"{name} must be bool of ({n},), got {tuple(given.shape)} of {given.dtype}")
        check_device(name, given, "maps", maps)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on {other.device}, as {other_name} are, got {tensor.device}: "
            f"use {name}.to({str(other.device)!r})"
        )


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless both tensors have one shape, on one device."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, other_name, other)


def check_generator(generator: Any) -> None:
    """Raise a TypeError unless this is a generator of torch or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")


def check_mask(name: str, mask: Tensor, images: Tensor, other_name: str = "images") -> None:
    """Raise a TypeError or a ValueError unless this is a mask (N, 1, H, W) for such images or maps."""
    shape = (len(images), 1, *images.shape[-2:])
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of booleans {shape}, got {type(mask).__name__}")
    if mask.dtype is not torch.bool or mask.shape != shape:
        raise ValueError(f"{name} must be bool of {shape}, got {tuple(mask.shape)} of {mask.dtype}")
    check_device(name, mask, other_name, images)


def check_finite(values: Tensor, *, name: str) -> None:
    """Raise a ValueError if `values` holds a NaN or an infinity; not looked at while tracing.

    This waits for the device.
    """
    # one pass over the values: their sum is finite if all are, unless it overflows
    if is_traced(values) or torch.isfinite(values.sum()):
        return
    bad = ~torch.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite values, the first at index {first}"
        )


def check_no_transform() -> None:
    """Raise a RuntimeError inside `torch.vmap` or another transform of `torch.func`."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.vmap and the other transforms of torch.func do not work here, where values are looked at "
            "and gradients are taken: call this outside of them, with the whole batch"
        )


def as_target(target: Any, n: int) -> Any:
    """A target of n images with its integer-likes (NumPy's, tensors without dimensions) made usable.

    What was made in inference mode is copied, as it can take part in no graph. A number on the CPU goes with
    images on any device.
    """
    if not isinstance(target, Tensor):
        # NumPy 1 takes its truth values, `bool_`, for indices
        truth = type(target).__name__ in ("bool", "bool_")
        whole = hasattr(target, "__index__") and not truth and not getattr(target, "ndim", 0)
        return operator.index(target) if whole else target
    target = target.clone() if target.is_inference() else target
    if target.ndim or not _is_integer(target):
        return target
    return target.expand(n) if target.device.type != "cpu" or is_traced(target) else int(target)


def as_labels(target: Tensor) -> Tensor:
    """The target itself, or int64 of unsigned integers, with most of which PyTorch does not compute."""
    return target.long() if target.dtype in (torch.uint16, torch.uint32, torch.uint64) else target


def check_target(target: Tensor | int | None, logits: Tensor) -> None:
    """Raise unless `target` gives each row of `logits` (N, K) a class or weights (this waits for the device).

    The range of classes is not looked at while tracing.

    Raises:
        TypeError: neither None, an int, an integer tensor nor a floating-point tensor of weights.
        ValueError: a class outside 0 … K - 1, a shape other than (N,) or (N, K), or another device.
    """
    n, num_classes = logits.shape
    if target is None:
        return
    if isinstance(target, bool) or not isinstance(target, int | Tensor):
        raise TypeError(f"target must be None, an int or a tensor, got {type(target).__name__}")
    if not isinstance(target, Tensor):
        _check_classes(target, target, num_classes)
        return
    shape, weights = tuple(target.shape), target.is_floating_point()
    if weights and shape != (n, num_classes):
        raise ValueError(f"target weights must have shape ({n}, {num_classes}), (N, K), got {shape}")
    if not weights and not _is_integer(target):
        raise TypeError(f"target must hold integer classes or floating-point weights, got {target.dtype}")
    if not weights and shape != (n,):
        raise ValueError(f"target must have shape ({n},), one class per image, got {shape}")
    check_device("target", target, "the model's logits", logits)
    if not weights and not is_traced(target):
        _check_classes(*_ends(target), num_classes)


def check_labels(target: Tensor, num_classes: int) -> None:
    """Raise a ValueError if `target` has labels (N,) outside 0 … `num_classes` - 1, or not K weights (N, K).

    Only looks at values on a CPU: a GPU would have to be waited for, and raises an error of its own.
    """
    if target.ndim == 2 and target.shape[1] != num_classes:
        raise ValueError(f"target weights must be ({len(target)}, {num_classes}), got {tuple(target.shape)}")
    check_normalized(target)
    if target.ndim == 1 and target.device.type == "cpu" and not is_traced(target):
        _check_classes(*_ends(target), num_classes)


def check_normalized(target: Tensor, *, wait: bool = False) -> None:
    """Raise a ValueError if `target` has weights (N, K) whose rows are no distributions over the classes.

    Only looks at values on a CPU, or if it may `wait` for the device, and not while tracing.
    """
    if target.ndim != 2 or is_traced(target) or not (wait or target.device.type == "cpu"):
        return
    if torch._C._are_functorch_transforms_active():
        return
    target = target.detach()
    sums = target.sum(1, dtype=torch.promote_types(target.dtype, torch.float32))
    rounding = 1e-3 + (4 * torch.finfo(target.dtype).eps if target.is_floating_point() else 0)
    # the negations catch NaN too
    bad = ~((sums - 1).abs() <= rounding) | ~(target >= -rounding).all(1)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            "target weights (N, K) must be at least 0 and sum to one in each row, got a sum of "
            f"{sums[i].item():.4g} and a least weight of {target[i].min().item():.4g} in row {i}: the class "
            "loss is a softmax cross-entropy, for which several labels of one image share their weight"
        )


def check_several_classes(logits: Tensor, *, name: str) -> None:
    """Raise a ValueError if `logits` (N, K) have one class only."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"{name} logits of two classes or more, got {tuple(logits.shape)}, whose softmax is one whatever "
            "the image: make two of a logit z, torch.cat([torch.zeros_like(z), z], 1), and integer labels 0 "
            "and 1 of the target"
        )


def check_training_target(target: Tensor, n: int) -> None:
    """Raise unless `target` has labels (n,) or class weights (n, K); how many classes is not yet known.

    Raises:
        TypeError: labels that are not integers, or complex weights.
        ValueError: not a tensor of such a shape.
    """
    if not isinstance(target, Tensor) or target.ndim not in (1, 2) or len(target) != n:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target must be a tensor ({n},) or ({n}, K), got {got}")
    if target.ndim == 1 and not _is_integer(target):
        raise TypeError(f"target of shape (N,) must hold integer labels, got {target.dtype}")
    if target.is_complex():
        raise TypeError(f"target of shape (N, K) must hold weights of classes, got {target.dtype}")


def check_target_of_logits(target: Tensor, logits: Tensor) -> None:
    """Raise a ValueError unless `target` has labels (N,) or weights (N, K) for `logits` (N, K)."""
    if target.shape != logits.shape and not (target.shape == logits.shape[:1] and _is_integer(target)):
        raise ValueError(
            f"target must be integer labels (N,) or weights (N, K) for logits {tuple(logits.shape)}, "
            f"got {tuple(target.shape)} of {target.dtype}"
        )
    check_device("target", target, "logits", logits)


def check_labels_to_mix(target: Tensor, num_classes: int | None) -> int:
    """K, unless `target` does not have labels (N,) or weights (N, K) to mix.

    Only looks at labels on a CPU: a GPU would have to be waited for.

    Raises:
        TypeError: labels, or `num_classes`, that are not integers.
        ValueError: no number of classes to make weights of, or labels or weights that do not agree with it.
    """
    if num_classes is not None and not isinstance(num_classes, torch.SymInt):
        num_classes = check_integer("num_classes", num_classes, 1, 2**31)
    if target.ndim == 2 and not target.is_complex():
        if num_classes not in (None, target.shape[1]):
            raise ValueError(f"target has {target.shape[1]} class weights, but num_classes is {num_classes}")
        return target.shape[1]
    if target.ndim != 1 or not _is_integer(target):
        raise TypeError(
            "target must be integer labels (N,) or class weights (N, K), "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if num_classes is None:
        raise ValueError("num_classes must be given where integer labels are mixed, got None")
    if target.device.type == "cpu" and not is_traced(target):
        low, high = _ends(target)
        if low < 0 or high >= num_classes:
            raise ValueError(f"target must hold labels from 0 to {num_classes - 1}, got {low} to {high}")
    return num_classes


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _ends(labels: Tensor) -> tuple[int, int]:
    low, high = as_labels(labels).aminmax()
    return int(low), int(high)


def _check_classes(low: int, high: int, num_classes: int) -> None:
    if low < 0 or high >= num_classes:
        raise ValueError(f"target must lie in 0 … {num_classes - 1}, got {low if low < 0 else high}")
