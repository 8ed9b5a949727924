"""The spellings of a rectifier in PyTorch: which calls compute min(max(x, 0), upper)."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from salnb.saliency.relu_masks import (
    UnknownError,
    functions_named,
    is_sign,
    is_zero,
    mask_of_picks,
    negative_part,
)

__all__ = ["EACH", "SPELLINGS", "ReLUCall"]


class ReLUCall(NamedTuple):
    """A call that rectifies its input.

    Attributes:
        input: x.
        upper: the upper bound; None is infinity.
        in_place: whether a tensor is overwritten, which is the input or `into`.
        into: a tensor that the result is written to instead of the input: the mask of `mask *= x`.
        zero: what has to be zero, if it may be: a number, or a tensor, whose values are looked at last.
        cap: a tensor with a gradient of its own that bounds the result, which the rules leave alone.
        plain: the same, not in place, for the spellings whose derivative on the bounds depends on the version
            of PyTorch; for the others, None, it is zero.
        by_mask: whether a mask does it, so that nothing in the graph tells what this is.
    """

    input: Tensor
    upper: float | None = None
    in_place: bool = False
    into: Tensor | None = None
    zero: Any = 0
    cap: Tensor | None = None
    plain: Callable[[Tensor], Tensor] | None = None
    by_mask: bool = False

    def out_of_place(self, x: Tensor) -> Tensor:
        """The same values in a tensor of their own."""
        return self.plain(x) if self.plain else x.clamp(0, self.upper)


# Each function has the arguments of the calls that it stands for, and returns None where these do not make a
# rectifier of them.


def _relu(input: Tensor, inplace: bool = False) -> ReLUCall | None:
    return ReLUCall(input, in_place=inplace)


def _relu6(input: Tensor, inplace: bool = False) -> ReLUCall | None:
    return ReLUCall(input, 6.0, inplace)


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> ReLUCall | None:
    return ReLUCall(input, max_val, inplace) if min_val == 0 else None


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> ReLUCall | None:
    return ReLUCall(input, in_place=inplace) if threshold == 0 and value == 0 else None


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> ReLUCall | None:
    return ReLUCall(input, in_place=inplace) if negative_slope == 0 else None


def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> ReLUCall | None:
    return ReLUCall(input, in_place=inplace) if lower == upper == 0 else None


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> ReLUCall | None:
    return ReLUCall(input, in_place=inplace) if alpha == 0 else None


def _prelu(input: Tensor, weight: Tensor) -> ReLUCall | None:
    return ReLUCall(input, zero=weight)  # one that is trained is no ReLU, even at zero


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> ReLUCall | None:
    if min is None:
        return None
    if isinstance(max, Tensor) and max.requires_grad:
        return ReLUCall(input, zero=min, cap=max, plain=lambda x: x.clamp(min))
    return ReLUCall(input, zero=min, plain=lambda x: x.clamp(min, max))


def _maximum(input: Tensor, other: Any) -> ReLUCall | None:
    if not isinstance(other, Tensor):  # a dimension
        return None
    x, zero = _with_zero(input, other)
    return ReLUCall(x, zero=zero, plain=lambda x: torch.maximum(x, zero))


def _fmax(input: Tensor, other: Tensor) -> ReLUCall | None:
    x, zero = _with_zero(input, other)
    return ReLUCall(x, zero=zero, plain=lambda x: torch.fmax(x, zero))


def _with_zero(input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors, with that last which may be zero."""
    swap = not input.requires_grad or (other.requires_grad and is_zero(input))
    return (other, input) if swap else (input, other)


def _where(condition: Tensor, input: Any, other: Any) -> ReLUCall | None:
    if is_sign(condition, input, positive=True):
        return ReLUCall(input, zero=other, plain=lambda x: torch.where(condition, x, 0), by_mask=True)
    if is_sign(condition, other, positive=False):
        return ReLUCall(other, zero=input, plain=lambda x: torch.where(condition, 0, x), by_mask=True)
    return None


def _where_of_tensor(input: Tensor, condition: Tensor, other: Any) -> ReLUCall | None:
    return _where(condition, input, other)


def _multiply(input: Any, other: Any) -> ReLUCall | None:
    x, kept = (input, other) if is_sign(other, input, positive=True) else (other, input)
    if not is_sign(kept, x, positive=True):
        return None
    return ReLUCall(x, plain=lambda x: x * kept, by_mask=True)


def _subtract(input: Any, other: Any, *, alpha: float = 1) -> ReLUCall | None:
    mask = negative_part(other, input) if alpha == 1 else None
    return None if mask is None else ReLUCall(input, plain=lambda x: x - x * mask, by_mask=True)


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> ReLUCall | None:
    call = _multiply(tensor1, tensor2) if value == 1 else None
    return call and call._replace(zero=input)


