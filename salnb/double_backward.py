"""Fast, exact double backward for convolutional networks.

Equation 7 compares input gradients, so training with it differentiates twice: once with respect to the
images (``create_graph=True``), then once more with respect to the parameters. PyTorch's own second
derivatives are right but slow, for reasons that have nothing to do with arithmetic:

* the weight term of a convolution's double backward is computed as a forward convolution whose *kernel* is as
  large as the feature map. The same term is one ordinary weight gradient, with the cotangent of the input
  gradient in the place of the input (the cure of StyleGAN's ``conv2d_gradfix``);
* batch norm's double backward is some thirty elementwise passes, and has a closed form with five;
* ReLU and max pooling hand a tensor of zeros to their input, which then has to be added;
* concatenation cuts its gradient into slices, and the backward of each slice is a full-size tensor of zeros.

:func:`fast_double_backward` swaps these functions, while it is active, for ones whose backward is again a
function with a hand-written backward. The model is left alone: calls are caught on their way into PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

__all__ = ["fast_double_backward"]


class fast_double_backward(TorchFunctionMode):  # noqa: N801 (a context manager, used like torch.no_grad)
    """Context in which the functions of a convolutional network have a fast double backward.

    Only the forward pass has to run inside; what it recorded keeps the fast derivatives when
    ``autograd.grad`` and ``backward`` are called later. Values, first and second derivatives and running
    statistics are PyTorch's own; differentiating a third time raises ``RuntimeError``.

    Replaced are ``conv2d``, ``batch_norm``, ``relu``, ``max_pool2d`` and ``cat``, in every spelling (module,
    functional, method, in-place). Everything else goes on to PyTorch unchanged, as do calls that record no
    graph and inputs that are not batches of dense floating-point images or vectors. Another
    ``TorchFunctionMode`` with a rule of its own for ReLU comes first, in whichever order the two are entered.

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
        """Run the replacement of ``func`` where there is one, and ``func`` itself otherwise."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        # vmap and torch.func.grad ask more of a Function than those below offer: leave their calls alone
        if replacement and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------
# What the functions share


class _NoThirdDerivative(Function):
    """Hands ``result`` on, and refuses to be differentiated with respect to the ``sources`` it comes from."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "third derivatives are not available for what was computed inside fast_double_backward(): "
            "run the forward pass outside of it to differentiate three times"
        )


def _last(backward: Callable) -> Callable:
    """Wrap the backward of a backward: its results are exact, and refuse to be differentiated again.

    PyTorch's ``once_differentiable`` is not enough. Its refusal hangs on a leaf of its own, which
    ``autograd.grad`` does not visit on its way to the inputs: the missing term would go unnoticed.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(None if r is None else _NoThirdDerivative.apply(r, *sources) for r in results)

    return wrapper


def _wanted(ctx: Any, index: int) -> bool:
    """Whether the backward pass that is running needs the gradient of input number ``index``.

    ``ctx.needs_input_grad`` only knows that the input *could* have a gradient. The gradient with respect to
    the images does not need those of the weights, which would cost as much again, and the engine knows it.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:  # a leaf that autograd.grad was asked for, or an engine that does not plan ahead
        return True


def _plain(*tensors: Tensor | None) -> bool:
    """Whether all tensors (where given) are dense floating-point ones and one of them needs a gradient."""
    given = [t for t in tensors if t is not None]
    return all(
        isinstance(t, Tensor) and t.is_floating_point() and t.layout is torch.strided for t in given
    ) and any(t.requires_grad for t in given)


# ---------------------------------------------------------------------------------------------------------
# Convolution


class _Conv2d(Function):
    """``y = conv2d(x, w) + b``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: tuple) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return aten.convolution(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        mask = [_wanted(ctx, i) for i in range(3)]
        return *_Conv2dBackward.apply(gy, *ctx.saved_tensors, ctx.geometry, mask), None


class _Conv2dBackward(Function):
    """The gradients ``gx``, ``gw``, ``gb`` of a convolution, those of them that ``mask`` asks for.

    Each is linear in ``gy``; ``gx`` is linear in ``w`` and ``gw`` in ``x`` as well. So every second
    derivative is again a convolution or one of its gradients, with one argument replaced by a cotangent.
    """

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: tuple, mask: list[bool]) -> tuple:
        ctx.save_for_backward(gy, x, w)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return aten.convolution_backward(gy, x, w, [w.shape[0]], *geometry, mask)

    @staticmethod
    @_last
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple:
        gy, x, w = ctx.saved_tensors
        ggy = gx = gw = None
        if ctx.needs_input_grad[0]:
            if vx is not None:
                ggy = aten.convolution(vx, w, vb, *ctx.geometry)
            elif vb is not None:
                ggy = vb[:, None, None].expand_as(gy)
            if vw is not None:
                ggy = _add(ggy, aten.convolution(x, vw, None, *ctx.geometry))
        if vw is not None and _wanted(ctx, 1):
            gx = aten.convolution_backward(gy, x, vw, None, *ctx.geometry, [True, False, False])[0]
        if vx is not None and _wanted(ctx, 2):
            gw = aten.convolution_backward(gy, vx, w, None, *ctx.geometry, [False, True, False])[1]
        return ggy, gx, gw, None, None


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` on a batch."""
    if not _plain(input, weight, bias) or input.ndim != 4 or weight.ndim != 4:
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
    input, weight, bias = _autocast(input, weight, bias)
    return _Conv2d.apply(input, weight, bias, (stride, _pair(padding), dilation, False, [0, 0], groups))


