"""The spellings of a rectifier in PyTorch: which calls compute min(max(x, 0), upper)."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from salnb._common.checks import is_batched

__all__ = ["SIGNS", "SPELLINGS", "ReLUCall", "is_zero", "note_sign"]


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
    """

    input: Tensor
    upper: float | None = None
    in_place: bool = False
    into: Tensor | None = None
    zero: Any = 0
    cap: Tensor | None = None
    plain: Callable[[Tensor], Tensor] | None = None

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
    x, zero = (input, other) if input.requires_grad else (other, input)
    return ReLUCall(x, zero=zero, plain=lambda x: torch.maximum(x, zero))


def _fmax(input: Tensor, other: Tensor) -> ReLUCall | None:
    x, zero = (input, other) if input.requires_grad else (other, input)
    return ReLUCall(x, zero=zero, plain=lambda x: torch.fmax(x, zero))


def _where(condition: Tensor, input: Any, other: Any) -> ReLUCall | None:
    if _is_sign(condition, input, positive=True):
        return ReLUCall(input, zero=other, plain=lambda x: torch.where(condition, x, 0))
    if _is_sign(condition, other, positive=False):
        return ReLUCall(other, zero=input, plain=lambda x: torch.where(condition, 0, x))
    return None


def _where_of_tensor(input: Tensor, condition: Tensor, other: Any) -> ReLUCall | None:
    return _where(condition, input, other)


def _multiply(input: Any, other: Any) -> ReLUCall | None:
    x, kept = (input, other) if _is_sign(other, input, positive=True) else (other, input)
    return ReLUCall(x, plain=lambda x: x * kept) if _is_sign(kept, x, positive=True) else None


def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> ReLUCall | None:
    if not _is_sign(mask, input, positive=False):
        return None
    return ReLUCall(input, zero=value, plain=lambda x: x.masked_fill(mask, 0))


def _index_put(input: Tensor, indices: Any, values: Any, accumulate: bool = False) -> ReLUCall | None:
    if accumulate or len(indices) != 1 or not isinstance(indices[0], Tensor):
        return None
    return _masked_fill(input, indices[0], values)


def _set_item(input: Tensor, index: Any, value: Any) -> ReLUCall | None:
    return _masked_fill(input, index, value) if isinstance(index, Tensor) else None


def is_zero(value: Any) -> bool | None:
    """Whether this is a zero, or a tensor of zeros that stay zeros; None of what has no values to look at."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and value == 0
    if value.requires_grad or value.is_meta or is_batched(value):
        return False
    if isinstance(value, FakeTensor):  # it has a value only where a number made it
        if value.constant is None:
            return None
        with _disable_current_modes():
            return not value.constant.any()
    return not value.any()


def _certainly_zero(value: Any) -> bool:
    if (zero := is_zero(value)) is None:
        raise _UnknownError
    return zero


class _Sign(NamedTuple):
    """Where a mask comes from: a comparison of a tensor with zero."""

    tensor: Tensor
    version: int
    made: int  # the version of the mask itself
    positive: bool  # whether it is true where the tensor is positive; zero may belong to either side
    known: bool  # false where a traced graph has no values that would tell whether it is zero


def note_sign(name: str, result: Any, *args: Any) -> None:
    """Remember of a mask that it is the sign of a tensor, so that `x * (x > 0)` is known for what it is."""
    if not args or not isinstance(result, Tensor) or result is args[0] or result.is_inference():
        return
    if name in _COMPARISONS:
        (x, zero), positive = args[:2], _COMPARISONS[name]
        if not isinstance(x, Tensor) or (isinstance(zero, Tensor) and zero.requires_grad):
            x, zero, positive = zero, x, not positive
        if not isinstance(x, Tensor) or x.is_inference() or (known := is_zero(zero)) is False:
            return
        result._sign = _Sign(x, x._version, result._version, positive, bool(known))  # type: ignore[attr-defined]
    elif result.shape == args[0].shape and isinstance(sign := getattr(args[0], "_sign", None), _Sign):
        if args[0]._version != sign.made:
            return
        positive = sign.positive is not (name in _NEGATIONS)
        result._sign = sign._replace(made=result._version, positive=positive)  # type: ignore[attr-defined]


class _UnknownError(Exception):
    """Whether a call is a ReLU depends on values that a traced graph does not have."""


def _is_sign(mask: Any, x: Any, *, positive: bool) -> bool:
    """Whether a mask says where `x` is positive, or where it is negative."""
    sign = getattr(mask, "_sign", None)
    if not isinstance(sign, _Sign) or not isinstance(x, Tensor) or sign.positive is not positive:
        return False
    t = sign.tensor
    unchanged = t._version == sign.version and mask._version == sign.made
    same = t is x or (t.shape == x.shape and t.stride() == x.stride() and _are_one(t, x))
    if same and unchanged and x.requires_grad and not sign.known:
        raise _UnknownError
    return same and unchanged


def _are_one(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have the same memory."""
    if is_batched(x) or is_batched(y):
        return False  # which do not say
    with disable_proxy_modes_tracing() if get_proxy_mode() is not None else nullcontext():
        return x.is_set_to(y.detach())


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
    "masked_fill": _masked_fill,
    "index_put": _index_put,
    "__setitem__": _set_item,
}


_UNKNOWN = (
    "compile() has no values that would tell whether a tensor is zero, and with it whether this call ({}) is "
    "a ReLU, for which the saliency method has a rule: give a number instead of the tensor (F.relu(x), "
    "x.clamp(min=0.1), F.leaky_relu(x, 0.25), x > 0), or leave compile() out"
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
            if call is None or not call.input.requires_grad or not _certainly_zero(call.zero):
                return None
        except _UnknownError:
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


def _functions(name: str) -> Iterator[tuple[Callable, str]]:
    """Every function, method and operator of PyTorch with this name or that of its variant in place."""
    for home in (torch, Tensor, F, torch._C._nn, torch.ops.aten):
        for spelled in (name, f"{name}_"):
            function: Any = getattr(home, spelled, None)
            operator = isinstance(function, torch._ops.OpOverloadPacket)
            overloads = [getattr(function, o) for o in function.overloads()] if operator else []
            for spelling in filter(callable, (function, *overloads)):
                yield spelling, spelled


_IN_PLACE = ("__imul__", "__setitem__")

#: for each call that may be a rectifier, what tells whether it is one
SPELLINGS = {
    function: _reader(parse, in_place=name in _IN_PLACE or spelled != name)
    for name, parse in _BY_NAME.items()
    for function, spelled in _functions(name)
} | {Tensor.where: _reader(_where_of_tensor, in_place=False)}

_COMPARISONS = {
    **dict.fromkeys(("gt", "greater", "ge", "greater_equal", "__gt__", "__ge__"), True),
    **dict.fromkeys(("lt", "less", "le", "less_equal", "__lt__", "__le__"), False),
}
_NEGATIONS = ("logical_not", "bitwise_not", "__invert__")
_CASTS = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool", "detach"),
    *("clone", "contiguous", "reshape", "reshape_as", "view", "view_as", "expand_as"),
)

#: the calls that make the mask of a rectifier, or hand it on, by the names that `note_sign` knows
SIGNS = {function: name for name in (*_COMPARISONS, *_NEGATIONS, *_CASTS) for function, _ in _functions(name)}
