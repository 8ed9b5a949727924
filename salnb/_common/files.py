"""Files that are there whole or not at all, and that tell whether they were altered since."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["DamagedFileError", "check_writable", "load_hashed", "locked", "make_folder"]
__all__ += ["place_error", "remove_drafts", "save_hashed", "sha256", "write_atomic"]

# what a killed process may leave behind begins with this
DRAFT = ".draft-"
# of the 64 digits of a SHA-256, in a file's name; enough against accidents, short enough to be read
_DIGITS = 16
# seconds to wait for a lock: the processes that a killed one had started notice its end after some
_PATIENCE = 10.0


# what is wrong with a place, and not with what is written there or read from a network
_OF_PLACES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}


class DamagedFileError(RuntimeError):
    """A file is not what was written: it is truncated or altered."""


def check_writable(path: Path) -> None:
    """Raise what writing a file would raise, whose folders need not be there yet.

    Raises:
        OSError: it is a folder, lies in what is none or cannot be written to, or a name is too long.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    existing = next(folder for folder in path.parents if os.path.exists(folder))
    with tempfile.TemporaryFile(dir=existing):
        pass
    for name in (path, *(existing / part for part in path.parts)):  # names may be too long
        with contextlib.suppress(FileNotFoundError):
            name.lstat()


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file, in a folder that exists, so that its old or its new content is there, never a part.

    Raises:
        OSError: the content could not be written (a full disk, say); what was there before still is. It names
            the file.
    """
    path = Path(path)
    with _named(path), _draft(path.parent) as file:
        file.write(content)
        _place(file, path)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, unless it is there; an OSError names it."""
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)


def save_hashed(folder: Path, stem: str, state: Any) -> Path:
    """Save what `torch.save` can, atomically, as `stem.<sixteen digits>.pt`, in a folder that exists.

    The digits are of its SHA-256: it needs no second file to be checked against, newer or older than it.
    """
    import torch

    with _draft(folder) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # about positions in the file, whatever went wrong before
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.flush()
        path = folder / f"{stem}.{sha256(Path(file.name))[:_DIGITS]}.pt"
        _place(file, path)
    return path


def load_hashed(path: Path) -> Any:
    """Load what `save_hashed` saved, tensors and plain values only, onto the CPU.

    Raises:
        DamagedFileError: the content does not belong to the name.
    """
    import torch

    digest = sha256(path)[:_DIGITS]
    if digest != path.name.split(".")[-2]:
        raise DamagedFileError(f"{path} is truncated or altered: its SHA-256 begins with {digest}")
    return torch.load(path, map_location="cpu", weights_only=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_error(error: BaseException | None) -> OSError | None:
    """Of an error and those behind it, the one that says that a place cannot be read, written or is full."""
    while error is not None:
        # Hugging Face's library looks for room ahead, and has no number for what it finds
        if isinstance(error, OSError) and (error.errno in _OF_PLACES or "disk space" in str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def remove_drafts(folder: Path, *, older: float = 0.0) -> None:
    """Remove what a killed process left behind, if it was written `older` seconds ago.

    Zero is for a folder in which nobody else may be writing now.
    """
    for path in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, until the end of this block or of this process.

    The folder is made if need be, and if nothing has come into it by the end, removed.

    Raises:
        FileExistsError: one is at work there.
    """
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise FileExistsError(f"out {folder}: another process is at work there") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # something is in it
            folder.rmdir()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What goes wrong is told of this path, and not of a draft or of nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _draft(folder: Path) -> Iterator[IO[bytes]]:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=DRAFT, delete=False) as file:
        try:
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):  # it has its name by now
                os.unlink(file.name)


def _place(file: IO[bytes], path: Path) -> None:
    """Give a draft its name, after its content has reached the disk."""
    file.flush()
    os.fchmod(file.fileno(), 0o644)  # drafts are private
    os.fsync(file.fileno())
    os.replace(file.name, path)
    # the name is an entry of the folder, which reaches the disk on its own
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
