"""The settings of a training run; free of torch, so that a mistake is answered at once."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

from salnb import results
from salnb._common import catalog
from salnb._common.devices import check_device_name
from salnb._common.files import check_writable
from salnb._common.image_folder import find_images
from salnb._common.yaml_file import number_as_written

__all__ = ["PRACTICAL", "Config", "as_written", "torchrun"]

# where and how fast a run is made and how often it is saved; a resumed run may alter these
PRACTICAL = frozenset({"out", "device", "workers", "save_minutes"})
# what each process of several must know
_OF_TORCHRUN = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
# what is taken for a type and made one: 1 and 1.0 and numpy's numbers are the same configuration
_FORMS: dict[Any, Any] = {
    bool: bool,
    int: Integral,
    int | None: Integral,
    float: Real,
    str: str,
    str | None: str,
}


def setting(default: Any, text: str, *, known: Collection[str] = (), least: int | None = None) -> Any:
    """A field of `Config`: a line of help, and the words or the least number that are allowed."""
    listed = ": ".join([text, *filter(None, [", ".join(known)])])
    return dataclasses.field(default=default, metadata={"help": listed, "known": known, "least": least})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a training run is, checked when it is made.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a name is unknown, a number is out of its range, or two settings do not go together; the
            message names the setting, what was given and what is allowed.
        ModuleNotFoundError: a network of timm is asked for, and timm is not installed.
    """

    out: str = setting(dataclasses.MISSING, "folder of the run")
    data: str = setting("digit-scenes", "data set", known=catalog.DATA)
    data_dir: str | None = setting(
        None,
        "folder of images, for data folder; what it lacks of val and test is put aside, alike for all seeds",
    )
    skip_unreadable: bool = setting(False, "go on without the images of the folder that cannot be read")
    size: int = setting(32, "height and width of the images, in pixels", least=1)
    train_images: int | None = setting(None, "use only so many training images", least=1)
    test_scenes: int = setting(1000, "scenes in the test of digit scenes, a multiple of 1000", least=1000)
    model: str = setting("small", "network: " + ", ".join([*catalog.NETWORKS, "timm:NAME"]))
    weights: str | None = setting(None, "to begin with: DEFAULT, a file or a finished run; by default drawn")
    freeze: tuple[str, ...] = setting((), "modules of the network whose parameters stay as they are")
    augmentation: str = setting("affine", "augmentation", known=catalog.AUGMENTATIONS)
    alpha: float = setting(1.0, "weight of the class loss (eq. 5)", least=0)
    beta: float = setting(0.0, "weight of the invariance loss (eq. 6)", least=0)
    gamma: float = setting(1.0, "weight of the saliency loss (eq. 7)", least=0)
    layers: tuple[str, ...] = setting((), "layers of the invariance loss; by default the network's stages")
    layer_relative: bool = setting(False, "divide eq. 6 by the distance between different images")
    method: str = setting("vanilla_gradient", "saliency method", known=catalog.METHODS)
    score: str = setting("logit", "score whose gradient a map is", known=catalog.SCORES)
    normalize: str = setting("max", "normalisation of each map", known=catalog.NORMALIZATIONS)
    distance: str = setting("mse", "distance between maps", known=catalog.DISTANCES)
    pool: int = setting(1, "side of the blocks of pixels whose means are compared", least=1)
    samples: int = setting(25, "noisy copies of each image that smoothgrad takes the mean of", least=1)
    every: int = setting(1, "steps from one saliency loss to the next", least=1)
    warmup: int = setting(0, "steps before the first saliency loss", least=0)
    balance: float = setting(0.0, "gradient of the saliency loss over the class loss's; 0: gamma", least=0)
    detach_original: bool = setting(False, "hold the originals' maps fixed")
    shuffle_pairs: bool = setting(False, "compare each map with another image's, as a control")
    swap: bool = setting(False, "pair each scene with its digit on another photograph, and augment that one")
    originals_only: bool = setting(False, "leave the augmented images out of the class loss")
    right_reasons: bool = setting(False, "in place of eq. 7, the squared gradient outside the object")
    labels_per_class: int | None = setting(None, "keep only so many labels of each class", least=1)
    confidence: float = setting(0.0, "probability from which the network's class serves as a label", least=0)
    consistency: float = setting(0.0, "weight of consistent predictions on images without labels", least=0)
    test_angle: float = setting(
        0.0, "test on images turned by up to so many degrees, and half of it", least=0
    )
    epochs: int = setting(30, "passes over the training images", least=1)
    batch_size: int = setting(64, "originals in a step, over all processes", least=1)
    optimizer: str = setting("sgd", "optimiser", known=catalog.OPTIMIZERS)
    learning_rate: float = setting(0.05, "the highest learning rate")
    weight_decay: float = setting(5e-4, "weight decay", least=0)
    schedule: str = setting("onecycle", "learning rate over the run", known=catalog.SCHEDULES)
    seed: int = setting(0, "of everything that is drawn", least=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("32", "arithmetic", known=catalog.PRECISIONS)
    compile: bool = setting(False, "compile the step; pays off on GPUs")
    workers: int = setting(4, "processes that decode images from disk", least=0)
    save_minutes: float = setting(10.0, "time between checkpoints within an epoch, in minutes", least=0)

    def __post_init__(self) -> None:
        """Check every setting on its own, then those that depend on one another."""
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, value = field.name, _plain(field.name, getattr(self, field.name), kinds[field.name])
            object.__setattr__(self, name, value)
            known, least = field.metadata["known"], field.metadata["least"]
            if known and value not in known:
                raise catalog.unknown(name, value, known)
            if None not in (value, least) and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not _is_path(self.out):
            raise ValueError(f"out must name a folder, got {self.out!r}")
        if self.pool > self.size:
            raise ValueError(f"pool must be at most {self.size}, the size of the images, got {self.pool}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        check_device_name(self.device)
        if self.device == "cpu" and self.precision in ("tf32", "fp16"):
            raise ValueError(f"precision {self.precision} is for GPUs: with device cpu, take 32 or bf16")
        catalog.check_confidence(self.confidence, self.consistency, self.originals_only)
        if (self.labels_per_class is None) != (self.confidence == 0):
            raise ValueError(
                "labels_per_class and confidence go together, got "
                f"labels_per_class={self.labels_per_class} and confidence={self.confidence}"
            )
        catalog.check_balance(self.balance, self.alpha, self.gamma)
        self._check_network(catalog.network(self.model))
        self._check_data(catalog.DATA[self.data])

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
        catalog.check_made_in(self.data, self.size)
        if (self.data == "folder") != (self.data_dir is not None):
            raise ValueError(
                f"data_dir and data folder go together, got {self.data_dir!r} with {self.data!r}"
            )
        if self.swap and self.data != "digit-scenes-shortcut":
            raise ValueError(f"swap is for digit-scenes-shortcut, got data {self.data}")
        if self.right_reasons and (source.sizes is None or not self.gamma):
            raise ValueError(
                "right_reasons is a saliency loss, with gamma > 0, for digit scenes, whose masks are known, "
                f"got gamma={self.gamma} with {self.data}"
            )
        if self.test_scenes % 1000 or (self.test_scenes != 1000 and source.sizes is None):
            raise ValueError(
                "test_scenes must be a multiple of 1000, and are for digit scenes only, "
                f"got {self.test_scenes} with {self.data}"
            )
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
        return dataclasses.asdict(self) | {"layers": list(self.layers), "freeze": list(self.freeze)}

    def differences(self, theirs: dict[str, Any]) -> str:
        """What sets a run of `theirs`, from `to_dict`, apart from this one; "" where it would do the same."""
        ours = self.to_dict()
        # what was recorded before there was a setting has its default
        theirs = type(self)(out=self.out).to_dict() | theirs
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
            ValueError: the processes that torchrun started cannot share a batch, or its variables are wrong,
                or `weights` or `data_dir` is not what it should be.
            FileExistsError: a run is in `out` and is not to be continued, or it is one of other settings, or
                is damaged.
            OSError: `out` is a file, or cannot be made or written to.
        """
        processes = torchrun("WORLD_SIZE")
        least = processes * catalog.AUGMENTATIONS[self.augmentation]
        if self.batch_size % processes or self.batch_size < least:
            raise ValueError(
                f"batch_size must be a multiple of the {processes} processes and at least {least} with "
                f"{self.augmentation}, got {self.batch_size}"
            )
        if processes % torchrun("LOCAL_WORLD_SIZE"):
            raise ValueError(f"WORLD_SIZE must be a multiple of LOCAL_WORLD_SIZE, got {processes}")
        if processes > 1 and (lacking := _OF_TORCHRUN - os.environ.keys()):
            raise ValueError(
                f"WORLD_SIZE is {processes}, but {', '.join(sorted(lacking))} are not set: "
                "start the processes with torchrun, or unset WORLD_SIZE"
            )
        if self.weights not in (None, "DEFAULT") and not os.path.exists(str(self.weights)):
            raise ValueError(f"weights must be DEFAULT, a file or a finished run, got {self.weights!r}")
        if self.data_dir is not None:
            find_images(self.data_dir)
        self.check_folder(resume=resume)

    def check_folder(self, *, resume: bool) -> None:
        """Raise unless `out` may take this run; see `check_run`."""
        folder = Path(self.out)
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(f"out must be a folder, got the file {folder}")
        config = _read(folder, "config.json", data=str, model=str)
        summary = _read(folder, "summary.json", test_accuracy=float, config=dict)
        for theirs in filter(None, (config, summary and summary["config"])):
            if different := self.differences(theirs):
                raise FileExistsError(f"out {folder} holds a run of other settings: {different}")
            if not resume:
                raise FileExistsError(
                    f"out {folder} holds this run already: resume it (--resume) or name another folder"
                )
        if not config and os.path.isdir(folder / "checkpoints"):
            raise FileExistsError(
                f"out {folder} holds checkpoints without a config.json: name another folder"
            )
        if os.path.isdir(folder / "metrics.jsonl"):
            raise IsADirectoryError(f"out {folder} holds a folder metrics.jsonl: name another folder")
        if not summary:
            _check_writable(folder)


def as_written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file in YAML as they are meant where its rules would have them otherwise.

    `precision: 32` is a number there, and `learning_rate: 1e-3` a word, as it has no point.
    """
    kinds, found = get_type_hints(Config), dict(settings)
    for field in dataclasses.fields(Config):
        value = found.get(field.name)
        if kinds[field.name] is float and isinstance(value, str):
            found[field.name] = number_as_written(value)
        if type(value) is int and str(value) in field.metadata["known"]:
            found[field.name] = str(value)
    return found


def torchrun(name: str) -> int:
    """How many processes torchrun started, by the environment variable in which it says so; 1 without it."""
    given = os.environ.get(name, "1")
    if not re.fullmatch("[1-9][0-9]{0,8}", given):
        raise ValueError(f"{name}, which torchrun sets, must be a number of processes, got {given!r}")
    return int(given)


def _plain(name: str, value: Any, kind: Any) -> Any:
    """A value as its setting's own type; raises where it has no such form."""
    if name in ("layers", "freeze"):
        if not isinstance(value, list | tuple) or not all(isinstance(layer, str) for layer in value):
            raise TypeError(f"{name} must be names of layers, got {_words(value)}")
        return tuple(value)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if value is None and isinstance(value, kind):
        return None
    if not isinstance(value, _FORMS[kind]) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {_words(value)}")
    return _number(name, value, kind) if isinstance(value, Real) and kind is not bool else value


def _words(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # of a whole number of thousands of digits, for one
        return f"a value of type {type(value).__name__}"


def _is_path(name: str) -> bool:
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # halves of characters, which are not what stands for other bytes in a path
        return False


def _number(name: str, value: Any, kind: Any) -> int | float:
    if kind is not float:
        value = int(value)
        if abs(value) >= 2**64:
            raise ValueError(f"{name} must be less than 2**64, got a number of {value.bit_length()} bits")
        return value
    try:
        value = float(value)
    except OverflowError:  # a whole number that is larger
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def _read(folder: Path, name: str, **needed: type) -> dict[str, Any] | None:
    """What a run left in its folder, or None."""
    if not os.path.lexists(folder / name):
        return None
    with contextlib.suppress(OSError, ValueError):
        record = results.read_record(folder / name)
        if all(isinstance(record.get(key), kind) for key, kind in needed.items()):
            return record
    raise FileExistsError(f"out {folder} holds a {name} that is not of a run: name another folder")


def _check_writable(folder: Path) -> None:
    try:  # the longest name
        check_writable(folder / "checkpoints" / "step-000000000.0123456789abcdef.damaged")
    except OSError as error:
        raise OSError(error.errno, f"out {folder} cannot be written to: {error.strerror}") from error
