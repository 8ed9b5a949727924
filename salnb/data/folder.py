"""A folder of one's own images, laid out as for torchvision's `ImageFolder`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
    short = size * 8 // 7
    try:
        return centre(read_image(Path(file), least=short), short, size)
    except Exception as error:  # whatever the bytes lead the decoders of Pillow to
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DamagedFileError(f"{file} cannot be read ({why})") from error


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
        image = read_photograph(self.root / path, self.size)
        label = self.classes.index(class_of(path, self.classes))
        if not self.masks:
            return image, label
        return image, label, read_photograph(self.masks[index], self.size)[:1] >= 128

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
        kept = results.read_record(record)
        classes, splits = kept["classes"], kept["splits"]
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


def _masks(root: Path, paths: list[str]) -> list[Path]:
    """The masks of images; none where there is not one mask, but an error where only some have one."""
    candidates = [(root / MASKS / path, (root / MASKS / path).with_suffix(".png")) for path in paths]
    masks = [next(filter(Path.is_file, pair), None) for pair in candidates]
    lacking = [path for path, mask in zip(paths, masks, strict=True) if mask is None]
    if lacking and len(lacking) < len(paths):
        told = f"{len(lacking)} of {len(paths)} images have no mask: {named(lacking)}"
        raise ValueError(f"data_dir {root}: {told}")
    return [mask for mask in masks if mask is not None]


def _is_one(folder: str, other: Path) -> bool:
    """Whether two names are of one folder."""
    return os.path.exists(folder) and other.exists() and other.samefile(folder)
