"""Checkpoints of a run: whole or not at all, checked when read, the last two kept."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from salnb._common.files import DamagedFileError, load_hashed, make_folder, save_hashed
from salnb.train.epoch_sums import EpochSums

__all__ = ["check_optimizer", "check_position", "last_checkpoint", "load_checkpoint", "save_checkpoint"]

# what the optimisers keep of each parameter that they have moved
_MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


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


def check_position(state: dict[str, Any], epoch_batches: int, columns: Iterable[str]) -> None:
    """Raise unless a checkpoint knows where its run is, and what it has come to so far.

    Args:
        state: of a run.
        epoch_batches: how many steps an epoch has.
        columns: what each epoch's line in `history` has at least, apart from its number.

    Raises:
        ValueError: the position is none, or steps, epochs, sums and schedule do not belong together.
    """
    step, epoch, batch = whole = [state[name] for name in ("step", "epoch", "batch")]
    if (
        any(type(number) is not int or number < 0 for number in whole)
        or step != epoch * epoch_batches + batch
    ):
        raise ValueError(
            f"step {step} is not that of {batch} batches after {epoch} epochs of {epoch_batches} batches"
        )
    rows = state["history"]
    lines = [row if isinstance(row, dict) else {} for row in rows] if isinstance(rows, list) else []
    if [row.get("epoch") for row in lines] != list(range(1, epoch + 1)):
        raise ValueError(f"history must have a line for each of {epoch} epochs, got {len(lines)}")
    if lacking := {name for name in columns if not all(_is_number(row.get(name)) for row in lines)}:
        raise ValueError(f"history must have numbers for {', '.join(sorted(lacking))} in each line")
    sums = state["sums"]
    # older checkpoints lack gamma
    names = [f.name for f in dataclasses.fields(EpochSums) if f.name != "gamma" or f.name in sums]
    if not all(_is_number(sums.get(name)) for name in names) or sums["steps"] != batch:
        raise ValueError(f"sums must have numbers of {batch} steps for {', '.join(names)}")
    if state["schedule"].get("last_epoch") != step:
        raise ValueError(f"schedule must be at step {step}, got {state['schedule'].get('last_epoch')}")


def check_optimizer(state: dict[str, Any], kind: str, parameters: Sequence[Tensor]) -> None:
    """Raise unless a checkpoint has what the optimiser keeps of the parameters.

    Args:
        state: of a run.
        kind: "sgd" or "adamw".
        parameters: those that are trained, in their order.

    Raises:
        ValueError: there is nothing after the first step, or something of another shape or not finite.
    """
    kept = state["optimizer"]["state"]
    if state["step"] and not kept and not state["scaler"]:  # a scaler may have left out all steps so far
        raise ValueError(f"optimizer must have a state after {state['step']} steps, got none")
    for number, moments in kept.items():
        for name in _MOMENTS[kind]:
            moment, shape = moments.get(name), parameters[number].shape
            if not isinstance(moment, Tensor) or moment.shape != shape or not moment.isfinite().all():
                raise ValueError(
                    f"optimizer must have finite numbers of shape {tuple(shape)} as {name} of parameter "
                    f"{number}"
                )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, unread."""
    return next(iter(_newest_first(folder)), None)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(filter(Path.is_file, folder.glob("step-*.pt")), reverse=True)
