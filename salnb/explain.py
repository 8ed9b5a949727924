"""Saliency maps of one's own photographs, as pictures and as numbers."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salnb import results, saliency
from salnb._common.catalog import METHODS as SPECS
from salnb._common.files import DamagedFileError, make_folder, write_atomic
from salnb._common.image_folder import check_out
from salnb._common.packages import require
from salnb._common.progress import log_line, progress
from salnb.augment import AUGMENTATIONS, Augmentation
from salnb.losses import normalize_maps, saliency_loss
from salnb.trained import Trained

__all__ = ["compared_maps", "explain"]


def compared_maps(
    trained: Trained, images: Tensor, labels: Tensor, augmentation: Augmentation, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What eq. 7 compares of images (N, 3, H, W) and labels (N,), step by step, with plain gradients.

    Returns:
        By name the augmented images, the maps of both, that of the latter brought back, and their absolute
        difference, (N, 1, H, W), each map divided by its maximum; where the last two hold, of the same shape;
        and the saliency loss of each, (N,).
    """
    params = augmentation.make_params(images, torch.Generator(images.device).manual_seed(seed))
    new = augmentation.images(images, params)
    maps, new_maps = (saliency.vanilla_gradient(trained.model, x, labels) for x in (images, new))
    first, second, valid = augmentation.align(maps, new_maps, params)
    a, b = (normalize_maps(both, valid) for both in (first, second))
    steps = {"augmented": new, "map": normalize_maps(maps), "its map": normalize_maps(new_maps)}
    steps |= {"its map,\nbrought back": b, "difference": (a - b).abs()}
    losses = [saliency_loss(*one) for one in zip(*(x.split(1) for x in (first, second, valid)), strict=True)]
    return steps, valid, torch.stack(losses)


def explain(
    trained: Trained,
    files: Mapping[str, Path],
    out: str | Path,
    *,
    method: str = "grad_cam",
    method_options: Mapping[str, Any] | None = None,
    target: str | None = None,
    every_method: bool = False,
    augment: str | None = None,
    batch_size: int = 16,
    log: Callable[[str], object] = log_line,
) -> list[str]:
    """Draw the maps of photographs: `NAME.png`, over the photograph, and `NAME.npy`, the map (H, W) as it is.

    `scores.json` has the five most probable classes of each.

    Args:
        trained: the network.
        files: the photographs, by the names of what is drawn of them.
        out: a folder; made if need be.
        method: a key of `salnb.saliency.METHODS`.
        method_options: its keyword arguments; a layer may be named as it is inside of the network.
        target: number or name of the class; None: the most probable one of each photograph.
        every_method: draw all methods side by side as well, `NAME-methods.png`.
        augment: draw what eq. 7 compares as well, under an augmentation of single images, `NAME-AUGMENT.png`.
        batch_size: photographs at once.
        log: is given the classes of up to ten photographs, and a last line.

    Returns:
        What is wrong with those photographs that cannot be read.

    Raises:
        ValueError: there is no such class, or something would take the place of a photograph or of what is
            drawn of another.
        OSError: the folder cannot be written to, or a file in it, which is named.
        ModuleNotFoundError: the extra `chapters`, which draws, is not installed.
    """
    plot = require("salnb.plot", "chapters", what="explain")
    label = None if target is None else trained.label_of(target)
    check_out(out, files, every_method, augment)
    make_folder(out := Path(out))
    options, names = dict(method_options or {}), list(files)
    if (layer := f"network.{options.get('layer')}") in dict(trained.model.named_modules()):
        options["layer"] = layer
    scores: dict[str, Any] = {}
    wrong: list[str] = []
    for start in progress(range(0, len(names), batch_size), "explaining", unit="batch"):
        read = _read(trained, {name: files[name] for name in names[start : start + batch_size]}, wrong)
        if not read:
            continue
        images = torch.cat(list(read.values()))
        top = _top_five(trained, images)
        labels = torch.tensor([t[0]["label"] if label is None else label for t in top], device=images.device)
        maps = saliency.METHODS[method](trained.model, images, labels, **options)
        for i, name in enumerate(read):
            one = (trained, images[i : i + 1], labels[i : i + 1])
            scores[name] = {"file": str(files[name]), "target": labels[i].item(), "top": top[i]}
            write_atomic(out / f"{name}.npy", _npy(maps[i, 0]))
            title = [plot.style.as_text(trained.classes[int(labels[i])])]
            power = 0.5 if SPECS[method].pixels else 1.0
            drawn = {SPECS[method].title: maps[i : i + 1]}
            figures = {"": plot.overlay(one[1], drawn, title, power=power, size=2.4)}
            if every_method:
                drawn = _each_method(*one, options)
                figures["-methods"] = plot.overlay(one[1], drawn, title, power=0.5, size=1.5)
            if augment is not None:
                figures[f"-{augment}"] = _comparison(plot, *one, augment)
            for ending, figure in figures.items():
                write_atomic(out / f"{name}{ending}.png", plot.png(figure))
    results.write_record(out / "scores.json", scores)
    if len(scores) <= 10:
        _tell(scores, log)
    log(f"{len(scores)} of {len(files)} photographs explained, in {out}")
    return wrong


def _tell(scores: Mapping[str, Any], log: Callable[[str], object]) -> None:
    for name, score in scores.items():
        log(name)
        for best in score["top"]:
            log(f"  {100 * best['probability']:5.1f} %  {best['class']} ({best['label']})")


def _read(trained: Trained, files: Mapping[str, Path], wrong: list[str]) -> dict[str, Tensor]:
    read = {}
    for name, file in files.items():
        try:
            read[name] = trained.read(file)
        except DamagedFileError as error:
            wrong.append(str(error))
    return read


def _top_five(trained: Trained, images: Tensor) -> list[list[dict[str, Any]]]:
    with torch.no_grad():
        best = trained.model(images).float().softmax(1).topk(min(5, len(trained.classes)))
    return [
        [{"label": i, "class": trained.classes[i], "probability": p} for i, p in zip(*both, strict=True)]
        for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _each_method(
    trained: Trained, image: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    layer = {key: value for key, value in options.items() if key in ("layer", "reshape")}
    return {
        spec.title: saliency.METHODS[name](trained.model, image, labels, **(layer if spec.layer else {}))
        for name, spec in SPECS.items()
    }


def _comparison(plot: Any, trained: Trained, image: Tensor, labels: Tensor, augment: str) -> Any:
    steps, valid, losses = compared_maps(trained, image, labels, AUGMENTATIONS[augment](), seed=5)
    title = [f"{plot.style.as_text(trained.classes[int(labels)])}\nloss {losses.item():.4f}"]
    where = dict.fromkeys(list(steps)[-2:], valid)
    return plot.show_maps(image, steps, title, rescale=False, valid=where, size=2.2, columns=3)


def _npy(values: Tensor) -> bytes:
    require("numpy").save(content := io.BytesIO(), values.float().cpu().numpy())
    return content.getvalue()
