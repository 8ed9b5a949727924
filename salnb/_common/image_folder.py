"""A folder of images, laid out as for torchvision's `ImageFolder`: what is in it and how it is split.

Free of torch and Pillow, so that a mistake is answered at once.
"""

import contextlib
import itertools
import os
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from salnb._common.files import check_writable, sha256

__all__ = ["check_apart", "check_out", "class_of", "find_images", "named", "photographs", "split_folder"]

_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
_SHARE = 10  # one in so many images of each class is put aside for a split that the folder has not
MASKS = "masks"

_PLACES = frozenset(name for names in _FOLDERS.values() for name in names)
_LIKE_PLACES = _PLACES | {"training", "validate", "testing"}

# the images of each class, as paths relative to the root
Classes = dict[str, list[str]]


def named(things: Iterable[str], most: int = 3) -> str:
    """The first names of a list, for an error, and how many more there are."""
    things = list(things)
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(things[:most]) + more


def _image_files(folder: Path) -> list[str]:
    """The images in a folder and below, by their endings, in order; nothing hidden."""
    found: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        images = (n for n in names if n[0] != "." and os.path.splitext(n)[1].lower() in _ENDINGS)
        found += [os.path.join(place, name) for name in images]
    return sorted(found)


def photographs(paths: Iterable[str | Path]) -> dict[str, Path]:
    """The files that are named, and those in folders, by their stem, numbered where several have one.

    Raises:
        ValueError: a file is not there, or a folder has no image.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        files = list(map(Path, _image_files(path))) if path.is_dir() else [path]
        if not files or not path.exists():
            raise ValueError(f"no photograph {'in the folder ' if path.is_dir() else ''}{path}")
        for file in files:
            names = itertools.chain([file.stem], (f"{file.stem}-{i}" for i in itertools.count(2)))
            found[next(name for name in names if name not in found)] = file
    return found


def check_out(out: str | Path, files: Mapping[str, Path], every_method: bool, augment: str | None) -> None:
    """Raise unless what `salnb explain` writes of photographs may be written; see its function `explain`.

    Args:
        out: the folder, which need not be there yet.
        files: the photographs, by their names.
        every_method: whether there are `NAME-methods.png`.
        augment: of `NAME-AUGMENT.png`, if there are any.

    Raises:
        ValueError: it is no name of a folder, or something would take the place of a photograph or of what is
            drawn of another.
        OSError: the folder is a file, cannot be written to, or has a folder of such a name inside.
    """
    if not os.fspath(out):
        raise ValueError(f"out must name a folder, got {out!r}")
    out, given = Path(out), {}
    for file in files.values():
        with contextlib.suppress(OSError):  # it is told when it is read
            given[_identity(file)] = file
    more = ["methods"] * every_method + [augment] * (augment is not None)
    endings = [".npy", ".png", *(f"-{one}.png" for one in more)]
    drawn = [(name, out / (name + ending)) for name, ending in itertools.product(files, endings)]
    written = [out / "scores.json", *(path for _, path in drawn)]
    for path in written:
        with contextlib.suppress(OSError):  # it is not there
            if taken := given.get(_identity(path)):
                told = f"{path.name} would replace the photograph {taken}"
                raise ValueError(f"out {out}: {told}; name another folder")
    firsts: dict[Path, str] = {}
    for name, path in drawn:
        if (other := firsts.setdefault(path, name)) != name:
            told = f"{path.name} would be of both {files[other]} and {files[name]}"
            raise ValueError(f"out {out}: {told}; explain them into two folders")
    longest = max(written, key=lambda path: len(os.fsencode(path)))
    try:
        for path in (written[0], longest, *filter(os.path.isdir, written)):
            check_writable(path)
    except OSError as error:
        raise OSError(error.errno, f"out {out} cannot be written to: {error.strerror}") from error


def _identity(path: Path) -> tuple[int, int]:
    """The same for two paths of one file, whatever links lead there."""
    status = path.stat()
    return status.st_dev, status.st_ino


def find_images(root: str | Path, without: Collection[str] = ()) -> dict[str, Classes]:
    """The images of each class in each split that a folder has; "train" alone where it has no splits.

    Args:
        root: the folder.
        without: paths relative to it, which are left out.

    Raises:
        ValueError: it is no folder, has no two classes, a class is empty, splits differ in their classes, or
            beside the classes is a folder `masks` that is not laid out as these are.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data_dir must be a folder of images, got {root}")
    places = {
        split: next((n for n in names if (root / n).is_dir()), None) for split, names in _FOLDERS.items()
    }
    _check_split_names(root)
    if not any(places.values()):
        places["train"] = ""
        _check_masks(root)
    if places["train"] is None:
        raise ValueError(f"data_dir {root} has {named(filter(None, places.values()))}, but no train")
    found = {
        split: _classes(root, root / place, without) for split, place in places.items() if place is not None
    }
    if len(found["train"]) < 2:
        what = f"got {named(found['train']) or 'none'}"
        raise ValueError(f"data_dir {root} must have a folder for each of two or more classes, {what}")
    for split, classes in found.items():
        if empty := [name for name, images in classes.items() if not images]:
            raise ValueError(f"data_dir {root}: no image in {split} of {len(empty)} classes: {named(empty)}")
        if odd := sorted(classes.keys() ^ found["train"].keys()):
            raise ValueError(f"data_dir {root}: train and {split} differ in {len(odd)} classes: {named(odd)}")
    return found


