"""Throughput of each augmentation beside kornia's and torchvision's, measured in one run.

    python -m benchmarks.augment [--device cpu] [--sizes 224 32] [--batch 64] [--seconds 1.5]

Contenders take turns, so that a busy moment of the machine meets all of them; each figure is a median.
Parameters are drawn anew in every call, one per sample. ``back`` adds to the forward call the way back of the
saliency maps: the inverse, or the originals' maps carried forward.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import kornia.augmentation as kornia
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks._ratio import medians, print_table
from salnb import augment

Call = Callable[[], object]
CLASSES = 10
PEERS = ("kornia", "torchvision", "one draw")


# ranges and probabilities in the words that both libraries share; equal to the defaults of ours
JITTER: Any = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
RESCALE: Any = {"degrees": 0.0, "scale": (0.8, 1.2)}
AFFINE: Any = {
    "degrees": 30.0,
    "translate": (0.1, 0.1),
    "scale": (0.8, 1.2),
    "shear": (-10.0, 10.0, -10.0, 10.0),
}


def kornia_equivalents(size: int) -> dict[str, torch.nn.Module]:
    """Kornia's nearest to each augmentation that it has one for, for images of size x size."""
    square, chain = (size, size), torch.nn.Sequential
    mixing: Any = {"p": 1.0, "data_keys": ["input", "class"]}
    horizontal, vertical = kornia.RandomHorizontalFlip(), kornia.RandomVerticalFlip()
    affine, contrast = kornia.RandomAffine(**AFFINE, p=1.0), kornia.RandomContrast((0.5, 1.5), p=0.5)
    return {
        "horizontal_flip": horizontal,
        "vertical_flip": vertical,
        "rescale": kornia.RandomAffine(**RESCALE, p=1.0),
        "rotation": kornia.RandomRotation(30.0, p=1.0),
        "affine": affine,
        "contrast": contrast,
        "combined": chain(horizontal, vertical, affine, contrast),
        "color_jitter": kornia.ColorJitter(**JITTER, p=1.0),
        "resized_crop": kornia.RandomResizedCrop(square, scale=(0.2, 1.0), p=1.0),
        "simclr": chain(
            kornia.RandomResizedCrop(square, scale=(0.08, 1.0), p=1.0),
            horizontal,
            kornia.ColorJitter(**JITTER, p=0.8),
            kornia.RandomGrayscale(p=0.2),
        ),
        "cutout": kornia.RandomErasing((0.25, 0.25), (1.0, 1.0), p=1.0),
        "mixup": kornia.RandomMixUpV2(**mixing),
        "cutmix": kornia.RandomCutMixV2(**mixing),
    }


def torchvision_equivalents(size: int) -> dict[str, torch.nn.Module]:
    """Torchvision's nearest to each augmentation that it has one for, for images of size x size."""
    square, bilinear = (size, size), v2.InterpolationMode.BILINEAR
    horizontal, vertical = v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()
    affine = v2.RandomAffine(**AFFINE, interpolation=bilinear)
    contrast = v2.RandomApply([v2.ColorJitter(contrast=(0.5, 1.5))], p=0.5)
    return {
        "horizontal_flip": horizontal,
        "vertical_flip": vertical,
        "rescale": v2.RandomAffine(**RESCALE, interpolation=bilinear),
        "rotation": v2.RandomRotation(30, interpolation=bilinear),
        "affine": affine,
        "contrast": contrast,
        "combined": v2.Compose([horizontal, vertical, affine, contrast]),
        "color_jitter": v2.ColorJitter(**JITTER),
        "resized_crop": v2.RandomResizedCrop(square, scale=(0.2, 1.0), antialias=False),
        "simclr": v2.Compose(
            [
                v2.RandomResizedCrop(square, scale=(0.08, 1.0), antialias=False),
                horizontal,
                v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.8),
                v2.RandomGrayscale(p=0.2),
            ]
        ),
        "cutout": v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
        "mixup": v2.MixUp(num_classes=CLASSES),
        "cutmix": v2.CutMix(num_classes=CLASSES),
        "augmix": v2.AugMix(all_ops=False, interpolation=bilinear),
    }


def calls(name: str, images: Tensor, maps: Tensor, labels: Tensor) -> dict[str, Call]:
    """The contenders of one augmentation; a library that has no such one is left out."""
    aug, size = augment.AUGMENTATIONS[name](), images.shape[-1]
    mixed = aug.least_samples > 1

    def ours() -> augment.Batch:
        return aug(images, labels, num_classes=CLASSES)

    found: dict[str, Call] = {"ours": ours, "back": lambda: ours().align(maps, maps)}
    if (theirs := kornia_equivalents(size).get(name)) is not None:
        found["kornia"] = lambda: theirs(images, labels) if mixed else theirs(images)
    if (other := torchvision_equivalents(size).get(name)) is not None:
        found["torchvision"] = lambda: in_calls(other, images, labels if mixed else None)
        if mixed:
            found["one draw"] = lambda: other(images, labels)
    return found


def in_calls(transform: torch.nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    """A batch by a transform that draws once a call: a call per image, or per pair where these are mixed."""
    if labels is None:
        return (torch.stack([transform(image) for image in images]),)
    pairs = zip(images.split(2), labels.split(2), strict=True)
    return tuple(torch.cat(parts) for parts in zip(*(transform(*pair) for pair in pairs), strict=True))


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 32])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    parser.add_argument("--only", nargs="*", choices=augment.AUGMENTATIONS, help="rows to measure; else all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="kornia")
    table = []
    for size in options.sizes:
        images = torch.rand(options.batch, 3, size, size, device=options.device)
        maps = torch.rand(options.batch, 1, size, size, device=options.device)
        labels = torch.randint(CLASSES, (options.batch,), device=options.device)
        for name in options.only or augment.AUGMENTATIONS:
            took = medians(calls(name, images, maps, labels), seconds=options.seconds, least=5)
            ratios = [took[key] / took["ours"] if key in took else None for key in PEERS]
            cells = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            table.append(
                [str(size), name, f"{1e3 * took['ours']:.2f}", *cells, f"{took['back'] / took['ours']:.2f}"]
            )
    title = f"Augmentations, batch {options.batch}, {options.device}, {torch.get_num_threads()} threads"
    header = [
        "size",
        "augmentation",
        "salnb, ms",
        "kornia / salnb",
        "torchvision / salnb",
        "torchvision, one draw for all / salnb",
        "(forward + back) / forward",
    ]
    print_table(title, header, table)


if __name__ == "__main__":
    main()
