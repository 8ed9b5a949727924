"""One training run, from its settings to its summary; read it from `fit` on.

What a run leaves in its folder: `config.json`; `metrics.jsonl`, a line for each epoch; `checkpoints/`;
`split.json` where it split a folder of images; and, at the end, `model.safetensors` with `model.json`, which
`salnb.load` reads, and `summary.json`.

Nothing is lost when it is stopped, however it is stopped. The state of a run is its position (epoch, batch),
the model, the optimiser, its schedule, the loss scaler, and what was summed up since the epoch began. Random
numbers have no state to save: each step draws from generators whose seeds are made of the run's seed and the
step's number, and each epoch's order likewise. A resumed run draws what it would have drawn anyway.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from salnb import data, results, trained
from salnb._common.files import locked
from salnb._common.progress import log_line, progress
from salnb.train import setup
from salnb.train.config import Config
from salnb.train.epoch_sums import TERMS, EpochSums, StepTerms
from salnb.train.evaluate import evaluate, evaluate_groups, evaluate_maps, evaluate_turned
from salnb.train.run import AHEAD, Interrupted, NonFiniteError, Run
from salnb.train.signals import noticed_signals

__all__ = ["Config", "Interrupted", "NonFiniteError", "fit"]


def fit(
    config: Config, *, resume: bool = False, log: Callable[[str], object] = log_line, bar: bool = True
) -> dict[str, Any]:
    """Train a network as the settings say.

    Args:
        config: the settings.
        resume: continue the run in `config.out` where it was stopped, if there is one; a finished one is
            not run again.
        log: is given a line after each epoch.
        bar: show how far an epoch is, on a terminal.

    Returns:
        What `summary.json` holds: the test's accuracy, how far its maps agree (see `salnb.agreement`) and
        their share on the object, loss terms, with `balance` the gamma that each epoch had on average,
        seconds, peak memory, a SHA-256 of the parameters, the settings, and where and when it was run.

    Raises:
        ValueError, FileExistsError: the settings do not suit the machine, the data or the folder, or
            another process is at work in it.
        NonFiniteError: a loss is no longer finite; the message names step, term and last good checkpoint.
        Interrupted: a signal stopped the run, which has been saved.
        OSError: something could not be written; the last good checkpoint still is there.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    config.check_run(resume=resume)
    folder = Path(config.out)
    if (folder / "summary.json").exists():
        return results.read_record(folder / "summary.json")

    trained.check_can_save()  # not found out at the end
    fabric = setup.make_fabric(config)
    with setup.numerics(config), contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            stack.enter_context(locked(folder))
            config.check_folder(resume=resume)  # another process may have been at work until now
        torch.manual_seed(setup.derived_seed(config.seed, "weights"))
        share = data.Share(fabric.global_rank, fabric.world_size)
        objective = setup.make_objective(config, share, log if fabric.is_global_zero else str)
        dataset = setup.make_dataset(config, fabric)
        # before this there is nothing to be saved: a signal acts at once
        signals = stack.enter_context(noticed_signals())
        run = Run(config, fabric, objective, dataset, signals, log, bar and fabric.is_global_zero)
        run.restore()
        run.write("config.json", config.to_dict())
        while run.epoch < config.epochs:
            train_epoch(run)
            finish_epoch(run, evaluate(run, run.dataset.validation))
        test = run.dataset.test
        found = evaluate(run, test) | evaluate_maps(run, test) | evaluate_turned(run, test)
        found |= evaluate_groups(run, test)
        summary = run.summary(found)
        if fabric.is_global_zero:
            with run.explained():
                trained.save(folder, objective.model, config.model, dataset.classes, config.size)  # type: ignore[arg-type]
        run.write("summary.json", summary)
        fabric.barrier()
    return summary


# --- the loop ----------------------------------------------------------------------------------------------


def train_epoch(run: Run) -> None:
    """Train on the rest of an epoch's batches."""
    config, fabric = run.config, run.fabric
    run.objective.train()
    pending: list[StepTerms] = []
    look_every = 1 if fabric.device.type == "cpu" else AHEAD
    with progress(
        what=f"epoch {run.epoch + 1}/{config.epochs}",
        initial=run.batch,
        total=run.epoch_batches,
        bar_format="{desc}:{percentage:3.0f}%|{bar:8}| {remaining}{postfix}",  # leaves room for the losses
        disable=None if run.bar else True,
    ) as bar:
        for images, labels, masks in data.batches(
            run.dataset.train,
            config.size,
            fabric.device,
            batch_size=config.batch_size,
            seed=setup.derived_seed(config.seed, "order", run.epoch),
            start=run.batch,
            share=run.share,
        ):
            generator = step_generator(run)
            known = run.known_of(images, masks, generator)
            losses = run.forward(images, labels, generator, **known)
            pending.append(StepTerms.of(run.step + 1, losses, labels))
            looked = len(pending) == look_every or (bool(run.signals) and run.share.of == 1)
            stop = looked and run.stop_requested()
            if looked:
                run.add_steps(pending)  # before the parameters are changed
            fabric.backward(losses.total)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.schedule.step()
            run.step += 1
            run.batch += 1
            bar.update()
            if looked:
                bar.set_postfix_str(run.progress_text(), refresh=False)
                if stop:
                    run.interrupt()
                due = time.perf_counter() - run.saved >= 60 * config.save_minutes
                if due and run.batch < run.epoch_batches:  # at the end of an epoch it is saved anyhow
                    run.save()
    if pending:
        run.add_steps(pending)
    run.lap()
    run.check_finite()


def step_generator(run: Run) -> torch.Generator:
    """Seed all that a step draws from; gives the generator of the augmentation.

    Processes draw alike where each takes its part of what is drawn for the whole batch, and apart otherwise.
    """
    seed, rank, device = run.config.seed, run.fabric.global_rank, run.fabric.device
    # torch.manual_seed would note down where it was called from, for each kind of device that is not there
    torch.default_generator.manual_seed(own := setup.derived_seed(seed, "model", run.step, rank))
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(own)
    apart = rank if run.objective.augmentation.least_samples > 1 else 0
    generator = torch.Generator(device)
    return generator.manual_seed(setup.derived_seed(seed, "augmentation", run.step, apart))


def finish_epoch(run: Run, validation: dict[str, Any]) -> None:
    """Note down an epoch, and save."""
    sums, config = run.sums, run.config
    means = sums.epoch_means()
    row = results.with_accessories(
        {
            "epoch": run.epoch + 1,
            "step": run.step,
            **{term: means[term] for term in TERMS},
            "train_accuracy": means["accuracy"],
            **({"gamma": means["gamma"]} if config.balance else {}),
            **{f"validation_{name}": value for name, value in validation.items()},
            "learning_rate": run.schedule.get_last_lr()[0],
            "seconds": sums.seconds,
            "images_per_second": sums.steps * config.batch_size / sums.seconds,
        }
    )
    run.history.append(row)
    run.lap()
    run.epoch, run.batch, run.sums = run.epoch + 1, 0, EpochSums()
    if run.fabric.is_global_zero:
        run.write_metrics()
    run.save()
    if run.fabric.is_global_zero:
        losses = ", ".join(f"{name} {row[name]:.4f}" for name in TERMS)
        accuracies = f"accuracy {row['train_accuracy']:.3f} (validation {row['validation_accuracy']:.3f})"
        run.log(f"epoch {run.epoch}/{config.epochs}: {losses}, {accuracies}, {row['seconds']:.1f} s")
