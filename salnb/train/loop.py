"""One training run, from its settings to its summary; read it from `fit` on.

What a run leaves in its folder: ``config.json``; ``metrics.jsonl``, a line for each epoch; ``checkpoints/``;
and, at the end, ``summary.json``.

Nothing is lost when it is stopped, however it is stopped. The state of a run is its position (epoch, batch),
the model, the optimiser, its schedule, the loss scaler, and what was summed up since the epoch began. Random
numbers have no state to save: each step draws from generators whose seeds are made of the run's seed and the
step's number, and each epoch's order likewise. A resumed run draws what it would have drawn anyway.
"""

import contextlib
import itertools
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from salnb import data, results
from salnb._common import catalog
from salnb._common.files import locked, remove_drafts, write_atomic
from salnb._common.progress import progress
from salnb.objective import Losses, Objective
from salnb.train.checkpoint import load_checkpoint
from salnb.train.config import Config
from salnb.train.evaluate import evaluate
from salnb.train.run import Interrupted, NonFiniteError, Run
from salnb.train.setup import (
    derived_seed,
    make_fabric,
    make_objective,
    make_optimizer,
    make_schedule,
    noticed_signals,
    numerics,
)

__all__ = ["Config", "Interrupted", "NonFiniteError", "fit"]

TERMS = ("class_loss", "invariance_loss", "saliency_loss", "total")
# how many steps a GPU may be ahead of the look at its losses, for which it has to be waited
_AHEAD = 20


def say(line: str) -> None:
    """Print a line at once, to a file as well."""
    print(line, flush=True)


def fit(
    config: Config, *, resume: bool = False, log: Callable[[str], object] = say, bar: bool = True
) -> dict[str, Any]:
    """Train a network as the settings say.

    Args:
        config: the settings.
        resume: continue the run in ``config.out`` where it was stopped, if there is one; a finished one is
            not run again.
        log: is given a line after each epoch.
        bar: show how far an epoch is, on a terminal.

    Returns:
        What ``summary.json`` holds: the test's accuracy, loss terms, share of saliency on the object,
        seconds, peak memory, a SHA-256 of the parameters, the settings, and where and when it was run.

    Raises:
        ValueError, FileExistsError: the settings do not suit the machine, the data or the folder, or
            another process is at work in it.
        NonFiniteError: a loss is no longer finite; the message names step, term and last good checkpoint.
        Interrupted: a signal stopped the run, which has been saved.
        OSError: something could not be written; the last good checkpoint still is there.
    """
    config.check_run(resume=resume)
    folder = Path(config.out)
    if (folder / "summary.json").exists():
        return results.read_record(folder / "summary.json")

    fabric = make_fabric(config)
    with numerics(config), contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            stack.enter_context(locked(folder))
            config.check_run(resume=resume)  # another process may have been at work until now
        torch.manual_seed(derived_seed(config.seed, "weights"))
        objective = make_objective(config, data.Share(fabric.global_rank, fabric.world_size))
        with fabric.rank_zero_first():  # the first prepares the files that all read
            dataset = data.load(config.data, config.size, workers=config.workers)
        # before this there is nothing to be saved: a signal acts at once
        signals = stack.enter_context(noticed_signals())
        run = make_run(config, fabric, objective, dataset, signals, log)
        run.bar = bar and fabric.is_global_zero
        with fabric.rank_zero_first():  # the first sets damaged checkpoints aside
            state = load_checkpoint(run.checkpoints)
        if state:
            run.load_state_dict(state)
        if fabric.is_global_zero:
            remove_drafts(folder)
            remove_drafts(run.checkpoints)

        run.write("config.json", config.to_dict())
        while run.epoch < config.epochs:
            train_epoch(run)
            finish_epoch(run, look_at(run, run.dataset.validation))
        summary = summarize(run, look_at(run, run.dataset.test))
        run.write("summary.json", summary)
        fabric.barrier()
    return summary


# --- the parts ---------------------------------------------------------------------------------------------


