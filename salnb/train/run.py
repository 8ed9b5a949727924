"""A training run under way: where it is, what it saves, and what it says when it cannot go on."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning_fabric import Fabric
from torch import Tensor

from salnb import data, results
from salnb._common.files import remove_drafts, write_atomic
from salnb.objective import Losses, Objective
from salnb.train import setup
from salnb.train.checkpoint import (
    check_optimizer,
    check_position,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from salnb.train.config import Config
from salnb.train.epoch_sums import TERMS, EpochSums, StepTerms

__all__ = ["AHEAD", "Interrupted", "NonFiniteError", "Run"]

# how many steps a GPU may be ahead of the look at its losses, for which it has to be waited
AHEAD = 20
_POSITION = ("step", "epoch", "batch", "seconds", "history")


class NonFiniteError(ArithmeticError):
    """A loss, or a parameter, became infinite or not a number."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, by the signal SIGTERM or Ctrl-C, and has been saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number

    def __reduce__(self) -> tuple[Any, ...]:
        """Made of both again in another process."""
        return type(self), (self.signal, *self.args)


@dataclass
class Run:
    """A run under way."""

    config: Config
    fabric: Fabric
    objective: Objective
    dataset: data.Dataset
    signals: list[int]  # the numbers of those that ask it to stop
    log: Callable[[str], object]  # is given a line after each epoch
    bar: bool = True  # shows how far an epoch is
    step: int = 0  # number of optimiser steps done
    epoch: int = 0  # number of epochs finished
    batch: int = 0  # number of batches done in the epoch under way
    seconds: float = 0.0  # spent on it so far, over all its resumptions
    sums: EpochSums = field(default_factory=EpochSums)  # of the epoch under way
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of `metrics.jsonl`
    clock: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Make what trains, and bring it onto the device."""
        config, fabric = self.config, self.fabric
        optimizer = setup.make_optimizer(config, self.objective)
        self.epoch_batches = len(self.dataset.train) // config.batch_size
        self.schedule = setup.make_schedule(config, optimizer, config.epochs * self.epoch_batches)
        self.forward: Callable[..., Losses]
        self.optimizer: Any
        self.forward, self.optimizer = fabric.setup(self.objective, optimizer)
        if config.compile:
            self.objective.compile()
        # what has a state
        self.parts = {
            "objective": self.objective,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": fabric.strategy.precision,
        }
        self.share = data.Share(fabric.global_rank, fabric.world_size)  # of each batch
        self.checkpoints = Path(config.out) / "checkpoints"

    def known_of(self, images: Tensor, masks: Tensor | None, generator: torch.Generator) -> dict[str, Any]:
        """What a step is given beside images and labels: their swapped scenes, and where the objects are."""
        given: dict[str, Any] = {"masks": masks} if self.config.right_reasons else {}
        if self.config.swap:
            given["partners"] = self.swapped(images, masks, generator, self.share)
        return given

    def swapped(
        self, images: Tensor, masks: Tensor | None, generator: torch.Generator, share: data.Share = data.WHOLE
    ) -> Tensor | None:
        """The same objects on other photographs; None where the data set has none."""
        backgrounds = self.dataset.backgrounds
        if backgrounds is None or masks is None:
            return None
        return data.on_other_photographs(images, masks, backgrounds, generator, share)

    def lap(self) -> None:
        """Count the time since the last lap."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.seconds += passed
        self.sums.seconds += passed

    def add_steps(self, pending: list[StepTerms]) -> None:
        """Add steps to the epoch's sums, and empty the list; this waits for the device."""
        rows = torch.stack([terms.values for terms in pending])
        if self.share.of > 1:
            rows = self.fabric.all_reduce(rows, reduce_op="mean")  # type: ignore[assignment]
        for (step, salient, _), values in zip(pending, rows.tolist(), strict=True):
            for term, value in zip(TERMS, values, strict=False):
                if not math.isfinite(value):
                    raise NonFiniteError(f"{term} is {value} in step {step}; {self.last_good()}")
            self.sums.add(values, salient=salient)
        pending.clear()

    def stop_requested(self) -> bool:
        """Whether a process was asked to stop; all have to come here together."""
        if self.share.of == 1:
            return bool(self.signals)
        asked = torch.tensor(float(bool(self.signals)), device=self.fabric.device)
        return float(self.fabric.all_reduce(asked, reduce_op="sum")) > 0  # type: ignore[arg-type]

    def interrupt(self) -> NoReturn:
        """Save and stop."""
        self.save()
        self.fabric.barrier()  # a process that ended would have torchrun end the one that saves
        number = self.signals[0] if self.signals else signal.SIGTERM  # another process was asked
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.step}, saved in {self.checkpoints}: "
            "go on with --resume",
        )

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

    def write_metrics(self) -> None:
        """Write a line for each epoch."""
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        with self.explained():
            write_atomic(Path(self.config.out) / "metrics.jsonl", lines.encode())

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

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole, and remove what a killed process left behind."""
        try:
            with self.fabric.rank_zero_first():  # the first sets damaged checkpoints aside
                state = load_checkpoint(self.checkpoints)
            if state:
                self.load_state_dict(state)
        except OSError:  # which names the file
            raise
        except Exception as error:  # of another network, or of another version of torch
            why = " ".join(f"{type(error).__name__}: {error}".split())
            path = last_checkpoint(self.checkpoints)
            way = "without this file it would go on from the one before, or begin again"
            raise ValueError(f"the run cannot go on from {path}: {why}; {way}") from error
        if self.fabric.is_global_zero:
            remove_drafts(Path(self.config.out))
            remove_drafts(self.checkpoints)
            if self.history:  # somebody may have altered the file
                self.write_metrics()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        position = {name: getattr(self, name) for name in _POSITION} | {"sums": asdict(self.sums)}
        return position | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, once it is known to be whole."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_position(
            state, self.epoch_batches, (*TERMS, "train_accuracy", "validation_accuracy", "seconds")
        )
        check_optimizer(state, self.config.optimizer, trained)
        for name in _POSITION:
            setattr(self, name, state[name])
        self.sums = EpochSums(**state["sums"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if self.objective.steps_done != self.step:
            raise ValueError(f"objective must be at step {self.step}, got {self.objective.steps_done}")

    def progress_text(self) -> str:
        """What the bar shows beside itself; the most of it fits into 80 columns."""
        means, config = self.sums.epoch_means(), self.config
        weights = {"class": config.alpha, "invariance": config.beta, "saliency": config.gamma}
        losses = [f"{name} {means[f'{name}_loss']:.3f}" for name, weight in weights.items() if weight]
        return ", ".join([f"accuracy {means['accuracy']:.3f}", *losses, f"total {means['total']:.3f}"])

    def summary(self, test: dict[str, Any]) -> dict[str, Any]:
        """What the run comes to, with what was found on the test split."""
        self.lap()
        last, device = self.history[-1], self.fabric.device
        record = {
            **{f"test_{name}": value for name, value in test.items()},
            "validation_accuracy": last["validation_accuracy"],
            "train_accuracy": last["train_accuracy"],
            **{term: last[term] for term in TERMS},
            **({"gammas": [row["gamma"] for row in self.history]} if self.config.balance else {}),
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": self.seconds,
            "training_seconds": sum(row["seconds"] for row in self.history),
            "peak_memory_bytes": lambda: results.peak_memory(device),
            "processes": self.share.of,
            "seed": self.config.seed,
            "parameters_sha256": lambda: results.parameters_sha256(self.objective.model),
            "config": self.config.to_dict(),
            "provenance": lambda: results.provenance(str(device)),
        }
        return results.with_accessories(record)
