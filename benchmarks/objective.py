"""What a training step with the saliency loss costs, over a step without it on the same batch.

`baseline` is forward, cross-entropy and backward on a batch of originals and augmented images; `plain` is a
step of `Objective` with PyTorch's own second derivatives; `eager` is `Objective` as it is; `compiled` (on
request: compiling takes minutes) is after `Objective.compile()`. The augmentation is a flip, which costs next
to nothing. Arithmetic allows a ratio of 2.0: 6 forward passes' worth of work against 3.

The steps take turns; a ratio is the median over the rounds of (this step / the baseline of the same round).
Memory is the most that tensors hold at one time during a step, gradients included, parameters not.
"""

import argparse
import contextlib
import copy
import itertools
import statistics
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks._ratio import durations, print_table
from salnb import Objective
from salnb.augment import HorizontalFlip

# originals in a batch and their side: what two cores do in seconds
CPU_SIZES = {"resnet18": (16, 112), "resnet50": (16, 64), "vgg16_bn": (8, 64), "densenet121": (16, 64)}
GPU_SIZE = (32, 224)


def steps_of(
    model: nn.Module, images: Tensor, target: Tensor, *, compiled: bool
) -> dict[str, Callable[[], None]]:
    """One step of each kind, on models of their own."""

    def baseline() -> None:
        own.zero_grad()
        F.cross_entropy(own(both), labels).backward()

    def with_saliency(objective: Objective) -> Callable[[], None]:
        def step() -> None:
            objective.zero_grad()
            objective(images, target).total.backward()

        return step

    def plain() -> None:
        with mock.patch("salnb.objective.fast_double_backward", contextlib.nullcontext):
            eager()

    own, both, labels = copy.deepcopy(model), torch.cat([images, images.flip(3)]), torch.cat([target, target])
    eager = with_saliency(Objective(model, HorizontalFlip()))
    steps = {"baseline": baseline, "plain": plain, "eager": eager}
    if compiled:
        objective = Objective(copy.deepcopy(model), HorizontalFlip())
        objective.compile()
        steps["compiled"] = with_saliency(objective)
    return steps


def peak_mebibytes(step: Callable[[], None]) -> int:
    """Most memory that is taken during a step, beyond what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - held) // 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) // 2**20  # negative where freed


def main() -> None:
    """Measure each network and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=CPU_SIZES, default=list(CPU_SIZES))
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of each network")
    parser.add_argument("--compile", action="store_true", help="measure Objective.compile() too")
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bfloat16" if options.bfloat16 else "float32"
    for network in options.networks:
        torch.manual_seed(0)
        n, side = CPU_SIZES[network] if device.type == "cpu" else GPU_SIZE
        model = getattr(torchvision.models, network)(weights=None).train().to(device)
        images, target = torch.rand(n, 3, side, side, device=device), torch.arange(n, device=device)
        steps = steps_of(model, images, target, compiled=options.compile)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            times = durations(steps, seconds=options.seconds, least=3)
            peaks = {name: peak_mebibytes(step) for name, step in steps.items()}
        rows = []
        for name, each in times.items():
            ratios = [a / b for a, b in zip(each, times["baseline"], strict=True)]
            median, ratio = statistics.median(each), statistics.median(ratios)
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
            rows.append([name, f"{median:.3f}", f"{ratio:.2f}", spread, str(peaks[name])])
        title = f"A training step, {network}, 2×{n}×3×{side}×{side}, {device.type}, {precision}"
        print_table(title, ["step", "s", "ratio", "of all rounds", "peak, MiB"], rows)


if __name__ == "__main__":
    main()
