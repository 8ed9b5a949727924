"""What a network makes of a split: accuracy, loss, and where it looks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from salnb import data, saliency, trust

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    split: data.Split,
    fabric: Fabric,
    *,
    num_classes: int,
    size: int,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy and loss on a split, and the share of saliency on the object where there are masks.

    The share is that of the plain gradient's map (eq. 1 and 2) of the true class, whichever method is trained
    with, so that runs can be compared.

    Args:
        model: maps images in [0, 1] to logits; it is put into eval mode.
        split: the images.
        fabric: device, precision, processes; each process looks at its share of the images.
        num_classes: K.
        size: height and width that the images are brought to.
        batch_size: over all processes.
        between: called before each batch.

    Returns:
        "accuracy", "loss" (mean cross-entropy), and "saliency_on_object" where there are masks.
    """
    model.eval()
    # the mean of the classes' accuracies would be called macro
    accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False).to(fabric.device)
    # a loss that is not a number is not to be left out of the mean
    loss, on_object = (MeanMetric(nan_strategy="disable").to(fabric.device) for _ in range(2))
    masked = False
    share = data.Share(fabric.global_rank, fabric.world_size)
    for images, labels, masks in data.batches(split, size, fabric.device, batch_size=batch_size, share=share):
        between()
        with fabric.autocast():
            with torch.no_grad():
                logits = model(images).float()
            if masks is not None:
                masked = True
                maps = saliency.vanilla_gradient(model, images, labels)
                on_object.update(trust.share_on_object(maps, masks))
        accuracy.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
    found = {"accuracy": accuracy.compute().item(), "loss": loss.compute().item()}
    return found | ({"saliency_on_object": on_object.compute().item()} if masked else {})
