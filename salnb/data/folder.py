"""A folder of one's own images, laid out as for torchvision's `ImageFolder`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeGuard

from torch import Tensor

from salnb import results
from salnb._common.files import DamagedFileError
from salnb._common.image_folder import MASKS, check_apart, class_of, find_images, named, split_folder
from salnb._common.limits import check_integer
from salnb._common.progress import progress
from salnb.data.base import Dataset, DiskImages, Split, centre, read_image

__all__ = ["FolderImages", "image_folder", "images_to_test", "read_photograph"]


def read_photograph(file: str | Path, size: int) -> Tensor:
    """An image file as a network of some size sees it: (3, size, size), uint8.

    The short side is resized with antialiasing to 8/7 of the size, and the centre is cut out. Whatever Pillow
    reads will do: it is turned as its EXIF orientation says, 16 bits and real numbers from 0 to 1 become 8
    bits, and what is transparent white.

    Raises:
        TypeError, ValueError: the size is no number from 1 to 10,000.
        DamagedFileError: it cannot be read or decoded; the message names it.
    """
    size = check_integer("size", size, 1, 10_000)
    with _told_of(file):
        return centre(read_image(Path(file), least=size * 8 // 7), size * 8 // 7, size)


@contextlib.contextmanager
def _told_of(file: str | Path) -> Iterator[None]:
    """Whatever a file's bytes lead the decoders of Pillow to is told of the file."""
    try:
        yield
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DamagedFileError(f"{file} cannot be read ({why})") from error


def _photograph_and_mask(file: Path, mask: Path, size: int) -> tuple[Tensor, Tensor]:
    """Both as `read_photograph` has them, the mask (1, size, size), bool; they must have the same shape."""
    short = size * 8 // 7
    with _told_of(file):
        image = read_image(file, least=short)
    with _told_of(mask):
        _check_opaque(mask)
        grey = read_image(mask)
        if (grey.amax(0) - grey.amin(0)).max() > 64:
            raise ValueError("a mask is white where the object is and black elsewhere, this one has colours")
        if 0 < grey.max() < 128:
            raise ValueError(f"a mask is white, 255, where the object is, this one {int(grey.max())} at most")
        (height, width), (h, w) = image.shape[1:], grey.shape[1:]
        if abs(h * width - w * height) > max(h, w, height, width):  # a pixel for the rounding of either
            raise ValueError(
                f"it has {w} × {h} pixels, which is another shape than {width} × {height} of {file}"
            )
        return centre(image, short, size), centre(grey, short, size)[:1] >= 128


def _check_opaque(mask: Path) -> None:
    """Raise where a mask is transparent, which may mean the object or all the rest."""
    from PIL import Image

    with Image.open(mask) as image:
        if image.has_transparency_data and min(image.convert("RGBA").getchannel("A").tobytes()) < 255:
            raise ValueError(
                "a mask is white where the object is and black elsewhere, this one is transparent in places: "
                "save it without transparency, on the black or the white that is meant"
            )


@dataclass
class FolderImages(DiskImages):
    """Image files by class.

    Attributes:
        rows: paths relative to the root.
        root: the folder.
        classes: names in the order of the labels; one of them is a part of each path.
        masks: for each path that of its mask, or none.
    """

    root: Path = Path()
    classes: Sequence[str] = ()
    masks: Sequence[Path] = ()

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[Tensor, int, Tensor]:  # type: ignore[override]
        """One image, decoded, its label, and its mask where there are masks."""
        path = self.rows[index]
        label = self.classes.index(class_of(path, self.classes))
        if not self.masks:
            return read_photograph(self.root / path, self.size), label
        image, mask = _photograph_and_mask(self.root / path, self.masks[index], self.size)
        return image, label, mask

    def first(self, count: int) -> "FolderImages":
        """The first so many of the images."""
        count = check_integer("count", count, 0, 2**31)
        return replace(self, rows=self.rows[:count], masks=self.masks[:count])


