"""Trained networks: what a run leaves, loaded in one line, and what it is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salnb import data, models, results, saliency, trust
from salnb._common.catalog import check_trained, unknown
from salnb._common.devices import resolve_device
from salnb._common.files import write_atomic
from salnb._common.image_folder import named
from salnb._common.packages import require
from salnb._common.progress import progress
from salnb._common.tables import markdown_table
from salnb.agreement import agreement
from salnb.augment import AUGMENTATIONS, Augmentation

__all__ = ["Trained", "check_can_save", "evaluate", "load", "report", "save"]


@dataclass
class Trained:
    """A network with what it needs to look at a photograph.

    Attributes:
        model: in eval mode, from images (N, 3, H, W) in [0, 1] to logits (N, K): it normalises them itself.
        name: of the network, as `salnb.models.build` takes it.
        classes: K names.
        size: height and width that it was trained at.
    """

    model: models.Normalized
    name: str
    classes: list[str]
    size: int

    def read(self, *files: str | Path) -> Tensor:
        """Image files as the network takes them: (N, 3, size, size), float32 in [0, 1], on its device.

        Raises:
            TypeError, ValueError: there is none, or one is no path.
            DamagedFileError: one cannot be read; the message names it.
        """
        if not files:
            raise ValueError("files must be one or more, got none")
        for file in files:
            if not isinstance(file, str | Path):
                raise TypeError(
                    f"files must be paths, each an argument of its own, got {type(file).__name__}"
                )
        images = torch.stack([data.read_photograph(file, self.size) for file in files])
        return images.to(self.model.mean.device).float().div(255)

    def label_of(self, target: str) -> int:
        """The number of a class from its name, its number, or a part of a name that only one has.

        A name goes first: classes may be named by numbers that are not theirs, as "10" comes before "2".

        Raises:
            TypeError: it is no string; a number must be written as one.
            ValueError: there is none, or there are several.
        """
        if not isinstance(target, str):
            raise TypeError(f"target must be a string, the number or the name of a class, got {target!r}")
        if target in self.classes:
            return self.classes.index(target)
        if target.isdecimal() and int(target) < len(self.classes):
            return int(target)
        lower = [name.lower() for name in self.classes]
        parts = [i for i, name in enumerate(lower) if target.lower() in name]
        exact = [i for i in parts if lower[i] == target.lower()]
        if len(exact or parts) == 1:
            return (exact or parts)[0]
        raise unknown("target", target, [self.classes[i] for i in exact or parts] or self.classes)


def check_can_save() -> Any:
    """The module that writes `model.safetensors`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return require("safetensors.torch", "train", what="model.safetensors")


def save(folder: str | Path, model: models.Normalized, name: str, classes: Sequence[str], size: int) -> None:
    """Write `model.safetensors` and `model.json` into a folder; see `Trained` for the arguments."""
    state = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.network.state_dict().items()
    }
    content = check_can_save().save(state)
    write_atomic(Path(folder) / "model.safetensors", content)
    statistics = {key: getattr(model, key).flatten().tolist() for key in ("mean", "std")}
    record = {"network": name, "classes": list(classes), "size": size, **statistics}
    results.write_record(Path(folder) / "model.json", record)


def load(source: str | Path, device: str = "cpu") -> Trained:
    """A trained network.

    Args:
        source: the folder of a finished run; or, trained on ImageNet, "torchvision:NAME", "timm:NAME" or
            "efficientnet_lite0", see `salnb.models.load_weights`.
        device: where it goes.

    Raises:
        ValueError: there is no such network, no finished run in the folder, a damaged one, or no such device.
        ConnectionError, OSError, DamagedFileError: the weights cannot be downloaded, kept or read.
    """
    check_trained(str(source))
    kind, _, name = str(source).partition(":")
    if (Path(source) / "model.json").exists():
        known = models.read_description(source)
        name, classes, size = known["network"], known["classes"], known["size"]
        model = models.build(name, len(classes))
        if (told := models.load_weights(model, name, source)) != f"weights {source}":
            raise ValueError(f"{source}/model.json has other classes than the network beside it: {told}")
    else:
        name = name if kind == "torchvision" else f"timm:{name or 'tf_efficientnet_lite0'}"
        classes, (model, size) = data.imagenet_classes(), models.imagenet(name)
    trained = Trained(model, name, classes, size)
    trained.model.eval().to(resolve_device(device))
    return trained


