"""Throughput of each augmentation beside kornia's and torchvision's, measured in one run.

    python -m benchmarks.augment [--device cpu] [--sizes 224 32] [--batch 64] [--seconds 1.5]

Contenders take turns, so that a busy moment of the machine meets all of them; each figure is a median.
Parameters are drawn anew in every call, one per sample. ``back`` adds to the forward call the way back of the
saliency maps: the inverse, or the originals' maps carried forward.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import kornia.augmentation as kornia
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks._ratio import medians, print_table
from salnb import augment

Call = Callable[[], object]
CLASSES = 10


@dataclass(frozen=True)
class Row:
    """One augmentation and its nearest equivalents; None where a library has none."""

    ours: augment.Augmentation
    kornia: torch.nn.Module | None
    torchvision: torch.nn.Module
    mixed: bool = False


def rows(size: int) -> dict[str, Row]:
    """Each augmentation with equal ranges and probabilities, for images of size x size."""
    square = (size, size)
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    affine = {"degrees": 30.0, "translate": (0.1, 0.1), "scale": (0.8, 1.2), "shear": (-10.0, 10.0)}
    sheared = affine | {"shear": (-10.0, 10.0, -10.0, 10.0)}
    still = {"degrees": 0.0, "scale": (0.8, 1.2)}
    keys = {"p": 1.0, "data_keys": ["input", "class"]}
    return {
        "horizontal_flip": Row(
            augment.HorizontalFlip(), kornia.RandomHorizontalFlip(), v2.RandomHorizontalFlip()
        ),
        "vertical_flip": Row(augment.VerticalFlip(), kornia.RandomVerticalFlip(), v2.RandomVerticalFlip()),
        "rescale": Row(
            augment.Rescale(),
            kornia.RandomAffine(**still, p=1.0),
            v2.RandomAffine(**still, interpolation=v2.InterpolationMode.BILINEAR),
        ),
        "rotation": Row(
            augment.Rotation(30),
            kornia.RandomRotation(30.0, p=1.0),
            v2.RandomRotation(30, interpolation=v2.InterpolationMode.BILINEAR),
        ),
        "affine": Row(
            augment.Affine(**affine),
            kornia.RandomAffine(**sheared, p=1.0),
            v2.RandomAffine(**sheared, interpolation=v2.InterpolationMode.BILINEAR),
        ),
        "contrast": Row(
            augment.Contrast(),
            kornia.RandomContrast((0.5, 1.5), p=0.5),
            v2.RandomApply([v2.ColorJitter(contrast=(0.5, 1.5))], p=0.5),
        ),
        "combined": Row(
            augment.Combined(),
            torch.nn.Sequential(
                kornia.RandomHorizontalFlip(),
                kornia.RandomVerticalFlip(),
                kornia.RandomAffine(**sheared, p=1.0),
                kornia.RandomContrast((0.5, 1.5), p=0.5),
            ),
            v2.Compose(
                [
                    v2.RandomHorizontalFlip(),
                    v2.RandomVerticalFlip(),
                    v2.RandomAffine(**sheared, interpolation=v2.InterpolationMode.BILINEAR),
                    v2.RandomApply([v2.ColorJitter(contrast=(0.5, 1.5))], p=0.5),
                ]
            ),
        ),
        "color_jitter": Row(
            augment.ColorJitter(**jitter), kornia.ColorJitter(**jitter, p=1.0), v2.ColorJitter(**jitter)
        ),
        "resized_crop": Row(
            augment.ResizedCrop(),
            kornia.RandomResizedCrop(square, scale=(0.2, 1.0), p=1.0),
            v2.RandomResizedCrop(square, scale=(0.2, 1.0), antialias=False),
        ),
        "simclr": Row(
            augment.SimCLR(),
            torch.nn.Sequential(
                kornia.RandomResizedCrop(square, scale=(0.08, 1.0), p=1.0),
                kornia.RandomHorizontalFlip(),
                kornia.ColorJitter(**jitter, p=0.8),
                kornia.RandomGrayscale(p=0.2),
            ),
            v2.Compose(
                [
                    v2.RandomResizedCrop(square, scale=(0.08, 1.0), antialias=False),
                    v2.RandomHorizontalFlip(),
                    v2.RandomApply([v2.ColorJitter(**jitter)], p=0.8),
                    v2.RandomGrayscale(p=0.2),
                ]
            ),
        ),
        "cutout": Row(
            augment.CutOut(),
            kornia.RandomErasing((0.25, 0.25), (1.0, 1.0), p=1.0),
            v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
        ),
        "mixup": Row(
            augment.MixUp(), kornia.RandomMixUpV2(**keys), v2.MixUp(num_classes=CLASSES), mixed=True
        ),
        "cutmix": Row(
            augment.CutMix(), kornia.RandomCutMixV2(**keys), v2.CutMix(num_classes=CLASSES), mixed=True
        ),
        "augmix": Row(augment.AugMix(), None, v2.AugMix()),
    }


def calls(row: Row, images: Tensor, maps: Tensor, labels: Tensor) -> dict[str, Call]:
    """The contenders of one row; a library that has no such augmentation is left out."""

    def ours() -> augment.Batch:
        return row.ours(images, labels, num_classes=CLASSES)

    # torchvision draws once per call: per-sample parameters mean one call per image, except where images are
    # mixed, which it does only with one weight for the whole batch
    found: dict[str, Call] = {"ours": ours, "back": lambda: ours().align(maps, maps)}
    if row.kornia is not None:
        found["kornia"] = lambda: row.kornia(images, labels) if row.mixed else row.kornia(images)
    if row.mixed:
        found["torchvision"] = lambda: row.torchvision(images, labels)
    else:
        found["torchvision"] = lambda: torch.stack([row.torchvision(image) for image in images])
    return found


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 32])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    parser.add_argument("--only", nargs="*", help="rows to measure; all if not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="kornia")
    table = []
    for size in options.sizes:
        images = torch.rand(options.batch, 3, size, size, device=options.device)
        maps = torch.rand(options.batch, 1, size, size, device=options.device)
        labels = torch.randint(CLASSES, (options.batch,), device=options.device)
        for name, row in rows(size).items():
            if options.only and name not in options.only:
                continue
            took = medians(calls(row, images, maps, labels), seconds=options.seconds, least=5)
            ratios = [took[key] / took["ours"] if key in took else None for key in ("kornia", "torchvision")]
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
        "(forward + back) / forward",
    ]
    print_table(title, header, table)


if __name__ == "__main__":
    main()
