"""Run the trainings of a study on a Ray cluster: the cores or GPUs of this machine, or of many machines."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salnb.grids import Training
from salnb.study import run_training

# how often a training is begun anew, from its checkpoint, when the process or the machine it ran on died
_RETRIES = 5
_POLL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Trainings as tasks of Ray; an executor of `salnb.study.run`.

    A training whose worker died is begun again and goes on from its checkpoint. So the machines of a cluster
    need a folder in common (and salnb with the extra `ray`); records are written here, each once.

    Attributes:
        address: "local" starts Ray on this machine; "auto" or "ray://HOST:PORT" join a cluster.
        share: of a GPU, or of a core where the cluster has no GPU, that a training gets; above 1, several.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: the cluster is too small for the share.
    """

    address: str = "local"
    share: float = 1.0

    def __call__(
        self, pending: Sequence[Training], runs: Path, started: Callable[[Training], None]
    ) -> Iterator[tuple[Training, dict[str, Any]]]:
        """Run them; see `salnb.study.Executor`."""
        if not pending:
            return
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            self._join(ray)
        try:
            yield from self._tasks(ray, pending, runs.resolve(), started)
        finally:
            if ours:
                ray.shutdown()

    def _join(self, ray: Any) -> None:
        # what is in the environment here, such as the folder of the data, is to hold there, too
        variables = {name: value for name, value in os.environ.items() if name.startswith("SALNB_")}
        options: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
        try:
            ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": variables},
                **options,
            )
        except ConnectionError as error:
            raise ConnectionError(f"address {self.address!r}: no Ray cluster answers there") from error

    def _tasks(
        self, ray: Any, pending: Sequence[Training], runs: Path, started: Callable[[Training], None]
    ) -> Iterator[tuple[Training, dict[str, Any]]]:
        kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        if ray.cluster_resources().get(kind, 0) < self.share:
            there = ray.cluster_resources().get(kind, 0)
            raise ValueError(
                f"share must be at most {there:g}, the {kind}s of the cluster, got {self.share:g}"
            )
        needs = {"num_gpus": self.share} if kind == "GPU" else {"num_cpus": self.share}
        # Ray itself tries again where a worker dies; an error of the training is its record
        task = ray.remote(max_retries=_RETRIES, retry_exceptions=False, **needs)(run_training)
        waiting = list(reversed(pending))
        running: dict[Any, Training] = {}
        while waiting or running:
            # no more than can run, so that what is shown as running is; a cluster may grow meanwhile
            while waiting and len(running) < int(ray.cluster_resources().get(kind, 0) / self.share):
                training = waiting.pop()
                running[task.remote(training, runs)] = training
                started(training)
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for reference in finished:
                yield running[reference], _record(ray, running.pop(reference), reference)


def _record(ray: Any, training: Training, reference: Any) -> dict[str, Any]:
    """What a task came to; a worker that died again and again is a failure like any other."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        failure = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": []}
        return {"factors": training.factors} | failure


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("on ray needs the package ray: pip install 'salnb[ray]'") from error
