"""Numbers out of the records of a study, and out of their comparisons."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from salnb import results
from salnb.statistics import compare

__all__ = [
    "done",
    "joint_differences",
    "matching",
    "of_trainings",
    "recorded",
    "saliency_share",
]

Record = Mapping[str, Any]


def recorded(study: str) -> list[dict[str, Any]]:
    """All published records of a study, of whatever scale: by scale, then by name."""
    return [results.read_record(path) for path in sorted(results.published().glob(f"*/{study}/*.json"))]


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
