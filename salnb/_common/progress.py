"""The progress bar that all parts show."""

import shutil
from collections.abc import Iterable
from typing import Any

__all__ = ["progress"]


def progress(things: Iterable[Any] | None = None, what: str = "", **options: Any) -> Any:
    """A bar of tqdm on a terminal, and nothing where there is none.

    Args:
        things: to go through; None: the caller counts.
        what: stands before the bar.
        **options: for tqdm.
    """
    from tqdm import tqdm

    # tqdm takes a terminal that does not tell its size for one of no lines, and shows nothing
    columns, lines = shutil.get_terminal_size()
    given = {"desc": what, "ncols": columns, "nrows": lines, "leave": False, "disable": None}
    return tqdm(things, **given | options)
