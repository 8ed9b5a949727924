"""Fast, exact double backward for convolutional networks.

Training with eq. 7, which compares gradients with respect to the images, differentiates twice: once with
respect to the images (`create_graph=True`), then once more with respect to the parameters. PyTorch's own
second derivatives are right but slow, for reasons that have nothing to do with arithmetic:

* the weight term of a convolution's double backward is computed as a forward convolution whose *kernel* is as
  large as the feature map. The same term is one ordinary weight gradient, with the cotangent of the input
  gradient in the place of the input (the cure of StyleGAN's `conv2d_gradfix`);
* batch norm's double backward is some thirty elementwise passes, and has a closed form with five;
* a linear layer's two weight gradients are added in a third tensor (0.4 GB in VGG-16), not in place;
* ReLU and pooling hand a tensor of zeros to their input, which then has to be added;
* concatenation cuts its gradient into slices, and the backward of each slice is a full-size tensor of zeros.

`fast_double_backward` swaps these functions, while it is active, for ones whose backward is again a
function with a hand-written backward. The model is left alone: calls are caught on their way into PyTorch.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack

from salnb.double_backward import fused
from salnb.double_backward.functions import (
    Affine,
    AvgPool2d,
    BatchNorm,
    Cat,
    Convolution,
    MatrixProduct,
    MaxPool2d,
    ReLU,
)
from salnb.double_backward.recomputation import RecomputedMode, again_in_recomputation

Maybe = Tensor | None
Size = int | Sequence[int]

_PLAIN_KINDS = (Tensor, torch.nn.Parameter)


__all__ = [
    "as_written",
    "differentiable_twice",
    "fast_double_backward",
    "second_derivatives_of_pytorch",
    "switches",
]


class fast_double_backward(RecomputedMode):  # noqa: N801 (a context manager, used like torch.no_grad)
    """Context in which the functions of a convolutional network have a fast double backward.

    Only the forward pass has to run inside; what it recorded keeps the fast derivatives when
    `autograd.grad` and `backward` are called later. Values, first and second derivatives and running
    statistics are PyTorch's own; differentiating a third time raises `RuntimeError`.

    Replaced are `conv2d`, `linear`, `batch_norm`, `relu`, `max_pool2d`, `avg_pool2d` and `cat`, in every
    spelling (module, functional, method, in-place), and `hardsigmoid`, which PyTorch cannot differentiate
    twice at all. Everything else goes on to PyTorch unchanged, as do calls that record no graph, inputs
    that are not batches of dense floating-point images or vectors, and tensors whose class has a
    `__torch_function__` of its own. Another `TorchFunctionMode` sees all calls, in whichever order the two
    are entered: what it would miss behind a replacement is not replaced. What is recomputed in a backward
    pass (`torch.utils.checkpoint` with `use_reentrant=False`) runs inside again.

    Example:
        >>> import torch
        >>> from salnb.double_backward import fast_double_backward
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> images = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> with fast_double_backward():
        ...     score = model(images).sum()
        >>> (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        >>> gradient.square().sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([4, 3, 3, 3])
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the replacement of `func` where there is one, and `func` itself otherwise."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        # vmap and torch.func.grad ask more of a Function than those below offer: leave their calls alone
        if (
            replacement
            and torch.is_grad_enabled()
            and not torch._C._are_functorch_transforms_active()
            and not _is_watched()
        ):
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class _Shared:
    """A context that sets switches of the whole process: entered by the first thread, left by the last."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self.make, self.lock, self.inside = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                # PyTorch keeps part of it in context variables, which are a thread's own
                self.variables, self.context = contextvars.copy_context(), self.make()
                self.variables.run(self.context.__enter__)
            self.inside += 1

    def __exit__(self, *exc_info: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.variables.run(self.context.__exit__, None, None, None)


_fast = True


@contextmanager
def second_derivatives_of_pytorch() -> Iterator[None]:
    """Context in which second derivatives are PyTorch's: slower, and differentiable any number of times.

    It acts on all threads, and on `fast_double_backward`, `salnb.Objective` and saliency maps alike.
    """
    global _fast
    before, _fast = _fast, False
    try:
        yield
    finally:
        _fast = before


def switches() -> tuple[bool, bool | None]:
    """What a step's operators depend on: whether derivatives are fast, and those of batch norm fused."""
    return _fast, fused.setting()


_eager = _Shared(lambda: torch.compiler.set_stance("force_eager"))
_plain_attention = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Fast second derivatives, and neither compiled modules nor fused attention kernels, which have none."""
    with (
        _with_second_derivatives(),
        fast_double_backward() if _fast else nullcontext(),
        again_in_recomputation(lambda: _with_second_derivatives),
    ):
        yield


@contextmanager
def _with_second_derivatives() -> Iterator[None]:
    with as_written(), _plain_attention:
        yield


def as_written() -> AbstractContextManager[None]:
    """Compiled modules hide their ReLUs and refuse a second derivative: run them uncompiled."""
    # setting the stance imports the compiler, which takes seconds and is needless where nothing was compiled
    return _eager if "torch._dynamo" in sys.modules else nullcontext()


def _is_watched() -> bool:
    """Whether a mode of the user's, entered before this one, waits for the calls that are not replaced."""
    if not torch._C._len_torch_function_stack():
        return False
    modes = _get_current_function_mode_stack()  # that of the default device and of the tracers are PyTorch's
    return any(type(mode).__module__.split(".")[0] not in ("salnb", "torch") for mode in modes)


def _plain(*tensors: Maybe) -> bool:
    """Whether all tensors (where given) are dense floating-point ones and one of them needs a gradient."""
    given = [t for t in tensors if t is not None]
    return all(
        isinstance(t, Tensor)
        and t.is_floating_point()
        and t.layout is torch.strided
        and (type(t) in _PLAIN_KINDS or _leaves_functions_alone(type(t)))
        for t in given
    ) and any(t.requires_grad for t in given)


def _leaves_functions_alone(kind: Any) -> bool:
    """Whether a kind of tensor neither changes what functions do nor the kind of what they return."""
    return kind.__torch_function__ is torch._C._disabled_torch_function_impl


def _mixed(input: Tensor, weight: Tensor) -> bool:
    """Whether these do not go together, which PyTorch says best."""
    return input.dtype is not weight.dtype and not torch.is_autocast_enabled(input.device.type)


def _autocast(*tensors: Any) -> tuple:
    """What autocast would do to the arguments, in a call that it no longer sees; differentiable."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors)


def _pair(value: Size) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Maybe = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` on a batch."""
    if not _plain(input, weight, bias) or input.ndim != 4 or weight.ndim != 4 or _mixed(input, weight):
        return NotImplemented
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        if padding == "same" and stride == [1, 1]:
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):  # as in PyTorch, the right and lower edges get the larger half
                input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
            padding = [t // 2 for t in total]
        elif padding == "valid":
            padding = 0
        else:
            return NotImplemented
    rule = Convolution(stride, _pair(padding), dilation, False, [0, 0], groups)
    return Affine.apply(*_autocast(input, weight, bias), rule)


def _linear(input: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
    """`torch.nn.functional.linear` of vectors `(N, C)`."""
    if not _plain(input, weight, bias) or input.ndim != 2 or weight.ndim != 2 or _mixed(input, weight):
        return NotImplemented
    return Affine.apply(*_autocast(input, weight, bias), MatrixProduct())


def _batch_norm(
    input: Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of images `(N, C, H, W)` and vectors `(N, C)`."""
    if not _plain(input, weight, bias) or input.ndim not in (2, 4) or not input.numel():
        return NotImplemented
    if input.numel() == input.shape[1] if training else running_mean is None:
        return NotImplemented  # for PyTorch's own error
    return BatchNorm.apply(input, weight, bias, (running_mean, running_var), training, momentum, eps)[0]


def _torch_batch_norm(
    input: Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """`torch.batch_norm`, which has the same arguments in another order."""
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`."""
    # another mode, entered before this one, may have a rule of its own for ReLU's gradient: it goes first
    if not _plain(input) or torch._C._len_torch_function_stack() or (inplace and input._is_view()):
        return NotImplemented
    return ReLU.apply(input, inplace)


def _max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """`torch.nn.functional.max_pool2d`."""
    if not _plain(input) or input.ndim != 4 or return_indices:
        return NotImplemented
    kernel = _pair(kernel_size)
    window = (kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode)
    return MaxPool2d.apply(input, window)


def _avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d`."""
    if not _plain(input) or input.ndim != 4:
        return NotImplemented
    kernel = _pair(kernel_size)
    sizes = kernel, _pair(stride) if stride else kernel, _pair(padding)
    return AvgPool2d.apply(input, (*sizes, ceil_mode, count_include_pad, divisor_override))


def _cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    """`torch.cat` of tensors of one type."""
    if options or not _plain(*tensors) or len({(t.dtype, t.ndim) for t in tensors}) > 1:
        return NotImplemented
    return Cat.apply(dim, *tensors)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardsigmoid`, of which PyTorch has no second derivative."""
    if not _plain(input):
        return NotImplemented
    # not relu6(input + 3) / 6, which would look like a ReLU
    result = (F.hardtanh(input.clone() if inplace else input, -3, 3) + 3) / 6
    return input.copy_(result) if inplace else result


_REPLACEMENTS: dict[Callable, Callable] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.hardsigmoid: _hardsigmoid,
    torch.batch_norm: _torch_batch_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), functools.partial(_relu, inplace=True)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    F.avg_pool2d: _avg_pool2d,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
}
