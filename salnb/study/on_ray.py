"""Training runs of a study on a Ray cluster: the cores or GPUs of this machine, or of many machines."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salnb._common.packages import require
from salnb.study.grids import Training
from salnb.study.runner import Ended, Started, run_training
from salnb.train import Interrupted

__all__ = ["OnRay"]

# how often a run is begun anew, from its checkpoint, when the process or the machine it ran on died
_RETRIES = 5
_POLL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Training runs as tasks of Ray; an executor of `salnb.study.run`.

    A run whose worker died is begun again and goes on from its checkpoint. So the machines of a cluster need
    a folder in common (and salnb with the extra `ray`); records are written here, each once.

    A study that is stopped leaves the cluster, which ends the runs under way; they go on from their last
    checkpoint. If this process had joined the cluster before, it stays, and the runs are finished there: wait
    for that before you start the study again.

    Attributes:
        address: "local" starts Ray on this machine; "auto" or "ray://HOST:PORT" join a cluster.
        share: of a GPU, or of a core where the cluster has no GPU, that a run gets; above 1, several.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: the share is not positive, or the cluster is too small for it.
    """

    address: str = "local"
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check the share."""
        if not self.share > 0:
            raise ValueError(f"share must be positive, got {self.share}")

    def __call__(self, pending: Sequence[Training], runs: Path, started: Started) -> Ended:
        """Make them; see `salnb.study.runner.Executor`."""
        if not pending:
            return
        ray = require("ray", "ray", what="on ray")
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
        options = {"log_to_driver": False, "logging_level": "error", "runtime_env": {"env_vars": variables}}
        if self.address == "local":
            options["include_dashboard"] = False
        try:
            ray.init(address=self.address, **options)
        except ConnectionError as error:
            raise ConnectionError(f"address {self.address!r}: no Ray cluster answers there") from error

    def _tasks(self, ray: Any, pending: Sequence[Training], runs: Path, started: Started) -> Ended:
        kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        there = max((machine.get(kind, 0) for machine in _machines(ray)), default=0)
        if there < self.share:
            raise ValueError(
                f"share must be at most {there:g}, the {kind}s of a machine in the cluster, "
                f"got {self.share:g}"
            )
        # the share of a GPU says how many runs a machine makes, however many cores it has
        needs = {"num_gpus": self.share, "num_cpus": 0} if kind == "GPU" else {"num_cpus": self.share}
        # Ray itself tries again where a worker dies; an error of the run is its record
        task = ray.remote(max_retries=_RETRIES, retry_exceptions=False, **needs)(_attempt)
        waiting = list(reversed(pending))
        running: dict[Any, Training] = {}
        while waiting or running:
            # no more than can run, so that what is shown as running is; a cluster may grow meanwhile
            while waiting and len(running) < self._places(ray, kind):
                training = waiting.pop()
                running[task.remote(training, runs)] = training
                started(training)
            if not running:  # all machines are gone for the moment
                time.sleep(_POLL_SECONDS)
                continue
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for reference in finished:
                training = running.pop(reference)
                yield training, _record(ray, training, reference)

    def _places(self, ray: Any, kind: str) -> int:
        # a hair more, as three shares of 0.1 are not quite 0.3
        return sum(int(machine.get(kind, 0) / self.share + 1e-6) for machine in _machines(ray))


def _machines(ray: Any) -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _attempt(training: Training, runs: Path) -> dict[str, Any]:
    """Make a run in a worker, which dies where it is told to stop, so that Ray goes on elsewhere."""
    try:
        return run_training(training, runs)
    except Interrupted as stopped:
        if stopped.signal == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGKILL)
        raise  # the study is stopped


def _record(ray: Any, training: Training, reference: Any) -> dict[str, Any]:
    """What a task came to; a worker that died again and again is a failure like any other."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        failure = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": []}
        return {"factors": training.factors} | failure
