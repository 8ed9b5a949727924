"""What a training run costs before it is made: the arithmetic of its steps.

A forward pass is counted by torch, on tensors without content, which takes no memory and no time. A step
without saliency takes three times as much, one with the gradient's maps six times (chapter 11 counts it).
What is left out: looking at validation and test images, and the augmentations themselves.
"""

import functools
import math
from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from salnb import models
from salnb._common import catalog
from salnb._common.tables import markdown_table
from salnb.data.paper import put_aside
from salnb.study.grids import UNCHOSEN, trainings
from salnb.study.scale import load_scale
from salnb.train.config import Config

__all__ = ["forward_flops", "markdown", "steps", "training_flops"]

# training images as they are published
_PUBLISHED = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "imagenet": 1_281_167}
# forward passes that a step without saliency costs: one, and one each for the inputs and weights of layers
_BASELINE = 3


@functools.cache
def forward_flops(network: str, size: int, num_classes: int) -> int:
    """Multiplications and additions of a network's forward pass of one image.

    Args:
        network: its name, as in `salnb.models.build`.
        size: height and width of the image, in pixels.
        num_classes: K.

    Raises:
        ValueError: there is no such network.

    >>> forward_flops("resnet18", 224, 1000) // 10**8
    36
    """
    with torch.device("meta"):
        model = models.build(network, num_classes).eval()
        image = torch.empty(1, 3, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def steps(config: Config) -> int:
    """The number of steps of a training run."""
    images = config.train_images or catalog.DATA[config.data].training_images
    if images is None:
        published = _PUBLISHED[config.data.removesuffix("-streamed")]
        images = published - put_aside(published)
    return config.epochs * (images // config.batch_size)


def training_flops(config: Config) -> float:
    """Multiplications and additions of all steps of a training run."""
    total = steps(config)
    with_maps = math.ceil(max(total - config.warmup, 0) / config.every) if config.gamma else 0
    spec = catalog.METHODS[config.method]
    maps = spec.map_passes * (config.samples if spec.repeats else 1)
    passes = _BASELINE * total + maps * with_maps
    forward = forward_flops(config.model, config.size, catalog.DATA[config.data].num_classes)
    return 2.0 * config.batch_size * forward * passes  # originals, and as many augmented ones


def markdown(study: str, rates: Mapping[str, float]) -> str:
    """A table, in Markdown, of what a study takes at some scales, with the hours on one device.

    Args:
        study: a key of `salnb.study.STUDIES`.
        rates: for each scale's name, how many multiplications and additions a second one device is assumed
            to sustain.

    Raises:
        ValueError: there is no such study or scale, or a rate is not positive.

    >>> print(markdown("table3", {"smoke": 1e9}).splitlines()[0])
    | study | scale | data | networks | runs | operations, 10¹⁵ | rate, 10¹² / s | hours |
    """
    header = (
        "study",
        "scale",
        "data",
        "networks",
        "runs",
        "operations, 10¹⁵",
        "rate, 10¹² / s",
        "hours",
    )
    rows = []
    for name, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"rates must be positive, got {rate} for {name}")
        scale = load_scale(name).for_study(study)
        planned = trainings(study, scale, *UNCHOSEN)
        flops = sum(training_flops(training.config("runs")) for training in planned)
        costs = (flops / 1e15, rate / 1e12, flops / rate / 3600)
        digits = (f"{cost:,.0f}" if cost >= 10 else f"{cost:.2g}" for cost in costs)
        rows.append((study, name, ", ".join(scale.data), ", ".join(scale.networks), len(planned), *digits))
    return markdown_table(header, rows)
