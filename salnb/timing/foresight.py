"""Which rows need not be tried: what the device lacks, what was too large before, what takes too long."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from salnb.timing.cases import Case, counted
from salnb.timing.records import Row

__all__ = ["expected_seconds", "foreseen", "lacking"]

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
    missing = lacking(case, device)
    if missing:
        return "not available", missing
    for row in before:
        n = row.case.batch
        if row.status == "out of memory" and n < case.batch and replace(row.case, batch=case.batch) == case:
            return "out of memory", f"a batch of {n}+{n} was too large already"
    needed = expected_seconds(case, iterations, before)
    if left <= 0 or needed > left:
        return "not run", f"about {needed:.0f} s were needed, {max(left, 0):.0f} s were left"
    return None, ""


def expected_seconds(case: Case, iterations: int, before: Sequence[Row]) -> float:
    """At least what a row takes, as far as the rows before it tell."""
    done = [(row.case, row.measured) for row in before if row.measured]
    compiling = 0.0
    if case.compiled:
        alike = [(other.compiled, bool(other.method)) == (True, bool(case.method)) for other, _ in done]
        seen = [found.first_step_seconds for (_, found), same in zip(done, alike, strict=True) if same]
        compiling = max(seen, default=_COMPILING[bool(case.method)])
    base = next((found.seconds["mean"] for other, found in done if other == case.baseline), 0.0)
    # the arithmetic of a step with saliency is twice that of its baseline, and again for each noisy copy
    steps = counted(iterations, case.every)[0] * (1 + max(1, case.samples) / case.every if case.method else 1)
    return compiling + steps * base


def lacking(case: Case, device: torch.device) -> str:
    """What the device lacks for a row; empty where nothing."""
    if device.type != "cuda":
        return "TF32 is for NVIDIA's GPUs" if case.precision == "tf32" else ""
    needs = [{"tf32": "TF32", "bf16": "bfloat16"}.get(case.precision), "the compiler" * case.compiled]
    major, minor = torch.cuda.get_device_capability(device)
    for need in filter(None, needs):
        least = _CAPABILITIES[need]
        if (major, minor) < least:
            wanted = f"{least[0]}.{least[1]}"
            return f"{need} needs compute capability {wanted}, this device has {major}.{minor}"
    return ""