def image_folder(
    root: str | Path,
    size: int,
    *,
    seed: int = 0,
    workers: int = 4,
    skip_unreadable: bool = False,
    record: str | Path | None = None,
) -> Dataset:
    """A folder of images, with a folder for each class, alone or inside of `train`, `val` and `test`.

    What there is not of `val` and `test` is put aside from the training images: a tenth of each class. All
    images are read once before, so that what is wrong is told before the training.

    Args:
        root: the folder.
        size: height and width; see `read_photograph`.
        seed: of what is put aside. A training run always takes 0, whatever its own seed: runs that are to be
            compared, seed by seed, have the same test images.
        workers: processes that decode images.
        skip_unreadable: go on without the images that cannot be read.
        record: a file that keeps the split: where it is there, nothing is drawn, and nothing read before.

    Returns:
        The splits; those for validation and test with masks, where the folder `masks` has one for each image,
        under the same path and name, as PNG or with the image's own ending: white where the object is.

    Raises:
        TypeError, ValueError: a number is not as described; no folder, too few images, classes that differ
            between splits, files in two splits.
        DamagedFileError: images that cannot be read, with names and number.
        OSError: the record cannot be written.
    """
    root, size = Path(root), check_integer("size", size, 1, 10_000)
    seed, workers = check_integer("seed", seed, -(2**64), 2**64), check_integer("workers", workers, 0, 1000)
    if record is not None and Path(record).exists():
        classes, splits = _kept(record)
    else:
        found = find_images(root)
        paths = [path for by_class in found.values() for images in by_class.values() for path in images]
        if bad := _unreadable(root, paths, size, workers):
            if not skip_unreadable:
                told = f"{len(bad)} of {len(paths)} images cannot be read: {named(bad.values())}"
                raise DamagedFileError(f"data_dir {root}: {told}; --skip-unreadable goes on without them")
            found = find_images(root, without=bad)
        classes, splits = sorted(found["train"]), split_folder(found, seed)
        check_apart(root, splits)
        _check_masks(root, [*splits["validation"], *splits["test"]], workers)
        if record is not None:
            kept = {"root": str(root.absolute()), "classes": classes, "splits": splits}
            results.write_record(record, kept | {"skipped": sorted(bad)})
    make = partial(FolderImages, size=size, workers=workers, root=root, classes=classes)
    validation, test = (make(splits[s], masks=_masks(root, splits[s])) for s in ("validation", "test"))
    return Dataset(make(splits["train"]), validation, test, classes)


def images_to_test(
    root: str | Path, size: int, *, record: str | Path | None = None
) -> tuple[Split, list[str]]:
    """The images in a folder's `test`, or all of a folder without splits, and the names of the classes.

    Of the folder that a run was trained on, whose split is in `record`, they are those that were put aside.
    For arguments and errors see `image_folder`; what cannot be read is told when its turn comes.
    """
    root, kept = Path(root), Path(record) if record is not None else None
    workers = min(4, os.cpu_count() or 1)
    if kept and kept.exists() and _is_one(results.read_record(kept)["root"], root):
        dataset = image_folder(root, size, workers=workers, record=kept)
        return dataset.test, dataset.classes
    found = find_images(root)
    if "test" not in found and len(found) > 1:
        raise ValueError(f"data_dir {root} has {' and '.join(found)}, but no test")
    paths = [path for images in found.get("test", found["train"]).values() for path in images]
    classes, masks = sorted(found["train"]), _masks(root, paths)
    return FolderImages(paths, size, workers, root=root, classes=classes, masks=masks), classes


def _unreadable(root: Path, paths: list[str], size: int, workers: int) -> dict[str, str]:
    """What is wrong, by path, with those images that cannot be read."""

    def problem(path: str) -> str | None:
        try:
            read_photograph(root / path, min(size, 8))  # a JPEG is decoded at an eighth of its size
        except DamagedFileError as error:
            return str(error).removeprefix(f"{root}/")
        return None

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        told = list(progress(pool.map(problem, paths), "reading", total=len(paths), unit="image"))
    return {path: text for path, text in zip(paths, told, strict=True) if text}


def _check_masks(root: Path, paths: list[str], workers: int) -> None:
    """Raise a DamagedFileError where masks cannot be read, or are not of their images."""

    def problem(path: str, mask: Path) -> str | None:
        try:
            _photograph_and_mask(root / path, mask, 8)
        except DamagedFileError as error:
            return str(error).removeprefix(f"{root}/")
        return None

    if masks := _masks(root, paths):
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            bad = list(filter(None, pool.map(problem, paths, masks)))
        if bad:
            raise DamagedFileError(f"data_dir {root}: {len(bad)} masks cannot be used: {named(bad)}")


def _masks(root: Path, paths: list[str]) -> list[Path]:
    """The masks of images; none where there is not one mask, but an error where only some have one."""
    candidates = [(root / MASKS / path, (root / MASKS / path).with_suffix(".png")) for path in paths]
    masks = [next(filter(Path.is_file, pair), None) for pair in candidates]
    lacking = [path for path, mask in zip(paths, masks, strict=True) if mask is None]
    if lacking and len(lacking) < len(paths):
        told = f"{len(lacking)} of {len(paths)} images have no mask: {named(lacking)}"
        raise ValueError(f"data_dir {root}: {told}")
    return [mask for mask in masks if mask is not None]


def _kept(record: str | Path) -> tuple[list[str], dict[str, list[str]]]:
    """Classes and splits in the record of a split; raises a ValueError where it is none."""
    kept = results.read_record(record)
    classes, splits = kept.get("classes"), kept.get("splits")
    if not _are_words(classes) or not isinstance(splits, dict):
        raise ValueError(f"{record} is not the record of a split: it must have classes and splits")
    for name in ("train", "validation", "test"):
        if not _are_words(splits.get(name)):
            raise ValueError(f"{record} is not the record of a split: {name} must be a list of paths")
        if strange := [path for path in splits[name] if class_of(f"{path}//", classes) not in classes]:
            raise ValueError(f"{record}: in {name} are images of no class of the record: {named(strange)}")
    return classes, splits


def _are_words(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _is_one(folder: str, other: Path) -> bool:
    """Whether two names are of one folder."""
    return os.path.exists(folder) and other.exists() and other.samefile(folder)
