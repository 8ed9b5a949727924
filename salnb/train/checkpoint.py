"""Checkpoints of a run: whole or not at all, checked when read, the last two kept."""

import warnings
from pathlib import Path
from typing import Any

from salnb._common.files import DamagedFileError, load_hashed, make_folder, save_hashed

__all__ = ["last_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save the state of a run, and then remove all but this checkpoint and the one before it.

    Args:
        folder: where the run's checkpoints are; made if need be.
        step: number of optimiser steps done.
        state: what `torch.load` can load with `weights_only=True`.

    Raises:
        OSError: it could not be written (a full disk, say): the checkpoints that were there still are.
    """
    make_folder(folder)
    path = save_hashed(folder, f"step-{step:09d}", state)
    # one of the same step, saved before its epoch was evaluated, says less
    others = [old for old in _newest_first(folder) if old.name.split(".")[0] != path.name.split(".")[0]]
    # the one before is there in case the last is damaged
    for old in {*_newest_first(folder)} - {path, *others[:1]}:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is none.

    Warns:
        UserWarning: a checkpoint is damaged; it gets the ending `.damaged`, and the one before it is used.
    """
    for path in _newest_first(folder):
        try:
            return load_hashed(path)
        except DamagedFileError as error:
            path.rename(path.with_suffix(".damaged"))
            warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
    return None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, unread."""
    return next(iter(_newest_first(folder)), None)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(filter(Path.is_file, folder.glob("step-*.pt")), reverse=True)
