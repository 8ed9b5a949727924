"""The record of a study under way, and the file that it is written to after every row."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from salnb import results

__all__ = ["RecordFile"]


class RecordFile:
    """The file of a study: `.partial` is behind its name until all rows have had their turn.

    Args:
        path: where the record goes.
        log: told what could not be written.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, path: Path, log: Callable[[str], object]):
        self.path, self.log = path, log
        self.partial = path.with_name(f"{path.name}.partial")
        self.unwritten: dict[str, Any] | None = None
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(error.errno, f"out {path} cannot be written: {error.strerror}") from error
        if path.is_dir():
            raise IsADirectoryError(f"out {path} cannot be written: it is a folder")

    def write(self, record: dict[str, Any]) -> None:
        """Write what there is so far; where that fails, the study goes on, and the next row tries again."""
        known, self.unwritten = self.unwritten, record
        try:
            results.write_record(self.partial, record)
            self.unwritten = None
        except OSError as error:
            if not known:
                self.log(f"{self.partial} cannot be written ({error.strerror}): the study goes on")

    def close(self, record: dict[str, Any]) -> None:
        """Write the whole record.

        Raises:
            OSError: it could not be written; the message says where it is instead.
        """
        try:
            results.write_record(self.path, record)
        except OSError as error:
            self.unwritten = record
            text = f"out {self.path} cannot be written: {error.strerror}; {self.rescue()}"
            raise OSError(error.errno, text) from error
        self.unwritten = None
        with contextlib.suppress(OSError):
            self.partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def rescued(self) -> Iterator[None]:
        """Context that an error or an interruption does not leave with something unwritten."""
        try:
            yield
        except BaseException:
            if self.unwritten:
                self.log(self.rescue())
            raise

    def rescue(self) -> str:
        """Bring what could not be written where it belongs to another place; say where it is."""
        path = Path(tempfile.gettempdir()) / f"{self.path.stem}-{os.getpid()}.json"
        try:
            results.write_record(path, self.unwritten or {})
        except OSError:
            self.log(json.dumps(self.unwritten))
            return "the record stands above"
        return f"the record is in {path}"
