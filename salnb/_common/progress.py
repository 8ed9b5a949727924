"""The bar and the lines that all parts show. Where showing fails, nothing else does."""

import contextlib
import shutil
from collections.abc import Iterable
from typing import Any, TextIO

__all__ = ["log_line", "progress"]


def log_line(line: str, file: TextIO | None = None) -> None:
    """Print a line at once; it is lost if nobody reads the file any more (None: the standard output)."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=file, flush=True)


def progress(things: Iterable[Any] | None = None, what: str = "", **options: Any) -> Any:
    """A bar of tqdm on a terminal, and nothing where there is none.

    Args:
        things: to go through; None: the caller counts.
        what: stands before the bar.
        **options: for tqdm.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def display(self, *args: Any, **options: Any) -> Any:
            try:
                return super().display(*args, **options)
            except Exception:  # it must not get out, as a lock is held
                self.disable = True
                self._instances.discard(self)  # its line is free

        def close(self) -> None:
            with contextlib.suppress(Exception):
                super().close()

    # tqdm takes a terminal that does not tell its size for one of no lines, and shows nothing
    columns, lines = shutil.get_terminal_size()
    given = {"desc": what, "ncols": columns, "nrows": lines, "leave": False, "disable": None}
    before = set(tqdm._instances)
    try:
        return Bar(things, **given | options)
    except Exception:  # of a file that is closed
        tqdm._instances &= before
        return tqdm(things, disable=True)