def _einsum(equation: Any, *operands: Any) -> ReLUCall | None:
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    letters = output.replace("...", "")
    elementwise = inputs == f"{output},{output}" and len(set(letters)) == len(letters)
    return _multiply(*operands) if elementwise else None


def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> ReLUCall | None:
    if not is_sign(mask, input, positive=False):
        return None
    return ReLUCall(input, zero=value, plain=lambda x: x.masked_fill(mask, 0), by_mask=True)


def _masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> ReLUCall | None:
    return _masked_fill(input, mask, source)


def _index_put(input: Tensor, indices: Any, values: Any, accumulate: bool = False) -> ReLUCall | None:
    mask = mask_of_picks(indices)
    if mask is None and len(indices) == 1 and isinstance(indices[0], Tensor):
        mask = indices[0]
    return None if accumulate or mask is None else _masked_fill(input, mask, values)


def _set_item(input: Tensor, index: Any, value: Any) -> ReLUCall | None:
    mask = index if isinstance(index, Tensor) else mask_of_picks(index)
    return None if mask is None else _masked_fill(input, mask, value)


def _certainly_zero(value: Any) -> bool:
    if (zero := is_zero(value)) is None:
        raise UnknownError
    return zero


def _has_history(call: ReLUCall) -> bool:
    """Whether a gradient is wanted of the input, of one in `torch.vmap` only where no graph would tell."""
    x, functorch = call.input, torch._C._functorch
    while call.by_mask and functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.requires_grad


_BY_NAME: dict[str, Callable[..., ReLUCall | None]] = {
    "relu": _relu,
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "leaky_relu": _leaky_relu,
    "rrelu": _rrelu,
    "elu": _elu,
    "prelu": _prelu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "maximum": _maximum,
    "max": _maximum,
    "fmax": _fmax,
    "where": _where,
    "mul": _multiply,
    "multiply": _multiply,
    "__mul__": _multiply,
    "__rmul__": _multiply,
    "__imul__": _multiply,
    **dict.fromkeys(("sub", "subtract", "__sub__", "__isub__"), _subtract),
    "addcmul": _addcmul,
    "einsum": _einsum,
    "masked_fill": _masked_fill,
    "masked_scatter": _masked_scatter,
    "index_put": _index_put,
    "__setitem__": _set_item,
}


_UNKNOWN = (
    "compile() has no values that would tell whether this call ({}) is a ReLU, for which the saliency method "
    "has a rule: write it as one (F.relu(x), x * (x > 0)), give a number instead of a tensor where it is "
    "none (x.clamp(min=0.1), F.leaky_relu(x, 0.25)), or leave compile() out"
)


def _reader(parse: Callable[..., ReLUCall | None], *, in_place: bool) -> Callable[..., ReLUCall | None]:
    """What makes a `ReLUCall` of a call's arguments, or None of those that are of another kind."""
    signature = inspect.signature(parse)

    def read(*args: Any, **kwargs: Any) -> ReLUCall | None:
        if "self" in kwargs:  # what the operators of torch.ops call it
            kwargs["input"] = kwargs.pop("self")
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return None
        try:
            call = parse(*args, **kwargs)
            if call is None or not _has_history(call) or not _certainly_zero(call.zero):
                return None
        except UnknownError:
            raise RuntimeError(_UNKNOWN.format(parse.__name__.strip("_"))) from None
        if not in_place:
            return call
        written = args[0] if args else kwargs["input"]
        if written is call.input:
            return call._replace(in_place=True)
        if not torch.can_cast(torch.result_type(call.input, written), written.dtype):
            return None  # for PyTorch's own error
        return call._replace(in_place=True, into=written)

    return read


_IN_PLACE = ("__imul__", "__isub__", "__setitem__")

#: for each call that may be a rectifier, what tells whether it is one
SPELLINGS = {
    function: _reader(parse, in_place=name in _IN_PLACE or spelled != name)
    for name, parse in _BY_NAME.items()
    for function, spelled in functions_named(name)
} | {Tensor.where: _reader(_where_of_tensor, in_place=False)}

#: the calls on lists of tensors, each with its variant that is not in place and what tells a rectifier
EACH = {
    getattr(torch, f"_foreach_{name}{end}"): (getattr(torch, f"_foreach_{name}"), SPELLINGS[function])
    for name, function in (("clamp_min", torch.clamp_min), ("maximum", torch.clamp_min), ("mul", torch.mul))
    for end in ("", "_")
}
