"""Studies: grids of trainings, run one after the other or on a Ray cluster, and their records.

A study can be stopped at any time and started again. Each finished training has a record of its own, which is
never made twice; a training that was under way goes on from its checkpoint.

What a study leaves in its folder: ``STUDY/NAME.json``, the record of each training; ``runs/``, the folders of
the runs, see `salnb.train`.
"""

import dataclasses
import functools
import itertools
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from salnb import data, results
from salnb._common.devices import best_device
from salnb._common.files import locked
from salnb._common.progress import progress
from salnb.statistics import mean
from salnb.study.grids import STUDIES, UNCHOSEN, Scale, Training, load_scale, trainings
from salnb.train import fit
from salnb.train.config import Config
from salnb.train.setup import derived_seed, make_objective, numerics

__all__ = [
    "STUDIES",
    "Scale",
    "Training",
    "choose_gammas",
    "load_scale",
    "match_weight",
    "read",
    "run",
    "trainings",
]

# batches on which two losses are compared
_MATCHED_BATCHES = 4


class Executor(Protocol):
    """How trainings are run: yields each with its record when it is finished."""

    def __call__(
        self, pending: Sequence[Training], runs: Path, started: Callable[[Training], None]
    ) -> Iterator[tuple[Training, dict[str, Any]]]:
        """Run them; `started` is to be called when one begins."""


def run(
    study: str,
    scale: Scale,
    folder: str | Path,
    *,
    execute: Executor | None = None,
    display: TextIO | None = None,
) -> list[dict[str, Any]]:
    """Run what is still to be run of a study.

    Where the scale leaves more than one weight of the saliency loss to choose from, the study "gamma" is run
    first. A training that fails leaves its error in its record, and the others go on; it is tried again when
    the study is started again.

    Args:
        study: "gamma", "table1", "table2", "table3" or "open".
        scale: how large; see `load_scale`.
        folder: of the records and the runs.
        execute: how; by default in this process, one after the other. `salnb.study.on_ray.OnRay` is another.
        display: where the progress is shown; None: on stderr.

    Returns:
        The records of all trainings of the study, in its order.

    Raises:
        ValueError: settings of the scale are not allowed, or a record in the folder is of other settings.
        RuntimeError: no training succeeded from which the weight of the saliency loss could be chosen.
        FileExistsError: another process is at work in the folder.
        Interrupted: a signal stopped the training under way, which has been saved.
    """
    folder, execute = Path(folder), execute or here
    trainings(study, scale, *UNCHOSEN)  # all mistakes, before anything is run
    with locked(folder):
        own = scale.of(study)
        gammas = dict.fromkeys(own.data, float(own.gammas[0]))
        if study not in ("gamma", "table3") and len(own.gammas) > 1:
            gammas = choose_gammas(_run("gamma", _choice(scale, study), folder, gammas, execute, display))
        return _run(study, scale, folder, gammas, execute, display)


def _choice(scale: Scale, study: str) -> Scale:
    """The scale of the choice of weights for a study: the same settings whichever study asks for it."""
    asked = {name: getattr(scale.of(study), name) for name in ("data", "gammas", "gamma_seeds", "seeds")}
    return dataclasses.replace(scale.of("gamma"), **asked)


def _run(
    study: str,
    scale: Scale,
    folder: Path,
    gammas: Mapping[str, float],
    execute: Executor,
    display: TextIO | None,
) -> list[dict[str, Any]]:
    planned = trainings(study, scale, gammas, match_weight)
    records = {t.name: record for t in planned if (record := _finished(t, scale, folder))}
    pending = [t for t in planned if t.name not in records]
    with Progress(study, len(planned), len(records), display or sys.stderr) as progress:
        for training, record in execute(pending, folder / "runs", progress.started):
            record = {"study": study, "scale": scale.name, "name": training.name, **record}
            results.write_record(_path(training, folder), record)
            records[training.name] = record
            progress.finished(training, record)
    return [records[t.name] for t in planned]


def _path(training: Training, folder: Path) -> Path:
    return folder / training.study / f"{training.name}.json"


def _finished(training: Training, scale: Scale, folder: Path) -> dict[str, Any] | None:
    """The record of a training that was finished before."""
    path = _path(training, folder)
    if not path.exists():
        return None
    record = results.read_record(path)
    if record.get("status") != "done":
        return None
    if different := training.config(folder).differences(record["result"]["config"]):
        raise ValueError(
            f"out: {path} is of a training with other settings: {different}; take another folder"
        )
    return record


