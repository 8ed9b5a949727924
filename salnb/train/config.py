"""The settings of a training run; free of torch, so that a mistake is answered at once."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from salnb._common import catalog
from salnb._common.devices import check_device_name

__all__ = ["PRACTICAL", "Config"]

# where and how fast a run is made and how often it is saved; a resumed run may alter these
PRACTICAL = frozenset({"out", "device", "workers", "save_minutes"})


def setting(default: Any, text: str) -> Any:
    """A field of `Config` with a line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a training run is, checked when it is made.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a name is unknown, a number is out of its range, or two settings do not go together; the
            message names the setting, what was given and what is allowed.
        ModuleNotFoundError: a network of timm is asked for, and timm is not installed.
    """

    out: str = dataclasses.field(metadata={"help": "folder of the run"})
    data: str = setting("digit-scenes", "data set: " + ", ".join(catalog.DATA))
    size: int = setting(32, "height and width of the images, in pixels")
    train_images: int | None = setting(None, "use only so many training images")
    model: str = setting("small", "network: " + ", ".join(catalog.NETWORKS) + ", timm:NAME")
    augmentation: str = setting("affine", "augmentation: " + ", ".join(catalog.AUGMENTATIONS))
    alpha: float = setting(1.0, "weight of the class loss (eq. 5)")
    beta: float = setting(0.0, "weight of the invariance loss (eq. 6)")
    gamma: float = setting(1.0, "weight of the saliency loss (eq. 7)")
    layers: tuple[str, ...] = setting((), "layers of the invariance loss; by default the network's stages")
    method: str = setting("vanilla_gradient", "saliency method: " + ", ".join(catalog.METHODS))
    normalize: str = setting("max", "normalisation of each map: " + ", ".join(catalog.NORMALIZATIONS))
    distance: str = setting("mse", "distance between maps: " + ", ".join(catalog.DISTANCES))
    pool: int = setting(1, "side of the blocks of pixels whose means are compared")
    samples: int = setting(25, "noisy copies of each image that smoothgrad takes the mean of")
    every: int = setting(1, "steps from one saliency loss to the next")
    warmup: int = setting(0, "steps before the first saliency loss")
    detach_original: bool = setting(False, "hold the originals' maps fixed")
    epochs: int = setting(30, "passes over the training images")
    batch_size: int = setting(64, "originals in a step, over all processes")
    optimizer: str = setting("sgd", "optimiser: " + ", ".join(catalog.OPTIMIZERS))
    learning_rate: float = setting(0.05, "the highest learning rate")
    weight_decay: float = setting(5e-4, "weight decay")
    schedule: str = setting("onecycle", "learning rate over the run: " + ", ".join(catalog.SCHEDULES))
    seed: int = setting(0, "of everything that is drawn")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("32", "arithmetic: " + ", ".join(catalog.PRECISIONS))
    compile: bool = setting(False, "compile the step; pays off on GPUs")
    workers: int = setting(4, "processes that decode images from disk")
    save_minutes: float = setting(10.0, "time between checkpoints within an epoch, in minutes")

    def __post_init__(self) -> None:
        """Check every setting on its own, then those that depend on one another."""
        object.__setattr__(self, "out", str(self.out))
        if isinstance(self.layers, str) or not isinstance(self.layers, Collection):
            raise TypeError(f"layers must be names of layers, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        self._check_types()
        known: dict[str, Collection[str]] = {
            "data": catalog.DATA,
            "augmentation": catalog.AUGMENTATIONS,
            "precision": catalog.PRECISIONS,
            "method": catalog.METHODS,
            "normalize": catalog.NORMALIZATIONS,
            "distance": catalog.DISTANCES,
            "optimizer": catalog.OPTIMIZERS,
            "schedule": catalog.SCHEDULES,
        }
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise catalog.unknown(name, getattr(self, name), names)
        for name in ("size", "train_images", "pool", "samples", "every", "epochs", "batch_size"):
            self._at_least(name, 1)
        for name in ("alpha", "beta", "gamma", "warmup", "weight_decay", "seed", "workers", "save_minutes"):
            self._at_least(name, 0)
        if self.pool > self.size:
            raise ValueError(f"pool must be at most {self.size}, the size of the images, got {self.pool}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        check_device_name(self.device)
        if self.device == "cpu" and self.precision in ("tf32", "fp16"):
            raise ValueError(f"precision {self.precision} is for GPUs: with device cpu, take 32 or bf16")
        if not self.out:
            raise ValueError("out must name a folder, got ''")
        self._check_network(catalog.network(self.model))
        self._check_data(catalog.DATA[self.data])

    def _check_types(self) -> None:
        for name, expected in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name == "layers":
                if not all(isinstance(layer, str) for layer in value):
                    raise TypeError(f"layers must be names of layers, got {value!r}")
                continue
            if expected is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are one configuration
                continue
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                words = getattr(expected, "__name__", str(expected))
                raise TypeError(f"{name} must be of type {words}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

    def _check_network(self, network: catalog.Network) -> None:
        catalog.check_size(self.model, self.size)
        if self.gamma and catalog.METHODS[self.method].layer and self.size < network.smallest_for_cam:
            raise ValueError(
                f"method {self.method} needs a layer with more than one pixel, which {self.model} lacks at "
                f"size {self.size}: take a size of at least {network.smallest_for_cam}, or another method"
            )
        if self.beta and not self.compared_layers:
            raise ValueError(f"layers must be named for beta > 0 with {self.model}, got none")
        if self.layers and not self.beta:
            raise ValueError(f"layers are for the invariance loss, got {', '.join(self.layers)} with beta=0")
        if not self.alpha and not self.beta and not self.gamma:
            raise ValueError("one of alpha, beta and gamma must be positive, got 0 for all")

    def _check_data(self, source: catalog.Source) -> None:
        if source.sizes is not None and self.size not in source.sizes:
            sizes = ", ".join(map(str, source.sizes))
            raise ValueError(f"size of {self.data} must be one of {sizes}, got {self.size}")
        least = catalog.AUGMENTATIONS[self.augmentation]
        if self.batch_size < least:
            raise ValueError(
                f"batch_size must be at least {least} for {self.augmentation}, which mixes images, "
                f"got {self.batch_size}"
            )
        known = [count for count in (source.training_images, self.train_images) if count is not None]
        if known and self.batch_size > min(known):
            raise ValueError(
                f"batch_size must be at most {min(known)}, the number of training images, "
                f"got {self.batch_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return dataclasses.asdict(self) | {"layers": list(self.layers)}

    def differences(self, theirs: dict[str, Any]) -> str:
        """What sets a run of `theirs`, from `to_dict`, apart from this one; "" where it would do the same."""
        ours = self.to_dict()
        return ", ".join(
            f"{name} {theirs.get(name)!r} (now {ours.get(name)!r})"
            for name in sorted(theirs.keys() | ours.keys())
            if name not in PRACTICAL and theirs.get(name) != ours.get(name)
        )

    @property
    def compared_layers(self) -> tuple[str, ...]:
        """The layers of the invariance loss; none where it has no weight."""
        return (self.layers or catalog.network(self.model).layers) if self.beta else ()

    def check_run(self, *, resume: bool) -> None:
        """Raise unless this run may start here and now.

        Args:
            resume: whether a run that is in `out` already may be continued.

        Raises:
            ValueError: the processes that torchrun started cannot share a batch.
            FileExistsError: a run is in `out` and is not to be continued, or it is one of other settings.
            NotADirectoryError: `out` is a file.
            OSError: `out` cannot be made, or cannot be written to.
        """
        processes = int(os.environ.get("WORLD_SIZE", 1))
        least = processes * catalog.AUGMENTATIONS[self.augmentation]
        if self.batch_size % processes or self.batch_size < least:
            raise ValueError(
                f"batch_size must be a multiple of the {processes} processes and at least {least} with "
                f"{self.augmentation}, got {self.batch_size}"
            )
        self.check_folder(resume=resume)

    def check_folder(self, *, resume: bool) -> None:
        """Raise unless `out` may take this run; see `check_run`."""
        folder = Path(self.out)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"out must be a folder, got the file {folder}")
        if (folder / "config.json").exists():
            self._check_held(folder, resume)
        if not (folder / "summary.json").exists():
            _check_writable(folder)

    def _check_held(self, folder: Path, resume: bool) -> None:
        """Raise unless the run that a folder holds may be continued as this one."""
        try:
            theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise FileExistsError(
                f"out {folder} holds a config.json that is not of a run: name another folder"
            )
        if different := self.differences(theirs):
            raise FileExistsError(f"out {folder} holds a run of other settings: {different}")
        if not resume:
            raise FileExistsError(
                f"out {folder} holds this run already: resume it (--resume) or name another folder"
            )


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, f"out {folder} cannot be written to: {error.strerror}") from error
