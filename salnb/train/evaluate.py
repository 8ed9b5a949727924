"""What a network makes of a split: accuracy, loss, and where it looks."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from salnb import data, saliency, trust
from salnb.train.run import AHEAD, Run

__all__ = ["evaluate"]


def evaluate(run: Run, split: data.Split) -> dict[str, Any]:
    """Accuracy and loss on a split, and the share of saliency on the object where there are masks.

    The share is that of the plain gradient's map (eq. 1 and 2) of the true class, whichever method is trained
    with, so that runs can be compared. The network is put into eval mode.

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
            if masks is not None and failure is None:
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


def _finite(value: float, failure: Exception | None = None) -> Callable[[], float]:
    def give() -> float:
        if failure is not None or not math.isfinite(value):
            raise failure or ArithmeticError(f"it is {value}")
        return value

    return give