def read(folder: str | Path, study: str) -> list[dict[str, Any]]:
    """The records of a study that are in a folder, by name.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted((Path(folder) / study).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"there is no record of {study} in {folder}: run `salnb study {study}`")
    return [results.read_record(file) for file in files]


def run_training(training: Training, runs: Path) -> dict[str, Any]:
    """Run, or go on with, one training; gives its record: its result or its error, and its warnings.

    Raises:
        Interrupted: a signal stopped it.
    """
    ended: dict[str, Any] = {"status": "done"}
    with warnings.catch_warnings(record=True) as caught:
        try:
            config = training.config(runs)
            result = fit(config, resume=True, log=lambda line: None, bar=False)
            # records are published: where a folder lies on this machine is nobody's business
            out = str(Path(config.out).relative_to(runs.parent))
            ended["result"] = {**result, "config": {**result["config"], "out": out}}
        except Exception as error:
            ended = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            ended["trace"] = traceback.format_exception(error)
    said = dict.fromkeys(f"{warning.category.__name__}: {warning.message}" for warning in caught)
    return {"factors": training.factors, **ended, "warnings": list(said)}


def here(
    pending: Sequence[Training], runs: Path, started: Callable[[Training], None]
) -> Iterator[tuple[Training, dict[str, Any]]]:
    """Run trainings in this process, one after the other."""
    for training in pending:
        started(training)
        yield training, run_training(training, runs)


# --- weights of the saliency loss --------------------------------------------------------------------------


def choose_gammas(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each data set, the weight with the highest mean accuracy on the validation split.

    Of weights that are equally good the smallest is taken. The reference, without a saliency loss, is no
    candidate: whether the loss helps is what the studies ask.

    Args:
        records: of the study "gamma".

    Raises:
        RuntimeError: for a data set, no training with a saliency loss succeeded.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        accuracies = found.setdefault(record["factors"]["data"], {})
        gamma = float(record["factors"]["gamma"])
        if record["status"] == "done" and gamma:
            accuracies.setdefault(gamma, []).append(record["result"]["validation_accuracy"])
    for name, accuracies in found.items():
        if not accuracies:
            errors = "; ".join(r["error"] for r in records if r["status"] == "failed")
            raise RuntimeError(f"no weight can be chosen for {name}, as all trainings failed: {errors}")
    return {
        name: max(sorted(accuracies), key=lambda gamma: mean(accuracies[gamma]))
        for name, accuracies in found.items()
    }


def match_weight(settings: Mapping[str, Any], changed: Mapping[str, Any]) -> float:
    """The weight with which a changed saliency loss pulls as strongly at the start of a training.

    Normalisations, distances and methods each have a unit of their own, so that a weight means nothing across
    them. What is held equal is the length of the term's gradient with respect to the parameters, averaged
    over a few batches of an untrained network.

    Args:
        settings: of a training, its `gamma` included.
        changed: the same with another saliency loss.

    Returns:
        The weight for the latter, to two digits.
    """
    alone = {"alpha": 0.0, "beta": 0.0, "layers": (), "gamma": 1.0, "warmup": 0, "every": 1}
    length, changed_length = (
        _gradient_length(Config(**{**each, **alone, "out": "unused"})) for each in (settings, changed)
    )
    weight = settings["gamma"] * length / changed_length if changed_length else settings["gamma"]
    return float(f"{weight:.2g}")


@functools.lru_cache(maxsize=32)  # each is compared with the same default
def _gradient_length(config: Config) -> float:
    device = torch.device("cpu" if config.device == "cpu" else best_device())
    with numerics(config):
        torch.manual_seed(derived_seed(0, "weights"))
        objective = make_objective(config, data.WHOLE).to(device)
        split = data.load(config.data, config.size, workers=config.workers).train
        generator, lengths = torch.Generator(device).manual_seed(0), []
        whole = data.batches(split, config.size, device, batch_size=config.batch_size, seed=0)
        for images, labels, _ in itertools.islice(whole, _MATCHED_BATCHES):
            objective.zero_grad()
            objective(images, labels, generator).total.backward()
            gradients = [p.grad for p in objective.parameters() if p.grad is not None]
            lengths.append(torch.nn.utils.get_total_norm(gradients).item())
    return mean(lengths)


# --- what is shown ------------------------------------------------------------------------------------------


class Progress:
    """How far a study is: a bar on a terminal, elsewhere a line for each training that is finished.

    Args:
        study: its name.
        total: number of its trainings.
        done: how many were finished before.
        display: where it is shown.
    """

    def __init__(self, study: str, total: int, done: int, display: TextIO):
        self.study, self.total, self.done, self.failed = study, total, done, 0
        self.display = display
        self.running: dict[str, float] = {}
        self.begun, self.before = time.monotonic(), done
        self.bar = progress(what=study, total=total, initial=done, file=display)

    def __enter__(self) -> "Progress":
        """Show where it starts."""
        if self.bar.disable and self.done:
            print(f"{self.study}: {self.done}/{self.total} were done before", file=self.display, flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the line free."""
        self.bar.close()

    def started(self, training: Training) -> None:
        """Note that a training begins."""
        self.running[training.name] = time.monotonic()
        self._show()

    def finished(self, training: Training, record: Mapping[str, Any]) -> None:
        """Note how a training ended."""
        seconds = time.monotonic() - self.running.pop(training.name, time.monotonic())
        failed = record["status"] != "done"
        self.failed += failed
        self.done += not failed
        self.bar.update()
        self._show()
        if self.bar.disable:
            found = record["error"] if failed else f"test accuracy {record['result']['test_accuracy']:.4f}"
            line = f"{self.study}: {training.name}: {found}, {seconds:.0f} s; {self.summary()}"
            print(line, file=self.display, flush=True)

    def summary(self) -> str:
        """Done, failed, running, and the time left, from the pace so far."""
        ended = self.done + self.failed
        left = "time left unknown"
        if ended > self.before:
            pace = (time.monotonic() - self.begun) / (ended - self.before)
            seconds = pace * (self.total - ended)
            left = f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"
        return f"{self.done} of {self.total} done, {self.failed} failed, {len(self.running)} running, {left}"

    def _show(self) -> None:
        self.bar.set_postfix_str(f"{self.failed} failed, running: {', '.join(self.running) or 'none'}")
