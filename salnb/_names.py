"""The error for an unknown name; free of torch, so that it can be raised before anything heavy is loaded."""

import difflib
from collections.abc import Iterable


def unknown(what: str, given: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among the `known` ones, with the nearest of them suggested."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{what} {given!r} is unknown{hint}; known: {', '.join(names)}")
