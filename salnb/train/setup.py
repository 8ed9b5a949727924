"""What a training run is put together from: device, images, network with its losses, optimiser, seeds."""

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from salnb import data, models
from salnb._common import catalog
from salnb._common.devices import resolve_device
from salnb._common.image_folder import find_images
from salnb._common.progress import log_line
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.objective import Objective
from salnb.objective.precision import tf32
from salnb.train.config import Config, torchrun

__all__ = [
    "count_classes",
    "derived_seed",
    "make_dataset",
    "make_fabric",
    "make_objective",
    "make_optimizer",
    "make_schedule",
    "numerics",
]


def make_fabric(config: Config) -> Fabric:
    """Device, precision and processes (of torchrun); raises a ValueError where the machine lacks one."""
    device = resolve_device(config.device)
    if device.type == "cpu" and config.precision in ("tf32", "fp16"):
        raise ValueError(f"precision {config.precision} is for GPUs: on this machine take 32 or bf16")
    processes, local = torchrun("WORLD_SIZE"), torchrun("LOCAL_WORLD_SIZE")
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


def make_dataset(config: Config, fabric: Fabric) -> data.Dataset:
    """The images; raises a ValueError where there are fewer to train on than a batch takes."""

    def placed(split: data.Split) -> data.Split:
        return split.to(fabric.device) if isinstance(split, data.Arrays) else split

    with fabric.rank_zero_first():  # the first prepares the files that all read
        dataset = _load(config, fabric.is_global_zero)
    train = dataset.train if config.train_images is None else dataset.train.first(config.train_images)
    if config.labels_per_class is not None:
        if not isinstance(train, data.Arrays):
            raise ValueError(f"labels_per_class is for images in memory, which {config.data} are not")
        generator = torch.Generator().manual_seed(derived_seed(config.seed, "labels"))
        train = data.hide_labels(train, config.labels_per_class, generator)
    if len(train) < config.batch_size:
        raise ValueError(
            f"batch_size must be at most {len(train)}, the number of training images, got {config.batch_size}"
        )
    backgrounds = dataset.backgrounds
    return dataclasses.replace(
        dataset,
        train=placed(train),
        validation=placed(dataset.validation),
        test=placed(dataset.test),
        backgrounds=None if backgrounds is None else backgrounds.to(fabric.device),
    )


def _load(config: Config, first: bool) -> data.Dataset:
    if config.data_dir is None:
        return data.load(config.data, config.size, workers=config.workers, test_scenes=config.test_scenes)
    split, known = Path(config.out) / "split.json", Path(config.out) / "config.json"
    if first and not known.exists():  # of a run that never began
        split.unlink(missing_ok=True)
    options = {"workers": config.workers, "skip_unreadable": config.skip_unreadable, "record": split}
    return data.image_folder(config.data_dir, config.size, **options)  # type: ignore[arg-type]


def count_classes(config: Config) -> int:
    """The number of classes of the data."""
    if config.data_dir:
        return len(find_images(config.data_dir)["train"])
    return catalog.DATA[config.data].num_classes


class SharedDraw(Augmentation[Any]):
    """One process's part of an augmentation that several share: together they draw as a single one would.

    Args:
        augmentation: what to apply; it must not mix images.
        share: this process's part of the batch.
    """

    def __init__(self, augmentation: Augmentation, share: data.Share):
        super().__init__()
        self.augmentation, self.share = augmentation, share

    def make_params(self, images: Tensor, generator: torch.Generator | None = None) -> Any:
        """Draw for the whole batch, and keep the part of these images."""
        whole = images[:1].expand(self.share.of * len(images), -1, -1, -1)  # only the shape is read
        return self.augmentation.make_params(whole, generator)[self.share.rank :: self.share.of]

    def images(self, images: Tensor, params: Any) -> Tensor:
        """As the augmentation does it."""
        return self.augmentation.images(images, params)

    def targets(self, target: Tensor, params: Any, num_classes: int | None = None) -> Tensor:
        """As the augmentation does it."""
        return self.augmentation.targets(target, params, num_classes)

    def align(self, maps: Tensor, new_maps: Tensor, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As the augmentation does it."""
        return self.augmentation.align(maps, new_maps, params)


# settings that `Objective` has by the same name
_OF_OBJECTIVE = [
    *("alpha", "beta", "gamma", "method", "score", "normalize", "distance", "pool", "every", "warmup"),
    *("balance", "detach_original", "shuffle_pairs", "layer_relative", "confidence", "consistency"),
    "originals_only",
]


def make_objective(config: Config, share: data.Share, log: Callable[[str], object] = log_line) -> Objective:
    """The network and its losses, drawn from torch's global generator.

    Raises:
        ValueError: the network has no layer of a name, or cannot take images of the size or the method, or
            the weights are another's.
    """
    model = models.build(config.model, count_classes(config))
    if config.weights is not None:
        log(models.load_weights(model, config.model, config.weights))
    for name in config.freeze:
        if name not in (parts := dict(model.network.named_modules())):
            raise catalog.unknown("freeze", name, filter(None, parts))
        parts[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze must leave something to be trained, got {', '.join(config.freeze)}")
    augmentation = AUGMENTATIONS[config.augmentation]()
    if share.of > 1 and augmentation.least_samples == 1:
        augmentation = SharedDraw(augmentation, share)
    repeats = catalog.METHODS[config.method].repeats
    objective = Objective(
        model,
        augmentation,
        layers=config.compared_layers,
        method_options={repeats: config.samples} if repeats else None,
        **{name: getattr(config, name) for name in _OF_OBJECTIVE},
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


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """SGD with momentum, or AdamW."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def make_schedule(config: Config, optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    """The learning rate over all steps: constant, a falling cosine, or up and down again in one cycle."""
    if config.schedule == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps + 1, pct_start=0.25, cycle_momentum=False
    )


def derived_seed(seed: int, *what: str | int) -> int:
    """A seed for one purpose, unlike that of any other purpose."""
    return int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:7])


@contextlib.contextmanager
def numerics(config: Config) -> Iterator[None]:
    """TF32 where it is asked for and only there; torch's global generators are left as they were."""
    with tf32(config.precision == "tf32"), torch.random.fork_rng():
        yield
