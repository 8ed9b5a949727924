"""A folder as if on a file system that cannot be written, whoever asks: permissions do not bind root."""

import errno
import os
import sys

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"chmod", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate", "utime"}


def protect(folder, code=errno.EROFS):
    """From now on, to the end of this process; gives the list of the attempts to write or to lock there."""
    folder, attempts = os.path.realpath(folder), []

    def inside(path):
        if isinstance(path, int):
            path = os.path.realpath(f"/proc/self/fd/{path}") if path >= 0 else ""
        return f"{os.path.abspath(os.fsdecode(path))}/".startswith(f"{folder}/")

    def hook(event, args):
        kind, _, name = event.rpartition(".")
        if event == "open":
            paths = args[:1] if args[2] & _WRITES else ()
        elif event == "fcntl.flock" or (kind == "os" and name in _CHANGES):
            paths = args[:2] if name in ("rename", "link", "symlink") else args[:1]
        else:
            return
        hit = [path for path in paths if isinstance(path, str | bytes | int) and inside(path)]
        if hit and event == "os.mkdir" and os.path.isdir(hit[0]):
            return  # which the system answers with "exists", also where it cannot be written
        if hit:
            attempts.append((event, str(hit[0])))
            raise OSError(code, os.strerror(code), str(hit[0]))

    sys.addaudithook(hook)
    return attempts