def _autocast(*tensors: Any) -> tuple:
    """What autocast would do to a convolution's arguments, which it does no longer see; differentiable."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors)


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


# ---------------------------------------------------------------------------------------------------------
# Batch norm


class _BatchNorm(Function):
    """``y = (x - mean) / std * w + b`` per channel; in training, with the mean and std of this batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        if running_mean is None:
            y, mean, spread = aten._native_batch_norm_legit(x, w, b, training, momentum, eps)
        else:
            y, mean, spread = aten._native_batch_norm_legit(
                x, w, b, running_mean, running_var, training, momentum, eps
            )
            if not training:
                mean, spread = running_mean, running_var
        # spread is 1/std in training and the running variance otherwise, as the backward kernel wants it
        ctx.save_for_backward(x, w, mean, spread)
        ctx.training, ctx.eps = training, eps
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        mask = [_wanted(ctx, i) for i in range(3)]
        return *_BatchNormBackward.apply(gy, *ctx.saved_tensors, ctx.training, ctx.eps, mask), *[None] * 5


class _BatchNormBackward(Function):
    """The gradients ``gx``, ``gw``, ``gb`` of batch norm, those of them that ``mask`` asks for.

    Write ``x' = (x - mean) / std`` and ``<u>`` for the mean of u over a channel's n pixels. In training

        P(u) = u - <u> - x' <u x'>,    gx = w / std * P(gy),    gw = n <gy x'>,    gb = n <gy>.

    P is symmetric, so that the cotangent v of gx reaches gy as ``w / std * P(v)``, which is what the first
    backward's kernel computes. The derivatives through std and x' in gx add up to

        -w / std^2 * ( x' <v P(gy)> + <gy x'> P(v) + <v x'> P(gy) ),

    a sum of ``gy``, ``x``, ``w / std * P(v)`` and a constant, with one factor each per channel. In evaluation
    std is a constant and P the identity.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Tensor | None,
        mean: Tensor,
        spread: Tensor,
        training: bool,
        eps: float,
        mask: list[bool],
    ) -> tuple:
        # in training the sums gw and gb come for free with gx, and its derivatives need them
        sums = [training or wanted for wanted in mask[1:]]
        gx, gw, gb = _batch_norm_kernel(gy, x, w, mean, spread, training, eps, [mask[0], *sums])
        ctx.save_for_backward(gy, x, w, mean, spread, gw, gb)
        ctx.set_materialize_grads(False)
        ctx.training, ctx.eps = training, eps
        return gx, gw if mask[1] else None, gb if mask[2] else None

    @staticmethod
    @_last
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> tuple:
        gy, x, w, mean, spread, gw, gb = ctx.saved_tensors
        training, eps = ctx.training, ctx.eps
        n = x.numel() // x.shape[1]
        r = spread if training else (spread + eps).rsqrt()  # 1/std
        wr = r if w is None else r * w

        def wide(u: Tensor) -> Tensor:
            return u.view(1, -1, *[1] * (x.ndim - 2))

        ggy = ggv = ggw = None
        # ggx = c_y * (gy - <gy>) + c_x * (x - mean) + c_v * ggv in training, c_y * gy otherwise
        c_y = c_x = torch.zeros_like(r)
        if vx is not None:
            ggv, v_x, v_1 = _batch_norm_kernel(
                vx, x, w, mean, spread, training, eps, [True, training, training]
            )
            ggy = ggv
            v_gy = (vx * gy.to(r.dtype)).sum([0, *range(2, x.ndim)])
            if training:
                v_gy = v_gy - (v_1 * gb + v_x * gw) / n  # from the sum of v * gy to that of v * P(gy)
                c_y = -wr * r * v_x / n
                c_x = -wr * r * r * (v_gy - v_x * gw / n) / n
            ggw = None if w is None else r * v_gy
        if vw is not None:
            ggy = _add(ggy, (x - wide(mean)) * wide(r * vw))
            c_y = c_y + r * vw
            if training:
                c_x = c_x - r * r * vw * gw / n
        if vb is not None:
            ggy = _add(ggy, wide(vb).expand_as(gy))

        ggx = None
        if training and ctx.needs_input_grad[1] and (vx is not None or vw is not None):
            ggx = (x * wide(c_x)).addcmul_(gy, wide(c_y))
            if ggv is not None:
                ggx.addcmul_(ggv, wide(-r * gw / n))
            ggx.sub_(wide(c_x * mean + c_y * gb / n))
        elif vw is not None:
            ggx = gy * wide(c_y)
        return ggy, ggx, ggw, *[None] * 5


def _batch_norm_kernel(
    gy: Tensor,
    x: Tensor,
    w: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    training: bool,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's first backward of batch norm: ``gx``, ``gw``, ``gb``."""
    batch, running = ((mean, spread), (None, None)) if training else ((None, None), (mean, spread))
    return aten.native_batch_norm_backward(gy, x, w, *running, *batch, training, eps, mask)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` of images ``(N, C, H, W)`` and vectors ``(N, C)``."""
    if not _plain(input, weight, bias) or input.ndim not in (2, 4):
        return NotImplemented
    if input.numel() == input.shape[1] if training else running_mean is None:
        return NotImplemented  # for PyTorch's own error
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, training, momentum, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """:func:`torch.batch_norm`, which has the same arguments in another order."""
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


# ---------------------------------------------------------------------------------------------------------
# ReLU, max pooling, concatenation: linear in their gradient, so that the cotangent simply goes forwards


class _ReLU(Function):
    """``y = max(x, 0)``, in place or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        return _ReLUBackward.apply(gy, ctx.saved_tensors[0].detach()), None


class _ReLUBackward(Function):
    """``gx = gy`` where ``y > 0``."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return aten.threshold_backward(gy, y, 0)

    @staticmethod
    @_last
    def backward(ctx: Any, vx: Tensor) -> tuple:
        return aten.threshold_backward(vx, *ctx.saved_tensors, 0), None


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.relu`."""
    # another mode, entered before this one, may have a rule of its own for ReLU's gradient: it goes first
    if not _plain(input) or torch._C._len_torch_function_stack() or (inplace and input._is_view()):
        return NotImplemented
    return _ReLU.apply(input, inplace)


class _MaxPool2d(Function):
    """``y``, the largest ``x`` of each window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple) -> Tensor:
        y, indices = aten.max_pool2d_with_indices(x, *window)
        ctx.save_for_backward(x, indices)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        x, indices = ctx.saved_tensors
        return _MaxPool2dBackward.apply(gy, x.detach(), indices, ctx.window), None


