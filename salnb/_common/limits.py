"""Checks of numbers and of ranges, each of whose errors names the argument, what came and what is allowed.

Numbers may come from NumPy or as tensors without dimensions; what is kept is always Python's own.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["check_integer", "check_number", "check_pair", "check_range"]


def check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> float:
    """The value as a float, if it is a number in [low, high], or in (low, high] with `above`.

    Raises:
        TypeError, ValueError: it is no number, or none of these.
    """
    return float(_checked(name, value, low, high, Real, "a number", above))


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """The value as an int, if it is a whole number from low to high; 2.0 is none. For errors see above."""
    return int(_checked(name, value, low, high, Integral, "a whole number"))


def check_pair(
    name: str, value: tuple[float, float], low: float, high: float, form: str, *, above: bool = False
) -> tuple[float, float]:
    """Both parts as floats, if there are two and each passes `check_number`; `form` says what they are."""
    plain = _plain(value)
    listed = isinstance(plain, Sequence) and not isinstance(plain, str | bytes)
    if not listed or len(plain) != 2:
        error = ValueError if listed else TypeError
        raise error(f"{name} must be {form}, within {_interval(low, high, above)}, got {value!r}")
    first, second = (check_number(name, part, low, high, above=above) for part in plain)
    return first, second


def check_range(
    name: str,
    value: float | tuple[float, float],
    low: float,
    high: float,
    *,
    above: bool = False,
    about: float | None = None,
) -> tuple[float, float]:
    """Both ends as floats, if each passes `check_number` and they are in order.

    One number x, where `about` is given, means from `about` - x to `about` + x; about 1, not from below low.
    """
    plain = _plain(value)
    if about is not None and _is_a(Real, plain):
        half = check_number(name, plain, 0, high) if about else plain
        plain = (max(low, about - half) if about else -half, about + half)
    form = "a pair (from, to) in this order" + ("" if about is None else " or one number")
    ends = check_pair(name, plain, low, high, form, above=above)
    if ends[0] > ends[1]:
        raise ValueError(f"{name} must be {form}, got {value!r}")
    return ends


def _checked(
    name: str, value: Any, low: float, high: float, kind: Any, words: str, above: bool = False
) -> Any:
    plain = _plain(value)
    if not _is_a(kind, plain):
        raise TypeError(f"{name} must be {words} in {_interval(low, high, above)}, got {value!r}")
    if not low <= plain <= high or (above and plain == low):  # NaN is not between them either
        raise ValueError(f"{name} must lie in {_interval(low, high, above)}, got {value!r}")
    return plain


def _is_a(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _interval(low: float, high: float, above: bool) -> str:
    return f"{'(' if above else '['}{low:g}, {high:g}]"


def _plain(value: Any) -> Any:
    """Numbers and lists of NumPy and of PyTorch as those of Python."""
    return value.tolist() if hasattr(value, "tolist") else value
