"""Warnings that point at the line of the user's."""

import sys
import warnings

__all__ = ["warn_caller"]

#: packages whose frames may lie between a warning and the caller's line
_NOT_THE_CALLER = ("salnb", "torch", "contextlib")


def warn_caller(message: str) -> None:
    """Warn at the line of the caller's that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
