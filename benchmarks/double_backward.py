"""What a training step with the saliency loss costs, over a step without it on the same batch.

Run ``python -m benchmarks.double_backward`` (``--help`` for the options). Three steps are compared:
``baseline`` is forward, cross-entropy and backward on a batch of originals and augmented images, ``plain``
adds the saliency loss as eager PyTorch has it, ``fast`` does so in ``fast_double_backward()``. Arithmetic
allows a ratio of 2.0: 6 forward passes' worth of work against 3.

The steps take turns, so that whatever else the machine does meets all of them alike; the ratio is the median
over the rounds of (this step / the baseline of the same round).
"""

import argparse
import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from salnb.double_backward import fast_double_backward
from salnb.losses import saliency_loss

# images in a batch (half of them originals), and their side: what two cores do in seconds
SIZES = {"resnet18": (32, 112), "resnet50": (32, 64), "vgg16_bn": (16, 64), "densenet121": (32, 64)}

Step = Callable[[nn.Module, Tensor, Tensor], None]


def baseline_step(model: nn.Module, images: Tensor, target: Tensor) -> None:
    """Forward, cross-entropy, backward."""
    F.cross_entropy(model(images), target).backward()


def saliency_step(model: nn.Module, images: Tensor, target: Tensor, *, context: Callable) -> None:
    """The same, plus the saliency loss between the two halves of the batch (equations 1, 2 and 7)."""
    images = images.detach().requires_grad_()
    with context():
        logits = model(images)
        score = logits.gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        maps, new_maps = gradient.abs().amax(1, keepdim=True).chunk(2)
        loss = F.cross_entropy(logits, target) + saliency_loss(maps, new_maps)
    loss.backward()


STEPS: dict[str, Step] = {
    "baseline": baseline_step,
    "plain": functools.partial(saliency_step, context=contextlib.nullcontext),
    "fast": functools.partial(saliency_step, context=fast_double_backward),
}


def setting(network: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with 1000 classes in training mode, and a batch."""
    torch.manual_seed(0)
    n, side = SIZES[network]
    model = getattr(torchvision.models, network)(weights=None).train()
    return model, torch.randn(n, 3, side, side), torch.randint(0, 1000, (n,))


def seconds(network: str, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Duration of each step in each round; a first round is not counted."""
    model, images, target = setting(network)
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds + 1):
        for name, step in STEPS.items():
            model.zero_grad(set_to_none=True)
            start = clock()
            step(model, images, target)
            times[name].append(clock() - start)
    return {name: each[1:] for name, each in times.items()}


def peak_mebibytes(network: str) -> dict[str, int]:
    """Most memory that the tensors of a step (gradients included) hold at one time, by the allocator."""
    model, images, target = setting(network)
    peaks = {}
    for name, step in STEPS.items():
        model.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step(model, images, target)
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # negative where freed
        peaks[name] = max(itertools.accumulate(sizes)) // 2**20
    return peaks


def main() -> None:
    """Measure and print one line per network and step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with --threads 1")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    print("| network | batch | step | seconds | ratio | of all rounds | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for network in options.networks:
        n, side = SIZES[network]
        times, peaks = seconds(network, options.rounds, clock), peak_mebibytes(network)
        for name, each in times.items():
            ratios = [a / b for a, b in zip(each, times["baseline"], strict=True)]
            print(
                f"| {network} | {n} × {side} px | {name} | {statistics.median(each):.3f} "
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f}–{max(ratios):.2f} | {peaks[name]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
