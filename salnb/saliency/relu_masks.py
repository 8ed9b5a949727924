"""Masks made of the sign of a tensor, by which `x * (x > 0)` and its like are known for rectifiers."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from salnb._common.checks import is_batched

__all__ = ["PICKS", "SIGNS", "UnknownError", "functions_named", "is_sign", "is_zero", "mask_of_picks"]
__all__ += ["negative_part", "note_picks", "note_sign", "refuse_what_values_tell"]

# places with a sign from which on a mask that agrees in all of them does not do so by chance
_MANY = 32

_values_refused = ContextVar("_values_refused", default=False)


class UnknownError(Exception):
    """Whether a call is a ReLU depends on values that a traced graph does not have."""


def is_zero(value: Any) -> bool | None:
    """Whether this is a zero, or a tensor of zeros that stay zeros; None of what has no values to look at."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and value == 0
    if (sign := _sign_of(value)) is not None and sign.values == (0, 0):  # x * 0
        return True
    if value.requires_grad or value.is_meta or is_batched(value):
        return False
    if isinstance(value, FakeTensor):  # it has a value only where a number made it
        if value.constant is None:
            return None
        with _disable_current_modes():
            return not value.constant.any()
    return not value.any()


class _Sign(NamedTuple):
    """Where a mask comes from: the sign of a tensor."""

    tensor: Tensor
    version: int
    made: int  # the version of the mask itself
    values: tuple[float, float]  # where the tensor is negative and where it is positive; at zero, whatever
    known: bool  # false where a traced graph has no values that would tell whether it is zero


