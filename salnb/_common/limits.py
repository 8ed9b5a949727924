"""Checks of numbers and of ranges, each of whose errors names the argument, what came and what is allowed."""

import math

__all__ = ["check_number", "check_range"]


def check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> float:
    """The value as a float, if it lies in [low, high], or in (low, high] with `above`."""
    if not (low < value if above else low <= value) or not value <= high:
        interval = f"{'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must lie in {interval}, got {value!r}")
    return float(value)


def check_range(
    name: str,
    value: float | tuple[float, float],
    low: float,
    high: float,
    *,
    above: bool = False,
    about: float = 0.0,
) -> tuple[float, float]:
    """The pair as floats, if both ends lie between low and high and are in order.

    A single number x means from `about` - x to `about` + x, if `about` is not 0 without what is below low.
    """
    pair = tuple(value) if not isinstance(value, int | float) else (-value, value)
    if isinstance(value, int | float) and about:
        check_number(name, value, 0, math.inf)
        pair = (max(low, about - value), about + value)
    if len(pair) != 2 or pair[0] > pair[1]:
        raise ValueError(f"{name} must be a pair (from, to) in this order, got {value!r}")
    first, last = (check_number(name, end, low, high, above=above) for end in pair)
    return first, last
