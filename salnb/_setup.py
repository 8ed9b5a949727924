"""What a training run is put together from: device, network with its losses, optimiser, seeds, signals."""

import contextlib
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from salnb import _catalog as catalog
from salnb import models
from salnb._precision import tf32
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.config import Config
from salnb.data import Share
from salnb.objective import Objective


def make_fabric(config: Config) -> Fabric:
    """Device, precision and processes; under torchrun, the processes that it started.

    Raises:
        ValueError: the machine lacks the device, or it lacks the precision.
    """
    device = torch.device(config.device if config.device != "auto" else _best_device())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {config.device} is not on this machine: take cpu, or auto")
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
        ValueError: the network has no layer of a name, or cannot take images of the size.
    """
    model = models.build(config.model, catalog.DATA[config.data].num_classes)
    if config.model.startswith("timm:"):  # of the others the least sizes are known
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, 3, config.size, config.size))
        except Exception as error:
            raise ValueError(
                f"model {config.model} cannot take images of size {config.size}: {error}"
            ) from error
    augmentation = AUGMENTATIONS[config.augmentation]()
    if share.of > 1 and augmentation.least_samples == 1:
        _share_draws(augmentation, share)
    return Objective(
        model.train(),
        augmentation,
        alpha=config.alpha,
        beta=config.beta,
        gamma=config.gamma,
        layers=config.compared_layers,
        method=config.method,
        normalize=config.normalize,
        distance=config.distance,
        every=config.every,
        warmup=config.warmup,
        detach_original=config.detach_original,
    )


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


def _best_device() -> str:
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
    """A list that SIGTERM and Ctrl-C are noted in; a second one acts at once, as without this."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may be told of signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def notice(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, notice)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