class _MaxPool2dBackward(Function):
    """``gx``, the sum of ``gy`` over the windows whose maximum a pixel is."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, indices: Tensor, window: tuple) -> Tensor:
        ctx.save_for_backward(indices)
        return aten.max_pool2d_with_indices_backward(gy, x, *window, indices)

    @staticmethod
    @_last
    def backward(ctx: Any, vx: Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        ggy = vx.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)
        return ggy, None, None, None


def _max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d`."""
    if not _plain(input) or input.ndim != 4 or return_indices:
        return NotImplemented
    kernel = _pair(kernel_size)
    window = (kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode)
    return _MaxPool2d.apply(input, window)


class _Cat(Function):
    """The tensors one behind the other."""

    @staticmethod
    def forward(ctx: Any, dim: int, *tensors: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [t.shape[dim] for t in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        return None, *_Split.apply(gy, ctx.sizes, ctx.dim)


class _Split(Function):
    """The parts of a concatenated gradient."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, sizes: list[int], dim: int) -> tuple:
        ctx.dim = dim
        return tuple(part.contiguous() for part in gy.split(sizes, dim))

    @staticmethod
    @_last
    def backward(ctx: Any, *parts: Tensor) -> tuple:
        return torch.cat(parts, ctx.dim), None, None


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """:func:`torch.cat` of tensors of one type."""
    if not tensors or not _plain(*tensors) or len({t.dtype for t in tensors}) > 1:
        return NotImplemented
    return _Cat.apply(dim, *tensors)


_REPLACEMENTS: dict[Callable, Callable] = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), functools.partial(_relu, inplace=True)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
}
