"""Records of what was measured: written whole or not at all, with where, when and on what."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from salnb._common.files import make_folder, write_atomic
from salnb._version import __version__

if TYPE_CHECKING:  # records can be read and compared without waiting for it
    import torch
    from torch import nn

__all__ = [
    "commit",
    "last_commit",
    "parameters_sha256",
    "peak_memory",
    "provenance",
    "published",
    "read_record",
    "with_accessories",
    "write_record",
]

_PATIENCE = 30.0  # seconds that git may take


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically; folders are made as needed.

    Args:
        path: the file.
        record: what JSON can say; infinities and NaN, which it cannot, are refused.

    Raises:
        TypeError, ValueError: a value that JSON cannot hold.
        OSError: it cannot be written (a full disk, say); a record that was there before still is.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"record must be a mapping, got {type(record).__name__}")
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    make_folder(Path(path).parent)
    # half a surrogate pair, as in names of files that are no UTF-8, becomes JSON's own escape
    write_atomic(path, text.encode(errors="backslashreplace"))


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a JSON object, or one with infinities or NaN, which are no JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    def finite(number: str) -> float:
        return value if math.isfinite(value := float(number)) else refuse(number)

    try:
        text = Path(path).read_text(encoding="utf-8")
        record = json.loads(text, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a record: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a record: a JSON object is expected, got {type(record).__name__}")
    return record


def published() -> Path:
    """The folder of the records that the book shows: `results/` in a source tree, or its installed copy."""
    installed = Path(__file__).parent / "records"
    return installed if installed.exists() else Path(__file__).parent.parent / "results"


def with_accessories(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose accessories are found out now, so that none of them can cost what was measured.

    Args:
        record: its fields; an accessory is a function without arguments, which gives the value or raises.

    Returns:
        The fields. An accessory that raised is None, and a last field, "missing", says why.

    >>> with_accessories({"accuracy": 0.5, "half": lambda: 1 / 2, "none": lambda: 1 / 0})["missing"]
    {'none': 'ZeroDivisionError: division by zero'}
    """
    found, missing = {}, {}
    for name, value in record.items():
        try:
            found[name] = value() if callable(value) else value
        except Exception as error:
            found[name], missing[name] = None, f"{type(error).__name__}: {error}"
    return {**found, **({"missing": missing} if missing else {})}


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Where, when and with what something is measured.

    Args:
        device: what it is measured on, in torch's words.

    Returns:
        The time (UTC), the versions of Python and of the packages that matter, the commit of the source tree
        where there is one (with "+changes" where it was altered), the device's name. What cannot be found
        out is None, and "missing" says why.
    """
    import torch

    def device_name() -> str:
        if torch.device(device).type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    # torch's own words tell which CUDA it was built for, too
    packages = {"python": platform.python_version, "salnb": __version__, "torch": str(torch.__version__)}
    for package in ("torchvision", "lightning-fabric", "timm"):
        if importlib.util.find_spec(package.replace("-", "_")):
            packages[package] = functools.partial(metadata.version, package)
    machine = {"device": str(device), "device_name": device_name, "system": platform.platform}
    found = with_accessories({"commit": commit, **packages, **machine})
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": found.pop("commit"),
        "versions": {package: found.pop(package) for package in packages},
        **found,
    }


def commit() -> str | None:
    """The commit of the source tree this package lies in, or None where it is not in one.

    Raises:
        OSError, RuntimeError: there may be one, but git is not installed, fails or hangs.
    """
    place = Path(__file__)
    if not any((folder / ".git").exists() for folder in place.parents):
        return None

    # an installed copy may lie inside somebody else's repository, which does not track it
    if not _git(place, "ls-files", "--", place.name):
        return None
    changes = _git(place, "status", "--porcelain", "--", ".")
    return _git(place, "rev-parse", "HEAD") + ("+changes" if changes else "")


def last_commit(path: Path) -> str | None:
    """The commit that last changed a file of the source tree; None where this package is not in one.

    Raises:
        ValueError: the file is not committed as it is.
        OSError, RuntimeError: git is not installed, fails or hangs.
    """
    if commit() is None:
        return None
    if _git(path, "status", "--porcelain", "--", path.name):
        raise ValueError(f"{path.name} is not committed as it is: commit it before anything is run")
    return _git(path, "log", "-1", "--format=%H", "--", path.name) or None


def _git(place: Path, *arguments: str) -> str:
    """What git says in the folder of a file."""
    command = ["git", "-C", str(place.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"git {arguments[0]} takes more than {_PATIENCE:g} s") from None
    if done.returncode:  # in its own words it tells of this machine's folders
        raise RuntimeError(f"git {arguments[0]} ended with status {done.returncode}")
    return done.stdout.strip()


def parameters_sha256(model: nn.Module) -> str:
    """A SHA-256 over names, shapes, types and values of all parameters and buffers, in hexadecimal."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: of the GPU, or of this process where there is none."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # counted in kibibytes, but on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