def note_sign(name: str, result: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Remember of a mask that it is the sign of a tensor, so that `x * (x > 0)` is known for what it is."""
    given = args[:1] if name in _CASTS else (*args, *kwargs.values()) if kwargs else args
    for arg in given:
        if hasattr(arg, "_sign"):
            break
    else:  # quickly passed over, as sums and products are many and masks are few
        if name not in _FIRST or (name in _PRODUCTS and isinstance(given[-1], Tensor)):
            return
    signs = [sign for arg in given if (sign := _sign_of(arg, result)) is not None]
    if not (signs or name in _FIRST) or not isinstance(result, Tensor) or result.is_inference():
        return
    found = _of_masks(name, result, args, kwargs, signs) if signs else _of_tensor(name, result, given)
    if found is not None:
        result._sign = found  # type: ignore[attr-defined]
    elif name in _PRODUCTS and len(given) == 2:
        for x, mask in (given, given[::-1]):
            if _is_noted_sign(mask, x, positive=False):
                result._negative = x, x._version, result._version, mask  # type: ignore[attr-defined]


def negative_part(value: Any, x: Any) -> Tensor | None:
    """The mask by which a tensor is `x` where that is negative and zero elsewhere; None of any other."""
    found: Any = getattr(value, "_negative", None)
    return found[3] if found and found[0] is x and (x._version, value._version) == found[1:3] else None


def note_picks(result: Any, args: tuple) -> None:
    """Remember of the places of a mask, one tensor for each dimension, which mask they are of."""
    if args and isinstance(result, tuple) and _sign_of(args[0]) is not None:
        for places in result:
            places._picks = args[0]


def mask_of_picks(indices: Any) -> Tensor | None:
    """The mask that these are the places of; None if they are other indices."""
    masks = (
        [getattr(places, "_picks", None) for places in indices] if isinstance(indices, tuple | list) else []
    )
    whole = masks and masks[0] is not None and masks[0].ndim == len(masks)
    return masks[0] if whole and all(mask is masks[0] for mask in masks) else None


def is_sign(mask: Any, x: Any, *, positive: bool) -> bool:
    """Whether a mask is one where `x` is positive and zero where it is negative, or the other way round.

    Where nothing was noted that tells, the values do.
    """
    return _is_noted_sign(mask, x, positive) or _has_values_of_sign(mask, x, positive)


def _is_noted_sign(mask: Any, x: Any, positive: bool) -> bool:
    sign = _sign_of(mask)
    if sign is None or not isinstance(x, Tensor) or sign.values != ((0, 1) if positive else (1, 0)):
        return False
    t = sign.tensor
    unchanged = t._version == sign.version
    same = t is x or (t.shape == x.shape and t.stride() == x.stride() and _are_one(t, x))
    if same and unchanged and x.requires_grad and not sign.known:
        raise UnknownError
    return same and unchanged


def _has_values_of_sign(mask: Any, x: Any, positive: bool) -> bool:
    """Whether a mask that was made in some other way is nevertheless the sign of `x` in every place.

    There have to be so many places with a sign that this is no coincidence. What is traced has no values:
    a run before that is to `refuse_what_values_tell`.
    """
    alike = isinstance(mask, Tensor) and isinstance(x, Tensor) and mask.shape == x.shape
    if not alike or x.numel() < _MANY or mask.requires_grad or mask.device != x.device:
        return False
    if not (_has_values(mask) and _has_values(x)):
        return False
    x = x.detach()
    below, above = (x < 0, x > 0) if positive else (x > 0, x < 0)
    if not ((mask == 0) | ~below).all() or not ((mask == 1) | ~above).all():
        return False
    found = bool(below.any() and above.any() and (below | above).sum() >= _MANY)
    if found and _values_refused.get():
        raise UnknownError
    return found


def _has_values(tensor: Tensor) -> bool:
    """Whether its values can be looked at and compared, and nobody notes down that they were."""
    if get_proxy_mode() is not None or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if tensor.is_meta or isinstance(tensor, FakeTensor) or is_batched(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_complex()


@contextmanager
def refuse_what_values_tell() -> Iterator[None]:
    """Inside, a rectifier that is known by the values of its mask is refused: a graph will not see them."""
    token = _values_refused.set(True)
    try:
        yield
    finally:
        _values_refused.reset(token)


def _are_one(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have the same memory."""
    if is_batched(x) or is_batched(y):
        return False  # which do not say
    with disable_proxy_modes_tracing() if get_proxy_mode() is not None else nullcontext():
        return x.is_set_to(y.detach())


def _sign_of(mask: Any, written: Any = None) -> _Sign | None:
    """What was noted of a mask, unless it has changed since, but for the call that has just `written`."""
    sign = getattr(mask, "_sign", None)
    if not isinstance(sign, _Sign) or mask._version != sign.made + (mask is written):
        return None
    return sign


def _of_tensor(name: str, result: Tensor, args: tuple) -> _Sign | None:
    """What to note of a mask that is made of a tensor that is none."""
    x, other, known = args[0], args[1] if len(args) > 1 else None, True
    if result is x:
        return None
    if name in _COMPARISONS:
        values = _COMPARISONS[name]
        if not isinstance(x, Tensor) or (isinstance(other, Tensor) and other.requires_grad):
            x, other, values = other, x, values[::-1]
        if (zero := is_zero(other)) is False:
            return None
        known = bool(zero)
    elif name in _STEPS:
        values = _STEPS[name]
    elif name in _PRODUCTS and isinstance(other, int | float) and other == 0:
        values = (0, 0)
    else:
        return None
    if not isinstance(x, Tensor) or x.is_inference():
        return None
    return _Sign(x, x._version, result._version, values, known)


def _of_masks(name: str, result: Tensor, args: tuple, kwargs: dict, signs: list[_Sign]) -> _Sign | None:
    """What to note of a mask that is made of other masks and of numbers."""
    first = signs[0]
    if any(sign.tensor is not first.tensor or sign.version != first.version for sign in signs):
        return None
    if result.shape != first.tensor.shape or result.is_complex():
        return None
    rule = _kept if name in _CASTS else _RULES.get(name)
    if rule is None:
        return None
    if rule is _kept:
        args, kwargs = args[:1], {}
    values = []
    try:
        for side in (0, 1):
            look = rule is not operator.mul  # most products with a tensor make no mask
            numbers = [_number(arg, result, side, look) for arg in args]
            value = rule(*numbers, **{k: _number(v, result, side, look) for k, v in kwargs.items()})
            values.append(_as(result.dtype, value))
    except (ArithmeticError, TypeError, ValueError):
        return None
    known = all(sign.known for sign in signs)
    return first._replace(made=result._version, values=(values[0], values[1]), known=known)


def _number(arg: Any, written: Tensor, side: int, look: bool) -> Any:
    """What an argument is where the tensor behind a mask is negative (side 0) or positive (side 1)."""
    if not isinstance(arg, Tensor):
        return arg
    if (sign := _sign_of(arg, written)) is not None:
        return sign.values[side]
    if not look or arg.requires_grad or arg.is_meta or not arg.numel() or is_batched(arg):
        raise TypeError
    if isinstance(arg, FakeTensor):
        if arg.constant is None:
            raise TypeError
        with _disable_current_modes():
            return arg.constant.item()
    number = arg.flatten()[0]
    if not (arg == number).all():
        raise TypeError
    return number.item()


def _as(dtype: torch.dtype, value: float) -> float:
    """A number as a tensor of this dtype has it."""
    if dtype is torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


def functions_named(name: str) -> Iterator[tuple[Callable, str]]:
    """Every function, method and operator of PyTorch with this name or that of its variant in place."""
    for home in (torch, Tensor, F, torch._C._nn, torch.ops.aten):
        for spelled in (name, f"{name}_"):
            function: Any = getattr(home, spelled, None)
            operators = isinstance(function, torch._ops.OpOverloadPacket)
            overloads = [getattr(function, o) for o in function.overloads()] if operators else []
            for spelling in filter(callable, (function, *overloads)):
                yield spelling, spelled


def _kept(input: float) -> float:
    return input


def _clamped(input: float, min: float | None = None, max: float | None = None) -> float:
    input = input if min is None or input > min else min
    return input if max is None or input < max else max


def _inverted(input: float) -> float:
    return not input if isinstance(input, bool) else operator.invert(input)  # type: ignore[arg-type]


def _added(input: float, other: float, *, alpha: float = 1) -> float:
    return input + alpha * other


def _subtracted(input: float, other: float, *, alpha: float = 1) -> float:
    return input - alpha * other


def _subtracted_from(input: float, other: float, *, alpha: float = 1) -> float:
    return other - alpha * input


def _chosen(condition: bool, input: float, other: float) -> float:
    return input if condition else other


def _chosen_of_tensor(input: float, condition: bool, other: float) -> float:
    return _chosen(condition, input, other)


#: a mask of a tensor and zero, where the tensor is negative and where it is positive
_COMPARISONS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("gt", "greater", "ge", "greater_equal", "__gt__", "__ge__"), (False, True)),
    **dict.fromkeys(("lt", "less", "le", "less_equal", "__lt__", "__le__"), (True, False)),
}
#: a mask of a tensor alone
_STEPS: dict[str, tuple[float, float]] = {
    "sign": (-1, 1),
    "sgn": (-1, 1),
    "heaviside": (0, 1),
    "signbit": (True, False),
}
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__", "__imul__")
_FIRST = {*_COMPARISONS, *_STEPS, *_PRODUCTS}

