"""Which rows need not be tried: what the device lacks, what was too large before, what takes too long."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch

from salnb.timing.cases import Case, counted
from salnb.timing.records import Row

__all__ = ["expected_seconds", "foreseen", "guaranteed", "lacking"]

# seconds that compiling is taken to need before any was seen: of a baseline, of a step with saliency
_COMPILING = (30.0, 90.0)
# the lowest compute capability of an NVIDIA GPU
_CAPABILITIES = {"TF32": (8, 0), "bfloat16": (8, 0), "the compiler": (7, 0)}


def foreseen(
    case: Case, device: torch.device, iterations: int, left: float, before: Sequence[Row]
) -> tuple[str | None, str]:
    """The status of a row that need not be tried, and why; None where it must be.

    Args:
        case: what the row is to measure.
        device: on what.
        iterations: how often the step is to be run.
        left: seconds that are left.
        before: the rows that had their turn.
    """
    if missing := lacking(case, device):
        return "not available", missing
    for row in before:
        n = row.case.batch
        if row.status == "out of memory" and n < case.batch and replace(row.case, batch=case.batch) == case:
            return "out of memory", f"a batch of {n}+{n} was too large already"
    if _beside(case) and not _paired(before):  # a pair has to come first
        return "not run", "no step with saliency was measured that it could stand beside"
    needed = expected_seconds(case, iterations, before)
    if left <= 0 or needed > left:
        return "not run", f"about {needed:.0f} s were needed, {max(left, 0):.0f} s were left"
    return None, ""


def guaranteed(case: Case, before: Sequence[Row], left: float) -> bool:
    """Whether a row is measured however long it takes: no pair was measured before it.

    The plan begins with a pair; another takes its place while there is time. What has to be compiled may take
    minutes, in which nothing is gained by fewer iterations.
    """
    return not (_paired(before) or _beside(case) or case.compiled) and (left > 0 or len(before) < 2)


def _paired(before: Sequence[Row]) -> bool:
    return any(row.measured and row.case.method and not _beside(row.case) for row in before)


def _beside(case: Case) -> bool:
    return case.plain or case.originals_only or case.fused


def expected_seconds(case: Case, iterations: int, before: Sequence[Row]) -> float:
    """At least what a row takes, as far as the rows before it tell."""
    done = {row.case: row.measured for row in before if row.measured}
    alike = [
        found for other, found in done.items() if other.compiled and bool(other.method) == bool(case.method)
    ]
    compiling = max((found.first_step_seconds for found in alike), default=_COMPILING[bool(case.method)])
    base = done.get(case.baseline)
    # the arithmetic of a step with saliency is twice that of its baseline, and again for each noisy copy
    share = 1 + max(1, case.samples) / case.every if case.method else 1 / (1 + case.originals_only)
    steps = counted(iterations, case.every)[0] * share
    return case.compiled * compiling + (steps * base.seconds["mean"] if base else 0)


def lacking(case: Case, device: torch.device) -> str:
    """What the device lacks for a row; empty where nothing."""
    if device.type != "cuda":
        kinds = {"CUDA graphs are": case.captured, "fused kernels are": case.fused}
        kinds["TF32 is"] = case.precision == "tf32"
        return next((f"{kind} for NVIDIA's GPUs" for kind, wanted in kinds.items() if wanted), "")
    if case.fused and importlib.util.find_spec("triton") is None:
        return "fused kernels need Triton"
    capability = torch.cuda.get_device_capability(device)
    for need in ({"tf32": "TF32", "bf16": "bfloat16"}.get(case.precision), "the compiler" * case.compiled):
        if need and capability < _CAPABILITIES[need]:
            wanted, got = (f"{major}.{minor}" for major, minor in (_CAPABILITIES[need], capability))
            return f"{need} needs compute capability {wanted}, this device has {got}"
    return ""
