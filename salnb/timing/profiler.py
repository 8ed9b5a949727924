"""Where the time of a step goes, how much memory it takes, and what is known of the device."""

import itertools
import os
import re
import subprocess
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from salnb.timing.steps import TimedStep

__all__ = ["KINDS", "MemoryOfAll", "StepProfile", "clocks", "device_facts", "kind_of", "seconds_by_kind"]

KINDS = ("convolution", "batch norm", "matrix product", "other")

# what is in the names of operators, autograd's functions and kernels; the first that fits decides
_WORDS = {
    "batch norm": re.compile(r"batch_?norm", re.IGNORECASE),
    "convolution": re.compile(r"convolution|conv2d", re.IGNORECASE),
    "matrix product": re.compile(r"::(mm|addmm|bmm|baddbmm|matmul|linear)$|attention"),
}


def kind_of(names: Sequence[str], kernel: str = "") -> str:
    """What kind of work a piece of a step is, by the names of its operator and of what that was called by.

    >>> kind_of(["aten::mul", "_BatchNormBackwardBackward"]), kind_of(["aten::addmm"])
    ('batch norm', 'matrix product')
    """
    if kernel.startswith("triton"):
        # it bears the names of all that was fused into it; the products themselves are left to libraries
        return "batch norm" if _WORDS["batch norm"].search(kernel) else "other"
    return next((kind for kind, words in _WORDS.items() if any(map(words.search, names))), "other")


class StepProfile:
    """One step, looked into when asked: where its time goes, and how much memory it takes."""

    def __init__(self, step: TimedStep, device: torch.device):
        self.step, self.device, self.on_gpu = step, device, device.type == "cuda"

    @cached_property
    def _run(self) -> Any:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start past sys.stderr
        self.step.model.zero_grad()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about devices that are not there
            with profile(activities=activities, profile_memory=not self.on_gpu) as run:
                self.step()
                if self.on_gpu:
                    torch.cuda.synchronize(self.device)
        return run

    @cached_property
    def kinds(self) -> dict[str, float]:
        """Seconds of each of `KINDS`: of the device's kernels where it has some, else of the host."""
        return seconds_by_kind(self._run.events(), self.on_gpu)

    @cached_property
    def peak_bytes(self) -> int:
        """The most memory taken beyond parameters, buffers and batch, in bytes: gradients are included."""
        if not self.on_gpu:
            return _most_memory(self._run)
        self.step.model.zero_grad()
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) - held


class MemoryOfAll:
    """The most memory that tensors of a GPU have taken since, in bytes; 0 on other devices."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    @property
    def peak_bytes(self) -> int:
        """Beyond what was taken at the beginning."""
        return torch.cuda.max_memory_allocated(self.device) - self.before if self.on_gpu else 0


def seconds_by_kind(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Sum the profiler's events; on a GPU by the kernels that each operator launched."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if "CPU" not in str(event.device_type):  # a kernel by itself; its operator lists it too
            continue
        names, caller = [], event
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        if on_gpu:
            for kernel in event.kernels:
                found[kind_of(names, kernel.name)] += kernel.duration / 1e6
        else:
            found[kind_of(names)] += event.self_cpu_time_total / 1e6
    return found


def _most_memory(run: Any) -> int:
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)  # negative where freed


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device's driver, clocks and limits as far as they can be found out; None where they cannot."""
    facts: dict[str, Any] = {"processor": _processor()}
    facts |= dict.fromkeys(("driver", "clocks_mhz", "power_limit_w"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        capability = f"{properties.major}.{properties.minor}"
        facts |= {"memory_bytes": properties.total_memory, "capability": capability}
        if answer := _nvidia_smi(device, "driver_version,power.limit,clocks.max.sm,clocks.max.mem"):
            power, most_sm, most_memory = map(_number, answer[1:])
            facts |= {"driver": answer[0], "power_limit_w": power}
            facts |= {"clocks_mhz": {"most_sm": most_sm, "most_memory": most_memory}}
    return facts


def clocks(device: torch.device) -> dict[str, float | None] | None:
    """The clocks of this moment in MHz; None where they cannot be read."""
    answer = _nvidia_smi(device, "clocks.sm,clocks.mem") if device.type == "cuda" else None
    return {"sm": _number(answer[0]), "memory": _number(answer[1])} if answer else None


def _nvidia_smi(device: torch.device, query: str) -> list[str] | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{uuid}" if uuid else str(device.index or 0)  # the variable that hides GPUs renumbers them
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    words = [word.strip() for word in answer.strip().split(",")]
    return words if len(words) == query.count(",") + 1 else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None  # else "[N/A]"


def _processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else None
