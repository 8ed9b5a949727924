"""The records of a study, read and checked, and numbers out of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salnb import results
from salnb.statistics import compare

__all__ = [
    "done",
    "joint_differences",
    "matching",
    "of_trainings",
    "read",
    "read_one",
    "recorded",
    "saliency_share",
]

Record = Mapping[str, Any]


def read(folder: str | Path, study: str) -> list[dict[str, Any]]:
    """The records of a study that are in a folder, by name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one is damaged, or is not of the study; the message names it.
    """
    files = sorted((Path(folder) / study).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"there is no record of {study} in {folder}: run `salnb study {study}`")
    return [read_one(file, study) for file in files]


def recorded(study: str) -> list[dict[str, Any]]:
    """All published records of a study, of whatever scale: by scale, then by name. See `read`."""
    return [read_one(path, study) for path in sorted(results.published().glob(f"*/{study}/*.json"))]


def read_one(path: Path, study: str) -> dict[str, Any]:
    """The record of a training run of a study; raises as `read` does."""
    record = results.read_record(path)
    if record.get("study") != study:
        raise ValueError(f"{path} is no record of the study {study!r}, got one of {record.get('study')!r}")
    if record.get("status") not in ("done", "failed"):
        raise ValueError(f"{path}: status must be 'done' or 'failed', got {record.get('status')!r}")
    ended: dict[str, type] = {"result": dict} if record["status"] == "done" else {"error": str}
    for name, kind in ({"name": str, "factors": dict} | ended).items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {record.get(name)!r}")
    return record


def done(records: Iterable[Record]) -> list[Record]:
    """Those that did not fail."""
    return [record for record in records if record["status"] == "done"]


def matching(records: Iterable[Record], **factors: object) -> list[Record]:
    """Those that did not fail and have these factors."""
    return [record for record in done(records) if factors.items() <= record["factors"].items()]


def of_trainings(records: Iterable[Record], key: str, **factors: object) -> list[Any]:
    """A result of each training that did not fail and has these factors.

    >>> record = {"status": "done", "factors": {"variant": "default", "seed": 0}, "result": {"steps": 9}}
    >>> of_trainings([record], "steps", variant="default"), of_trainings([record], "steps", variant="pool=4")
    ([9], [])
    """
    return [record["result"][key] for record in matching(records, **factors)]


def joint_differences(
    records: Sequence[Record], factor: str, reference: str, metrics: Sequence[str]
) -> list[tuple[float, ...]]:
    """For each training, by how much it differs from its reference in each of several metrics.

    The first three arguments are those of `salnb.statistics.compare`.
    """
    compared = (compare(records, factor, reference, metric=metric) for metric in metrics)
    columns = [[d for c in comparisons for d in c.differences] for comparisons in compared]
    return list(zip(*columns, strict=True))


def saliency_share(record: Record) -> float:
    """The steps of a training that had a saliency loss, as a share of all."""
    config = record["result"]["config"]
    return (1 - config["warmup"] / record["result"]["steps"]) / config["every"]
