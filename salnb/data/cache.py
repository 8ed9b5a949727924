"""The folder that data sets are kept in, and what to do where it cannot be used."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from salnb._common.files import DamagedFileError, load_hashed, remove_drafts, save_hashed

# what the face of the package shows
__all__ = ["cache_folder"]

# seconds after which a file that is still not whole has been left behind: nothing takes so long to write
_ABANDONED = 24 * 3600.0


def cache_folder() -> Path:
    """Where data sets are kept: `$SALNB_CACHE`, or `~/.cache/salnb`.

    Raises:
        OSError: there is no such place, as the home folder is not known.
    """
    folder = Path(os.environ.get("SALNB_CACHE") or "~/.cache/salnb")
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:  # the latter: relative to a folder that is gone
        raise _unusable(folder, error) from error


@contextlib.contextmanager
def using_cache() -> Iterator[Path]:
    """The folder of `cache_folder`, to be read and written; what prevents that is told with the way out.

    Raises:
        OSError: it cannot be made, read or written, or is full.
    """
    folder = cache_folder()
    try:
        yield folder
    except OSError as error:
        raise _unusable(folder, error) from error


def writable(folder: Path) -> None:
    """Make a folder, unless it is there, and raise an OSError unless files can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _unusable(folder: Path, error: Exception) -> OSError:
    known = isinstance(error, OSError) and error.filename
    reason = f"{error.strerror}: {error.filename}" if known else error  # type: ignore[attr-defined]
    return OSError(
        f"data sets cannot be kept in {folder} ({reason}): "
        "set SALNB_CACHE to a folder that can be written and has room"
    )


def cached(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made once and kept on disk; what is there is only read.

    Args:
        name: of the file; a change of what is made asks for a new one.
        make: gives tensors and plain values by name.

    Warns:
        UserWarning: the file was truncated or altered; it is made again.

    Raises:
        OSError: see `using_cache`.
    """
    with using_cache() as folder:
        for path in folder.glob(f"{name}.*.pt"):
            try:
                return load_hashed(path)
            except DamagedFileError as error:
                warnings.warn(f"{error}; it is made again", stacklevel=2)
                path.unlink(missing_ok=True)  # another process may have come before
        writable(folder)  # before the work
        remove_drafts(folder, older=_ABANDONED)
    state = make()
    with using_cache() as folder:
        save_hashed(folder, name, state)
    return state
