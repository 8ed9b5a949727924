"""The record of a study under way, and the file that it is written to after every row."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from salnb import results
from salnb._common.files import check_writable

__all__ = ["RecordFile"]


class RecordFile:
    """The file of a study; `.partial` is behind its name until all rows have had their turn.

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
        try:
            for written in (path, self.partial):
                check_writable(written)
        except OSError as error:
            raise OSError(error.errno, f"out {path} cannot be written: {error.strerror}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Write what there is so far; where that fails, the study goes on, and the next row tries again."""
        try:
            results.write_record(self.partial, record)
            self.unwritten = None
        except OSError as error:
            if self.unwritten is None:
                self.log(f"{self.partial} cannot be written ({error.strerror}): the study goes on")
            self.unwritten = record

    @contextlib.contextmanager
    def finished(self) -> Iterator[None]:
        """Context in which rows are written; at its end the file gets its name.

        Raises:
            OSError: the record could not be written; the message says where it is instead.
        """
        try:
            yield
        except BaseException:
            if self.unwritten:
                self.log(self._rescue(self.unwritten))
            raise
        if self.unwritten:
            raise OSError(f"out {self.path} cannot be written: {self._rescue(self.unwritten)}")
        os.replace(self.partial, self.path)

    def _rescue(self, record: dict[str, Any]) -> str:
        """Bring a record to another place than where it belongs; say where it is."""
        path = Path(tempfile.gettempdir()) / f"{self.path.stem}-{os.getpid()}.json"
        try:
            results.write_record(path, record)
        except OSError:
            self.log(json.dumps(record))
            return "the record stands above"
        return f"the record is in {path}"
