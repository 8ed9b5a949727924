"""What a training run is put together from: device, network with its losses, optimiser, seeds, signals."""

import contextlib
import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from salnb import models
from salnb._common import catalog
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.data import Share
from salnb.objective import Objective
from salnb.objective.precision import tf32
from salnb.train.config import Config

# seconds within which two signals are one request to stop
_ONE_REQUEST = 3.0


def make_fabric(config: Config) -> Fabric:
    """Device, precision and processes; under torchrun, the processes that it started.

    Raises:
        ValueError: the machine lacks the device, or it lacks the precision.
    """
    device = torch.device(config.device if config.device != "auto" else best_device())
    known = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= known[device.type]:
        raise ValueError(f"device {config.device} is not on this machine: take {best_device()}, or auto")
    if device.type == "cpu" and config.precision in ("tf32", "fp16"):
        raise ValueError(f"precision {config.precision} is for GPUs: on this machine take 32 or bf16")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    one_gpu = [device.index or 0] if device.type == "cuda" else 1
    fabric = Fabric(
        accelerator=device.type,
        devices=local if processes > 1 else one_gpu,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=catalog.PRECISIONS[config.precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def make_objective(config: Config, share: Share) -> Objective:
    """The network and its losses, drawn from torch's global generator.

    Raises:
        ValueError: the network has no layer of a name, or cannot take images of the size or the method.
    """
    model = models.build(config.model, catalog.DATA[config.data].num_classes)
    augmentation = AUGMENTATIONS[config.augmentation]()
    if share.of > 1 and augmentation.least_samples == 1:
        _share_draws(augmentation, share)
    repeats = catalog.METHODS[config.method].repeats
    objective = Objective(
        model,
        augmentation,
        alpha=config.alpha,
        beta=config.beta,
        gamma=config.gamma,
        layers=config.compared_layers,
        method=config.method,
        method_options={repeats: config.samples} if repeats else None,
        normalize=config.normalize,
        distance=config.distance,
        pool=config.pool,
        every=config.every,
        warmup=config.warmup,
        detach_original=config.detach_original,
    )
    if config.layers or config.model.startswith("timm:"):  # else it is known what goes together
        _rehearse(objective, config)
    return objective


def _rehearse(objective: Objective, config: Config) -> None:
    """Take the losses of two black images, which changes nothing, before there is anything to lose."""
    blank, labels = torch.zeros(2, 3, config.size, config.size), torch.zeros(2, dtype=torch.int64)
    try:
        with torch.no_grad():
            objective.eval().model(blank)
    except Exception as error:
        raise ValueError(f"model {config.model} cannot take images of size {config.size}: {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first step says it again
        try:
            objective(blank, labels, torch.Generator())
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"model {config.model} cannot be trained with method {config.method} at size {config.size}"
                f"{f' and layers {list(config.layers)}' if config.layers else ''}: {error}"
            ) from error
    objective.train()


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def make_schedule(
    config: Config, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over all steps: constant, a falling cosine, or up and down again in one cycle."""
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps + 1, pct_start=0.25, cycle_momentum=False
    )


def derived_seed(seed: int, *what: str | int) -> int:
    """A seed for one purpose, unlike that of any other purpose."""
    return int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:7])


def _share_draws(augmentation: Augmentation, share: Share) -> None:
    """Draw for the whole batch and keep this process's part: the result is that of one process."""
    draw = augmentation.make_params

    def make_params(images: Tensor, generator: torch.Generator | None = None) -> Any:
        whole = images[:1].expand(share.of * len(images), -1, -1, -1)  # only the shape is read
        return draw(whole, generator)[share.rank :: share.of]

    augmentation.make_params = make_params  # type: ignore[method-assign]


def best_device() -> str:
    """The kind of device that a run with the device "auto" is made on."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def numerics(config: Config) -> Iterator[None]:
    """TF32 where it is asked for and only there; torch's global generators are left as they were."""
    with tf32(config.precision == "tf32"), torch.random.fork_rng():
        yield


@contextlib.contextmanager
def noticed_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C are noted in; a second one acts at once, as without this.

    One that follows the first within seconds is the same: a scheduler and torchrun may both pass it on, and a
    terminal sends it to torchrun and to its processes alike.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may be told of signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    first = 0.0

    def notice(number: int, frame: object) -> None:
        nonlocal first
        if seen and time.monotonic() - first > _ONE_REQUEST:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        elif not seen:
            first = time.monotonic()
            seen.append(number)

    for number in before:
        signal.signal(number, notice)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
