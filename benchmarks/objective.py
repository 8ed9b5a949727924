"""What a training step with the saliency loss costs, over a step without it on the same batch.

`baseline` is forward, cross-entropy and backward on a batch of originals and augmented images; `plain` is a
step of `Objective` with PyTorch's own second derivatives; `eager` is `Objective` as it is; on GPUs `fused` is
after `use_fused_batch_norm()`, `captured` after `compile(mode="cuda-graphs")`; `compiled` (on request:
compiling takes minutes) is after `Objective.compile()`. The steps are those of `salnb time`, whose images are
augmented beforehand. Arithmetic allows a ratio of 2.0: 6 forward passes' worth of work against 3.

The steps take turns; a ratio is the median over the rounds of (this step / the baseline of the same round).
Memory is the most that tensors hold at one time during a step, gradients included, parameters not.
"""

import argparse
import statistics
from dataclasses import replace

import torch

from benchmarks._ratio import durations, print_table
from salnb.timing import Case
from salnb.timing.profiler import StepProfile
from salnb.timing.steps import TimedStep, arithmetic, step_of

# originals in a batch and their side: what two cores do in seconds
CPU_SIZES = {"resnet18": (16, 112), "resnet50": (16, 64), "vgg16_bn": (8, 64), "densenet121": (16, 64)}
GPU_SIZE = (32, 224)


def steps_of(case: Case, device: torch.device, *, compiled: bool) -> dict[str, TimedStep]:
    """One step of each kind, on models of their own."""
    cases = {"baseline": case.baseline, "plain": replace(case, plain=True), "eager": case}
    if device.type == "cuda":
        cases |= {"fused": replace(case, fused=True), "captured": replace(case, captured=True)}
    if compiled:
        cases["compiled"] = replace(case, compiled=True)
    return {name: step_of(each, device) for name, each in cases.items()}


def main() -> None:
    """Measure each network and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=CPU_SIZES, default=list(CPU_SIZES))
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of each network")
    parser.add_argument("--compile", action="store_true", help="measure Objective.compile() too")
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    parser.add_argument("--channels-last", action="store_true", help="in that memory format")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bfloat16" if options.bfloat16 else "float32"
    for network in options.networks:
        n, side = CPU_SIZES[network] if device.type == "cpu" else GPU_SIZE
        case = Case(
            network,
            batch=n,
            size=side,
            precision="bf16" if options.bfloat16 else "32",
            channels_last=options.channels_last,
        )
        steps = steps_of(case, device, compiled=options.compile)
        with arithmetic(case, device):
            times = durations(steps, seconds=options.seconds, least=3)
            peaks = {name: StepProfile(step, device).peak_bytes // 2**20 for name, step in steps.items()}
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
