"""What a network makes of a split: accuracy, loss, where it looks, and whether its maps agree."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from salnb import data, saliency, trust
from salnb._common import catalog
from salnb.agreement import Agreement, agreement
from salnb.augment import AUGMENTATIONS, Rotation
from salnb.train.run import AHEAD, Run

__all__ = ["agreement_text", "evaluate", "evaluate_groups", "evaluate_maps", "evaluate_turned"]

# how many images the agreement of maps is measured on, in batches of this size
_CHECKED, _BATCH = 1000, 100


def evaluate(run: Run, split: data.Split) -> dict[str, Any]:
    """Accuracy and loss on a split, and the share of saliency on the object where there are masks.

    The share is that of the first 1,000 images (and the rest of their last batch), and of the plain
    gradient's map (eq. 1 and 2) of the true class, whichever method is trained with, so that runs can be
    compared. The network is put into eval mode.

    Returns:
        "accuracy", and functions that give or raise what a record may lack (see `with_accessories`): "loss"
        (mean cross-entropy), and "saliency_on_object" where there are masks.

    Raises:
        Interrupted: a signal stopped the run, which has been saved.
    """
    config, fabric, model = run.config, run.fabric, run.objective.model
    model.eval()
    # the mean of the classes' accuracies would be called macro
    accuracy = MulticlassAccuracy(len(run.dataset.classes), average="micro", validate_args=False)
    # a loss that is not a number is not to be left out of the mean
    loss, on_object = (MeanMetric(nan_strategy="disable") for _ in range(2))
    for metric in (accuracy, loss, on_object):
        metric.to(fabric.device)
    failure: Exception | None = None
    batches = data.batches(split, config.size, fabric.device, batch_size=config.batch_size, share=run.share)
    for number, (images, labels, masks) in enumerate(batches):
        # all processes have these batches, and so come here; the last may be too small for some
        shared = number % AHEAD == 0 and number < len(split) // config.batch_size
        if (shared or run.share.of == 1) and run.stop_requested():
            run.interrupt()
        with fabric.autocast():
            with torch.no_grad():
                logits = model(images).float()
            if masks is not None and failure is None and number * config.batch_size < _CHECKED:
                try:
                    maps = saliency.vanilla_gradient(model, images, labels)
                    on_object.update(trust.share_on_object(maps, masks))
                except Exception as error:  # the accuracy is not lost for it
                    failure = error.with_traceback(None)
                    on_object.update(math.nan)  # the other processes' mean is not that of the split
        accuracy.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
    found = {"accuracy": accuracy.compute().item(), "loss": _finite(loss.compute().item())}
    if on_object.update_called:
        found["saliency_on_object"] = _finite(on_object.compute().item(), failure)
    return found


def evaluate_maps(run: Run, split: data.Split) -> dict[str, Any]:
    """How far the maps of a split's first 1,000 images agree with those of the same images augmented.

    The transformations are the same for all runs with an augmentation, whatever their seed; a run without
    one is measured under affine transformations. Where objects can be put on other photographs, all runs are
    measured under that swap alone. Maps are those of method and score that are trained with,
    in eval mode and in float32, of the true class. With several processes each measures all of it.

    Returns:
        The mean of each field of `Agreement`, as functions that give or raise what a record may lack, and
        "agreement_augmentation", the name of the augmentation.
    """
    config, device = run.config, run.fabric.device
    name = "affine" if config.augmentation == "identity" else config.augmentation
    name = name if run.dataset.backgrounds is None else "swap"
    augmentation = AUGMENTATIONS["identity" if name == "swap" else name]()
    repeats = catalog.METHODS[config.method].repeats
    sums, count, failure = torch.zeros(len(Agreement._fields), dtype=torch.float64), 0, None
    run.objective.model.eval()
    whole = data.batches(split.first(_CHECKED), config.size, device, batch_size=_BATCH)
    try:
        for number, (images, labels, masks) in enumerate(whole):
            if len(images) < 2:
                continue  # there is no other image to compare it with
            generator = torch.Generator(device).manual_seed(number)
            found = agreement(
                run.objective.model,
                augmentation,
                images,
                labels,
                generator,
                partners=run.swapped(images, masks, generator),
                num_classes=len(run.dataset.classes),
                method=config.method,
                method_options={repeats: config.samples, "generator": generator} if repeats else None,
                score=config.score,
                normalize=config.normalize,
                distance=config.distance,
                pool=config.pool,
            )
            sums += torch.stack([field.double().mean() for field in found]).cpu() * len(images)
            count += len(images)
    except Exception as error:  # the accuracy is not lost for it
        failure = error.with_traceback(None)
    means = (sums / count if count else sums * math.nan).tolist()
    values = {field: _finite(mean, failure) for field, mean in zip(Agreement._fields, means, strict=True)}
    return values | {"agreement_augmentation": name}


def evaluate_turned(run: Run, split: data.Split) -> dict[str, float]:
    """Accuracy on a split whose images are turned by up to `test_angle` degrees, and by up to half of it.

    The angles are drawn from all of that range, the same for all runs.
    """
    config, model, found = run.config, run.objective.model.eval(), {}
    for angle in (config.test_angle / 2, config.test_angle) if config.test_angle else ():
        right = torch.zeros((), device=run.fabric.device)
        whole = data.batches(split, config.size, run.fabric.device, batch_size=_BATCH)
        for number, (images, labels, _) in enumerate(whole):
            rotation = Rotation(angle)
            params = rotation.make_params(images, torch.Generator(images.device).manual_seed(number))
            with torch.no_grad(), run.fabric.autocast():
                right += (model(rotation.images(images, params)).argmax(1) == labels).sum()
        found[f"accuracy_turned_{angle:g}"] = right.item() / len(split)
    return found


def evaluate_groups(run: Run, split: data.Split) -> dict[str, float]:
    """Accuracy on test images with the background of their class, on those without, and the lesser.

    Nothing where backgrounds belong to no class.
    """
    if run.dataset.families is None:
        return {}
    config, device, model = run.config, run.fabric.device, run.objective.model.eval()
    right, labels = [], []
    for images, of_batch, _ in data.batches(split, config.size, device, batch_size=_BATCH):
        with torch.no_grad(), run.fabric.autocast():
            right.append(model(images).argmax(1) == of_batch)
        labels.append(of_batch)
    hits, matched = torch.cat(right).cpu(), run.dataset.families["test"] == torch.cat(labels).cpu()
    groups = {
        name: hits[group].double().mean().item()
        for name, group in (("matched", matched), ("unmatched", ~matched))
    }
    return {f"{name}_accuracy": value for name, value in groups.items()} | {
        "worst_group_accuracy": min(groups.values())
    }


def agreement_text(summary: Mapping[str, Any]) -> str:
    """A line on how far the maps of a run agree, from its summary; "" where nothing was measured."""
    words = {
        "test_correlation": "correlation {:.3f}",
        "test_correlation_4x4": "of 4×4 blocks {:.3f}",
        "test_correlation_others": "with another image's map {:.3f}",
        "test_map_distance": "eq. 7 {:.4f}",
        "test_half_area": "half of a map on {:.1%} of the pixels",
        "test_saliency_on_object": "{:.1%} on the object",
    }
    found = [text.format(summary[key]) for key, text in words.items() if summary.get(key) is not None]
    return ", ".join(found)


def _finite(value: float, failure: Exception | None = None) -> Callable[[], float]:
    def give() -> float:
        if failure is not None or not math.isfinite(value):
            raise failure or ArithmeticError(f"it is {value}")
        return value

    return give