#: what other masks are made of masks
_RULES: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("gt", "greater", "__gt__"), operator.gt),
    **dict.fromkeys(("ge", "greater_equal", "__ge__"), operator.ge),
    **dict.fromkeys(("lt", "less", "__lt__"), operator.lt),
    **dict.fromkeys(("le", "less_equal", "__le__"), operator.le),
    **dict.fromkeys(("eq", "__eq__"), operator.eq),
    **dict.fromkeys(("ne", "not_equal", "__ne__"), operator.ne),
    **dict.fromkeys(_PRODUCTS, operator.mul),
    **dict.fromkeys(("add", "__add__", "__radd__", "__iadd__"), _added),
    **dict.fromkeys(("sub", "subtract", "__sub__", "__isub__"), _subtracted),
    **dict.fromkeys(("rsub", "__rsub__"), _subtracted_from),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__itruediv__"), operator.truediv),
    **dict.fromkeys(("neg", "negative", "__neg__"), operator.neg),
    **dict.fromkeys(("bitwise_not", "__invert__"), _inverted),
    **dict.fromkeys(("bitwise_xor", "logical_xor", "__xor__", "__rxor__"), operator.xor),
    **dict.fromkeys(("clamp", "clip"), _clamped),
    "clamp_min": _clamped,
    "relu": lambda input, inplace=False: max(input, 0),
    "logical_not": operator.not_,
    "where": _chosen,
    "Tensor.where": _chosen_of_tensor,
    "sign": lambda input: (input > 0) - (input < 0),
}

_CASTS = {
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool", "detach"),
    *("clone", "contiguous", "reshape", "reshape_as", "view", "view_as", "expand_as"),
}

#: the calls that make the mask of a rectifier, or hand it on, by the names that `note_sign` knows
SIGNS = {function: name for name in (*_FIRST, *_RULES, *_CASTS) for function, _ in functions_named(name)} | {
    Tensor.where: "Tensor.where"
}

#: the calls that give the places of a mask
PICKS = {torch.where, *(function for function, _ in functions_named("nonzero"))}
