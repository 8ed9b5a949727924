"""Records of what was measured: written whole or not at all, with where, when and on what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salnb._common.files import write_atomic
from salnb._version import __version__

if TYPE_CHECKING:  # records can be read and compared without waiting for it
    import torch
    from torch import nn

__all__ = [
    "commit",
    "parameters_sha256",
    "peak_memory",
    "provenance",
    "published",
    "read_record",
    "write_record",
]


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically; folders are made as needed.

    Args:
        path: the file.
        record: what JSON can say; infinities and NaN, which it cannot, are refused.

    Raises:
        TypeError, ValueError: a value that JSON cannot hold.
    """
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a JSON object.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a record: a JSON object is expected, got {type(record).__name__}")
    return record


def published() -> Path:
    """The folder of the records that the book shows: `results/` in a source tree, or its installed copy."""
    installed = Path(__file__).parent / "records"
    return installed if installed.exists() else Path(__file__).parent.parent / "results"


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Where, when and with what something is measured.

    Args:
        device: what it is measured on, in torch's words.

    Returns:
        The time (UTC), the versions of Python and of the packages that matter, the commit of the
        source tree where there is one (with "+changes" where it was altered), the device's name.
    """
    import torch

    # torch's own words tell which CUDA it was built for, too
    torch_version = str(torch.__version__)
    versions = {"python": platform.python_version(), "salnb": __version__, "torch": torch_version}
    for package in ("torchvision", "lightning-fabric", "timm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    name = (
        torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "system": platform.platform(),
    }


def commit() -> str | None:
    """The commit of the source tree this package lies in, or None where it is not in one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # an installed copy may lie inside somebody else's repository, which does not track it
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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
