"""Studies: grids of training runs, made one after the other or on a Ray cluster, and their records.

A study can be stopped at any time and started again. Each finished run has a record of its own, which is
never made twice; a run that was under way goes on from its checkpoint.

What a study leaves in its folder: `STUDY/NAME.json`, the record of each run; `runs/`, the folders of the
runs, see `salnb.train`.
"""

import contextlib
import dataclasses
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from salnb import results
from salnb._common.files import locked, remove_drafts
from salnb.study.grids import UNCHOSEN, Training, trainings
from salnb.study.plans import identity, load_plan
from salnb.study.progress import Progress
from salnb.study.scale import PLANNED, TUNING, Scale
from salnb.study.values import read_one
from salnb.study.weights import choose_balances, choose_gammas, match_weight
from salnb.train import fit

__all__ = ["Executor", "in_process", "run", "run_training"]


# what an executor calls when a run begins, and what it yields
Started = Callable[[Training], None]
Ended = Iterator[tuple[Training, dict[str, Any]]]


class Executor(Protocol):
    """How training runs are made: yields each with its record when it is finished."""

    def __call__(self, pending: Sequence[Training], runs: Path, started: Started) -> Ended:
        """Make them; `started` is to be called when one begins."""


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
    first, and before a study with a plan the choice of its shares. At the plan's own scale records name the
    plan's commit. A run that fails leaves its error in its record, and the others go on; it is tried again
    when the study is started again.

    Args:
        study: one of `salnb.study.STUDIES`.
        scale: how large; see `load_scale`.
        folder: of the records and the runs.
        execute: how; by default in this process, one after the other. `salnb.study.on_ray.OnRay` is another.
        display: where the progress is shown; None: on stderr.

    Returns:
        The records of all training runs of the study, in its order.

    Raises:
        ValueError: settings of the scale are not allowed, or a record in the folder is of other settings.
        RuntimeError: no run succeeded from which the weight of the saliency loss could be chosen.
        FileExistsError: another process is at work in the folder.
        OSError: the folder cannot be made or written to.
        Interrupted: a signal stopped the run under way, which has been saved.
    """
    if not str(folder):
        raise ValueError("out must name a folder, got ''")
    folder, execute = Path(folder), execute or in_process
    trainings(study, scale, *UNCHOSEN)  # all mistakes, before anything is run
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        own = scale.for_study(study)
        if study in PLANNED:
            choice = f"{study}-tuning"
            chosen = _run(choice, own, folder, {}, execute, display) if choice in TUNING else []
            return _run(study, scale, folder, choose_balances(load_plan(study), chosen), execute, display)
        gammas = dict.fromkeys(own.data, float(own.gammas[0]))
        if study not in ("gamma", "table3") and len(own.gammas) > 1:
            gammas = choose_gammas(_run("gamma", _choice(scale, study), folder, gammas, execute, display))
        return _run(study, scale, folder, gammas, execute, display)


def _choice(scale: Scale, study: str) -> Scale:
    """The scale of the choice of weights for a study: the same settings whichever study asks for it."""
    own, names = scale.for_study(study), ("data", "gammas", "gamma_seeds", "seeds")
    return dataclasses.replace(scale.for_study("gamma"), **{name: getattr(own, name) for name in names})


def _run(
    study: str,
    scale: Scale,
    folder: Path,
    gammas: Mapping[str, float],
    execute: Executor,
    display: TextIO | None,
) -> list[dict[str, Any]]:
    planned = trainings(study, scale, gammas, match_weight)
    of_plan = {"plan": identity(study.removesuffix("-tuning"))} if scale.name == "plan" else {}
    records = {t.name: record for t in planned if (record := _finished(t, folder))}
    pending = [t for t in planned if t.name not in records]
    if pending:
        with _writing_to(folder), tempfile.TemporaryFile(dir=folder):
            remove_drafts(folder / study)
    with Progress(study, len(planned), len(records), display or sys.stderr) as progress:
        for training, record in execute(pending, folder / "runs", progress.started):
            record = {"study": study, "scale": scale.name, **of_plan, "name": training.name, **record}
            with _writing_to(folder):
                results.write_record(_path(training, folder), record)
            records[training.name] = record
            progress.finished(training, record)
    return [records[t.name] for t in planned]


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"out must be a folder that can be written to, got {str(folder)!r}: {why}") from error


def _path(training: Training, folder: Path) -> Path:
    return folder / training.study / f"{training.name}.json"


def _finished(training: Training, folder: Path) -> dict[str, Any] | None:
    """The record of a run that was finished before."""
    path = _path(training, folder)
    if not path.exists():
        return None
    record = read_one(path, training.study)
    if record["status"] != "done":
        return None
    if different := training.config(folder).differences(record["result"].get("config", {})):
        raise ValueError(
            f"out: {path} is of a training with other settings: {different}; take another folder"
        )
    return record


def run_training(training: Training, runs: Path) -> dict[str, Any]:
    """Make, or go on with, one training run; gives its record: its result or its error, and its warnings.

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


def in_process(pending: Sequence[Training], runs: Path, started: Started) -> Ended:
    """Make training runs in this process, one after the other."""
    for training in pending:
        started(training)
        yield training, run_training(training, runs)