def make_run(
    config: Config,
    fabric: Fabric,
    objective: Objective,
    dataset: data.Dataset,
    signals: list[int],
    log: Callable[[str], object],
) -> Run:
    """Everything in its place, before the first step."""
    if config.train_images is not None:
        dataset.train = dataset.train.first(config.train_images)
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        if isinstance(split, data.Arrays):
            setattr(dataset, name, split.to(fabric.device))
    steps = config.epochs * (len(dataset.train) // config.batch_size)
    if not steps:
        raise ValueError(
            f"batch_size must be at most {len(dataset.train)}, the number of training images, "
            f"got {config.batch_size}"
        )
    optimizer = make_optimizer(config, objective)
    schedule = make_schedule(config, optimizer, steps)
    forward, optimizer = fabric.setup(objective, optimizer)
    if config.compile:
        objective.compile()
    return Run(config, fabric, objective, forward, optimizer, schedule, dataset, signals, log)


# --- the loop ----------------------------------------------------------------------------------------------


def train_epoch(run: Run) -> None:
    """Train on the rest of an epoch's batches."""
    config, fabric = run.config, run.fabric
    run.objective.train()
    pending: list[tuple[int, bool, Tensor]] = []
    look_every = 1 if fabric.device.type == "cpu" else _AHEAD
    with progress(
        what=f"epoch {run.epoch + 1}/{config.epochs}",
        initial=run.batch,
        total=run.epoch_batches,
        bar_format="{desc}:{percentage:3.0f}%|{bar:8}| {remaining}{postfix}",  # leaves room for the losses
        disable=None if run.bar else True,
    ) as bar:
        for images, labels, _ in data.batches(
            run.dataset.train,
            config.size,
            fabric.device,
            batch_size=config.batch_size,
            seed=derived_seed(config.seed, "order", run.epoch),
            start=run.batch,
            share=run.share,
        ):
            salient = run.objective.current_gamma() > 0
            losses = run.forward(images, labels, step_generator(run))
            pending.append((run.step + 1, salient, _row(losses, labels)))
            looked = len(pending) == look_every or (bool(run.signals) and run.share.of == 1)
            # before the parameters are changed
            stop = collect(run, pending) if looked else False
            fabric.backward(losses.total)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.schedule.step()
            run.step += 1
            run.batch += 1
            bar.update()
            if looked:
                bar.set_postfix_str(shown(run), refresh=False)
                if stop:
                    interrupt(run)
                due = time.perf_counter() - run.saved >= 60 * config.save_minutes
                if due and run.batch < run.epoch_batches:  # at the end of an epoch it is saved anyhow
                    run.save()
    if pending:
        collect(run, pending)
    run.lap()
    run.check_finite()


def step_generator(run: Run) -> torch.Generator:
    """Seed all that a step draws from; gives the generator of the augmentation.

    Processes draw alike where each takes its part of what is drawn for the whole batch, and apart otherwise.
    """
    seed, rank, device = run.config.seed, run.fabric.global_rank, run.fabric.device
    # torch.manual_seed would note down where it was called from, for each kind of device that is not there
    torch.default_generator.manual_seed(own := derived_seed(seed, "model", run.step, rank))
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(own)
    apart = rank if run.objective.augmentation.least_samples > 1 else 0
    generator = torch.Generator(device)
    return generator.manual_seed(derived_seed(seed, "augmentation", run.step, apart))


def collect(run: Run, pending: list[tuple[int, bool, Tensor]]) -> bool:
    """Add the steps since the last look to the sums; this waits for the device.

    Args:
        run: the run.
        pending: the number of each step, whether it had a saliency loss, and its `_row`; emptied.

    Returns:
        Whether one of the processes was asked to stop.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    rows = torch.stack([row for _, _, row in pending])
    rows[:, -1] = float(bool(run.signals))
    if run.share.of > 1:
        rows = run.fabric.all_reduce(rows, reduce_op="mean")  # type: ignore[assignment]
    asked = False
    for (step, salient, _), values in zip(pending, rows.tolist(), strict=True):
        for term, value in zip(TERMS, values, strict=False):
            if not math.isfinite(value):
                raise NonFiniteError(f"{term} is {value} in step {step}; {run.last_good()}")
        named = dict(zip((*TERMS, "accuracy", "asked"), values, strict=True))
        asked = asked or named.pop("asked") > 0
        for name, value in (named | {"steps": 1.0, "salient_steps": float(salient)}).items():
            run.sums[name] = run.sums.get(name, 0.0) + value
    pending.clear()
    return asked


def _row(losses: Losses, labels: Tensor) -> Tensor:
    """A step's loss terms, the share of its originals that were classified rightly, and a free place."""
    right = (losses.logits[: len(labels)].argmax(1) == labels).float().mean()
    terms = [getattr(losses, term).detach().float() for term in TERMS]
    return torch.stack([*terms, right, torch.zeros_like(right)])


def means(sums: dict[str, float]) -> dict[str, float]:
    """What an epoch's sums come to for a step; of the saliency loss, for a step that had one."""
    steps = {"saliency_loss": max(sums["salient_steps"], 1.0)}
    return {name: sums[name] / steps.get(name, sums["steps"]) for name in (*TERMS, "accuracy")}


def shown(run: Run) -> str:
    """What the bar shows; the most of it fits into 80 columns."""
    now, config = means(run.sums), run.config
    weights = {"class": config.alpha, "invariance": config.beta, "saliency": config.gamma}
    losses = [f"{name} {now[f'{name}_loss']:.3f}" for name, weight in weights.items() if weight]
    return ", ".join([f"accuracy {now['accuracy']:.3f}", *losses, f"total {now['total']:.3f}"])


def finish_epoch(run: Run, validation: dict[str, float]) -> None:
    """Note down an epoch, and save."""
    sums, config = run.sums, run.config
    row: dict[str, Any] = {"epoch": run.epoch + 1, "step": run.step}
    row |= {"train_accuracy" if name == "accuracy" else name: mean for name, mean in means(sums).items()}
    row |= {f"validation_{name}": value for name, value in validation.items()}
    row |= {
        "learning_rate": run.schedule.get_last_lr()[0],
        "seconds": sums["seconds"],
        "images_per_second": sums["steps"] * config.batch_size / sums["seconds"],
    }
    run.history.append(row)
    run.lap()
    run.epoch, run.batch, run.sums = run.epoch + 1, 0, {}
    if run.fabric.is_global_zero:
        lines = "".join(json.dumps(line) + "\n" for line in run.history)
        with run.explained():
            write_atomic(Path(config.out) / "metrics.jsonl", lines.encode())
        run.log(
            f"epoch {run.epoch}/{config.epochs}: "
            + ", ".join(f"{name} {row[name]:.4f}" for name in TERMS)
            + f", accuracy {row['train_accuracy']:.3f} (validation {row['validation_accuracy']:.3f}), "
            f"{row['seconds']:.1f} s"
        )
    run.save()


def look_at(run: Run, split: data.Split) -> dict[str, float]:
    """Accuracy, loss and share of saliency on the object; see `evaluate`."""
    numbers = itertools.count()

    def between() -> None:
        number = next(numbers)
        asked = bool(run.signals)
        if run.share.of > 1:
            # all processes have these batches, and so come here; the last may be too small for some
            if number % _AHEAD or number >= len(split) // run.config.batch_size:
                return
            flag = torch.tensor(float(asked), device=run.fabric.device)
            asked = float(run.fabric.all_reduce(flag, reduce_op="sum")) > 0  # type: ignore[arg-type]
        if asked:
            interrupt(run)

    return evaluate(
        run.objective.model,
        split,
        run.fabric,
        num_classes=catalog.DATA[run.config.data].num_classes,
        size=run.config.size,
        batch_size=run.config.batch_size,
        between=between,
    )


def interrupt(run: Run) -> None:
    """Save and stop.

    Raises:
        Interrupted: always.
    """
    run.save()
    run.fabric.barrier()  # a process that ended would have torchrun end the one that saves
    number = run.signals[0] if run.signals else signal.SIGTERM  # another process was asked
    raise Interrupted(
        number,
        f"stopped by {signal.Signals(number).name} after step {run.step}, saved in {run.checkpoints}: go on "
        "with --resume",
    )


def summarize(run: Run, test: dict[str, float]) -> dict[str, Any]:
    """What the run comes to."""
    last, device = run.history[-1], run.fabric.device
    run.lap()
    return {
        **{f"test_{name}": value for name, value in test.items()},
        "validation_accuracy": last["validation_accuracy"],
        "train_accuracy": last["train_accuracy"],
        **{term: last[term] for term in TERMS},
        "epochs": run.epoch,
        "steps": run.step,
        "seconds": run.seconds,
        "training_seconds": sum(row["seconds"] for row in run.history),
        "peak_memory_bytes": results.peak_memory(device),
        "processes": run.share.of,
        "seed": run.config.seed,
        "parameters_sha256": results.parameters_sha256(run.objective.model),
        "config": run.config.to_dict(),
        "provenance": results.provenance(str(device)),
    }