def _check_split_names(root: Path) -> None:
    """Raise unless folders that are named as splits are, can be taken for nothing else."""
    inside = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    for names in _FOLDERS.values():
        if len(several := [name for name in names if name in inside]) > 1:
            raise ValueError(f"data_dir {root} has {' and '.join(several)}, which are one split: keep one")
    alike = [name for name in inside if name not in _PLACES and name.lower() in _LIKE_PLACES]
    others = [name for name in inside if name not in (*alike, *_PLACES, MASKS)]
    if alike and (not others or _PLACES & set(inside)):
        raise ValueError(
            f"data_dir {root}: folders of splits are named train, val and test, got {named(alike)}"
        )


def _classes(root: Path, folder: Path, without: Collection[str]) -> Classes:
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    found: Classes = {}
    for name in names:
        if name[0] != "." and (name != MASKS or folder != root):
            images = (os.path.relpath(path, root) for path in _image_files(folder / name))
            found[name] = [path for path in images if path not in without]
    return found


def _check_masks(root: Path) -> None:
    """Raise unless the folder of masks, if there is one beside the classes, is laid out as these are."""
    if not (images := _image_files(root / MASKS)):
        return
    inside = {os.path.relpath(path, root / MASKS).partition("/")[0] for path in images}
    if any((root / MASKS / name).is_file() for name in inside) or not any(
        (root / name).is_dir() for name in inside
    ):
        raise ValueError(
            f"data_dir {root}: {MASKS} must have a folder for each class, with the masks of its images: if "
            "it is a class itself, rename it, or put the classes into a folder train"
        )


def class_of(path: str, classes: Collection[str]) -> str:
    """The class of an image, from its path relative to the root: a folder's name, or of one in a split's.

    A folder that is named like a split is one, so that a class of such a name lies in a split.
    """
    first, second, *_ = path.split("/")
    return second if first in _PLACES or first not in classes else first


def split_folder(found: Mapping[str, Classes], seed: int) -> dict[str, list[str]]:
    """The images of train, validation and test, as paths; what the folder has not is put aside from train.

    A tenth of each class, at least one image, is drawn by the seed. The training images are shuffled, so that
    the first of them are of all classes.

    Raises:
        ValueError: a class has too few images to be split.
    """
    splits: dict[str, list[str]] = {split: [] for split in _FOLDERS}
    missing = [split for split in _FOLDERS if split not in found]
    for split, classes in found.items():
        for name, images in classes.items():
            images = list(images)
            if split == "train" and missing:
                random.Random(f"{seed} {name}").shuffle(images)
                count = max(1, len(images) // _SHARE)
                if len(images) <= count * len(missing):
                    raise ValueError(
                        f"data_dir: class {name} has {len(images)} images, too few to put some aside for "
                        f"{' and '.join(missing)}"
                    )
                for other in missing:
                    splits[other] += sorted(images.pop() for _ in range(count))
            splits[split] += images
    random.Random(seed).shuffle(splits["train"])
    return splits


def check_apart(root: Path, splits: Mapping[str, list[str]]) -> None:
    """Raise a ValueError if a file's content is in two splits; only files of one size are read."""
    by_size = defaultdict(list)
    for split, paths in splits.items():
        for path in paths:
            by_size[(root / path).stat().st_size].append((split, path))
    twice = []
    for files in by_size.values():
        if len({split for split, _ in files}) > 1:
            first: dict[str, tuple[str, str]] = {}
            for split, path in files:
                other_split, other = first.setdefault(sha256(root / path), (split, path))
                if other_split != split:
                    twice.append(f"{other} ({other_split}) is {path} ({split})")
    if twice:
        raise ValueError(f"data_dir {root}: {len(twice)} files are in two splits: {named(twice)}")
