"""A training run under way: where it is, what it saves, and what it says when it cannot go on."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from salnb import data, results
from salnb.objective import Losses, Objective
from salnb.train.checkpoint import last_checkpoint, save_checkpoint
from salnb.train.config import Config

_POSITION = ("step", "epoch", "batch", "seconds", "sums", "history")


class NonFiniteError(ArithmeticError):
    """A loss, or a parameter, became infinite or not a number."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, by SIGTERM or Ctrl-C, and has been saved.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


@dataclass
class Run:
    """A run under way.

    Attributes:
        step: number of optimiser steps done.
        epoch: number of epochs finished.
        batch: number of batches done in the epoch under way.
        seconds: spent on it so far, over all its resumptions.
        sums: of the epoch under way: loss terms, accuracy, steps, steps with a saliency loss, seconds.
        history: the lines of ``metrics.jsonl``.
        bar: whether it shows how far an epoch is.
    """

    config: Config
    fabric: Fabric
    objective: Objective
    forward: Callable[..., Losses]
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LRScheduler
    dataset: data.Dataset
    signals: list[int]
    log: Callable[[str], object]
    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    bar: bool = True
    clock: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.perf_counter)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.config.out) / "checkpoints"

    @property
    def share(self) -> data.Share:
        """This process's part of each batch."""
        return data.Share(self.fabric.global_rank, self.fabric.world_size)

    @property
    def epoch_batches(self) -> int:
        """Batches in an epoch."""
        return len(self.dataset.train) // self.config.batch_size

    def lap(self) -> None:
        """Count the time since the last lap."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.seconds += passed
        self.sums["seconds"] = self.sums.get("seconds", 0.0) + passed

    def save(self) -> None:
        """Write a checkpoint."""
        self.lap()
        self.check_finite()
        if self.fabric.is_global_zero:
            with self.explained():
                save_checkpoint(self.checkpoints, self.step, self.state_dict())
        self.saved = time.perf_counter()

    def check_finite(self) -> None:
        """Raise if a parameter or a running statistic is not finite: no good checkpoint can be made then."""
        tensors = [*self.objective.parameters(), *self.objective.buffers()]
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors])
        if not finite.all():
            raise NonFiniteError(f"parameters are not finite after step {self.step}; {self.last_good()}")

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write a record into the run's folder."""
        if self.fabric.is_global_zero:
            with self.explained():
                results.write_record(Path(self.config.out) / name, record)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What cannot be written stops the run; say what is left of it."""
        try:
            yield
        except OSError as error:
            text = (
                f"nothing more could be written after step {self.step}: {error.strerror}; {self.last_good()}"
            )
            raise OSError(error.errno, text) from error

    def last_good(self) -> str:
        """Which checkpoint a run that cannot go on leaves behind."""
        path = last_checkpoint(self.checkpoints)
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {name: getattr(self, name) for name in _POSITION} | {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.fabric.strategy.precision.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in _POSITION:
            setattr(self, name, state[name])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