def evaluate(
    trained: Trained, split: data.Split, augmentation: Augmentation, *, batch_size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """How a network does on a split of its classes.

    Args:
        trained: the network.
        split: labelled images.
        augmentation: under which maps are compared.
        batch_size: images at once.
        seed: of the augmentation.

    Returns:
        "accuracy"; "classes", for each its number of "images" and its "accuracy"; "correlation" and
        "correlation_others" of plain gradients, see `salnb.agreement.Agreement`; and, where there are masks,
        "saliency_on_object", the share of the map of the true class, and "object", that of the pixels.
    """
    device, count = trained.model.mean.device, len(trained.classes)
    generator = torch.Generator(device).manual_seed(seed)
    right, images_of = torch.zeros(count), torch.zeros(count)
    sums: dict[str, list[Tensor]] = {}
    batches = data.batches(split, trained.size, device, batch_size=batch_size)
    for images, labels, masks in progress(batches, "evaluating", total=-(-len(split) // batch_size)):
        with torch.no_grad():
            hits = (trained.model(images).argmax(1) == labels).cpu().float()
        right.index_add_(0, labels.cpu(), hits)
        images_of.index_add_(0, labels.cpu(), torch.ones(len(labels)))
        found = {}
        if len(images) > 1:
            maps = agreement(trained.model, augmentation, images, labels, generator, num_classes=count)
            found = {"correlation": maps.correlation, "correlation_others": maps.correlation_others}
        if masks is not None:
            shares = trust.share_on_object(saliency.vanilla_gradient(trained.model, images, labels), masks)
            found |= {"saliency_on_object": shares, "object": masks.float().mean((1, 2, 3))}
        for name, values in found.items():
            sums.setdefault(name, []).append(values.double().cpu())
    each = {
        name: {"images": int(n), "accuracy": round((hits / n).item(), 4) if n else None}
        for name, n, hits in zip(trained.classes, images_of, right, strict=True)
    }
    means = {name: torch.cat(values).mean().item() for name, values in sums.items()}
    return {"accuracy": (right.sum() / images_of.sum()).item(), "classes": each} | means


def report(
    run: str | Path, name: str, root: str | None, augmentation: str, *, device: str, batch_size: int
) -> str:
    """What `evaluate` finds, in words; the arguments are those of `salnb evaluate`.

    Raises:
        ValueError: the data's classes are not those of the run, or see `load`.
    """
    network = load(run, device)
    if root is not None:
        split, classes = data.images_to_test(root, network.size, record=Path(run) / "split.json")
    else:
        dataset = data.load(name, network.size)
        split, classes = dataset.test, dataset.classes
    if classes != network.classes:
        odd = named(sorted({*classes} ^ {*network.classes}) or classes)
        raise ValueError(f"data {root or name} has other classes than {run}: {odd}")
    found = evaluate(network, split, AUGMENTATIONS[augmentation](), batch_size=batch_size)
    rows = [(each, row["images"], row["accuracy"]) for each, row in found["classes"].items()]
    lines = [markdown_table(("class", "images", "accuracy"), rows)]
    lines.append(f"accuracy {found['accuracy']:.4f} of {len(split)} images")
    if "correlation" in found:
        others = f"with another image's {found['correlation_others']:.4f}"
        lines.append(f"correlation of maps under {augmentation} {found['correlation']:.4f}, {others}")
    if "object" in found:
        share, pixels = found["saliency_on_object"], found["object"]
        lines.append(f"share of saliency on the object {share:.4f}, of pixels {pixels:.4f}")
    return "\n".join(lines)
