"""The paper's data sets, through Hugging Face `datasets`: CIFAR-10, CIFAR-100, SVHN, ImageNet.

The small ones are decoded once and kept in memory as uint8; ImageNet is read from disk as needed, or
streamed. Each may also come from Parquet files put into a folder by hand, for machines without network.
"""

import contextlib
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from salnb._common.catalog import DATA, unknown
from salnb._common.files import DamagedFileError, place_error, sha256, write_atomic
from salnb._common.limits import check_integer
from salnb._common.packages import require
from salnb._common.progress import progress
from salnb.data.base import Arrays, Dataset, DiskImages, Origin, StreamedImages, decode
from salnb.data.cache import cache_folder, cached, using_cache, writable

# what the face of the package shows
__all__ = ["NotFetchedError", "load_paper"]


class Hub(NamedTuple):
    """Where a data set lies on huggingface.co, and under which names it keeps things."""

    repository: str
    config: str
    image: str = "image"
    label: str = "label"
    test: str = "test"
    in_memory: bool = True


HUB = {
    "cifar10": Hub("uoft-cs/cifar10", "plain_text", image="img"),
    "cifar100": Hub("uoft-cs/cifar100", "cifar100", image="img", label="fine_label"),
    "svhn": Hub("ufldl-stanford/svhn", "cropped_digits"),
    # the labels of ImageNet's test images are not public: its validation images are the test, as everywhere
    "imagenet": Hub("ILSVRC/imagenet-1k", "default", test="validation", in_memory=False),
}

# no set has validation images of its own: a tenth of the training images is put aside, no more than these
_PUT_ASIDE = 10_000
# larger folders are hashed by `salnb data`, not before every run
_QUICKLY_HASHED = 2**31
_SUMS = "SHA256SUMS"


class NotFetchedError(RuntimeError):
    """A data set is not on this machine and could not be fetched."""


class Rows(NamedTuple):
    """A part of a data set as Hugging Face holds it, its columns named "image" (encoded) and "label"."""

    rows: Any
    number: int
    classes: list[str]
    origin: Origin


def load_paper(name: str, size: int = 224, *, workers: int = 4, streamed: bool = False) -> Dataset:
    """One of the paper's data sets.

    Args:
        name: "cifar10", "cifar100", "svhn" or "imagenet".
        size: height and width that ImageNet's photographs are brought to; the others stay as they are
            stored, 32×32, and `salnb.data.batches` resizes them.
        workers: processes that decode ImageNet's photographs.
        streamed: for ImageNet: read it from the network while training, and keep nothing.

    Returns:
        Training and test images, and for validation a tenth of the training images (at most 10,000)
        that is put aside, always the same.

    Raises:
        TypeError, ValueError: `name` or `size` is unknown, or a set other than ImageNet is to be streamed.
        NotFetchedError: it is neither here nor can be fetched; the message says what to download.
        DamagedFileError: a file is truncated or altered, or not what the set consists of; the message names
            it, and of a row its number.
        OSError: the folder for what is fetched or decoded cannot be used; the message says what to set.
    """
    if name not in HUB:
        raise unknown("name", name, HUB)
    size, workers = check_integer("size", size, 1, 10_000), check_integer("workers", workers, 0, 1000)
    if not HUB[name].in_memory:
        with torch.device("cpu"):  # the library makes tensors that processes share
            return _from_disk(name, size, workers, streamed)
    if streamed:
        raise ValueError(f"streamed is for imagenet, got {name}")
    # what was decoded from other files must not be taken for these
    source = f"files-{verify(name)[:8]}" if local_files(name) else "hub"
    parts = cached(f"{name}-{source}", lambda: _decoded(_open(name)))
    images, labels = parts["images"], parts["labels"]
    aside = put_aside(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0), device="cpu")
    train, validation = (Arrays(images[some], labels[some]) for some in (order[aside:], order[:aside]))
    test = Arrays(parts["test_images"], parts["test_labels"])
    return Dataset(train, validation, test, parts["classes"])


def _from_disk(name: str, size: int, workers: int, streamed: bool) -> Dataset:
    if sum(file.stat().st_size for file in local_files(name)) <= _QUICKLY_HASHED:
        verify(name)
    train, test = _open(name, streamed=streamed).values()
    aside = put_aside(train.number)  # ImageNet's rows lie in a random order already
    rest = train.origin._replace(first=aside)
    if streamed:
        return Dataset(
            StreamedImages(train.rows.skip(aside), size, train.number - aside, origin=rest),
            StreamedImages(train.rows.take(aside), size, aside, origin=train.origin),
            StreamedImages(test.rows, size, test.number, origin=test.origin),
            train.classes,
        )
    return Dataset(
        DiskImages(train.rows.select(range(aside, train.number)), size, workers, rest),
        DiskImages(train.rows.select(range(aside)), size, workers, train.origin),
        DiskImages(test.rows, size, workers, test.origin),
        train.classes,
    )


def files_folder(name: str) -> Path:
    """Where the Parquet files of a data set may be put by hand."""
    return cache_folder() / "files" / name


def local_files(name: str) -> list[Path]:
    """The Parquet files that were put there."""
    with using_cache():
        folder = files_folder(name)
        # `exists` says why a place cannot be looked at; from Python 3.13 on, `rglob` finds nothing there
        return sorted(folder.rglob("*.parquet")) if folder.exists() else []


def verify(name: str) -> str:
    """Compare the files that were put there with their checksums.

    The checksums stand in `SHA256SUMS` beside the files, as `sha256sum` writes and reads them. Where
    there are none yet, they are written down, if that can be done.

    Returns:
        The SHA-256 of the list of checksums, in hexadecimal.

    Raises:
        DamagedFileError: a file is missing, truncated, altered, or not in the list.
    """
    folder = files_folder(name)
    sums = folder / _SUMS
    files = progress(local_files(name), f"checking {name}", unit="file")
    found = "".join(f"{sha256(file)}  {file.relative_to(folder)}\n" for file in files)
    if not sums.exists() and found:
        with contextlib.suppress(OSError):  # a folder that is only to be read
            write_atomic(sums, found.encode())
    written = sums.read_text() if sums.exists() else found
    if different := set(found.splitlines()) ^ set(written.splitlines()):
        names = ", ".join(sorted({line.split("  ", 1)[-1] for line in different}))
        raise DamagedFileError(
            f"{names} in {folder}: not what {_SUMS} there says. Download it again; or, if the files were "
            f"replaced on purpose, remove {sums}"
        )
    return hashlib.sha256(found.encode()).hexdigest()


def _open(name: str, *, streamed: bool = False) -> dict[str, Rows]:
    """The training and the test images, by the name of the split."""
    hf = require("datasets", "train")
    hub, files = HUB[name], local_files(name)
    found = {split: [f for f in files if f.name.startswith(f"{split}-")] for split in ("train", hub.test)}
    counts = {split: _counted(name, split, found[split]) for split in found} if files else {}
    if streamed:
        with tempfile.TemporaryDirectory() as nothing_kept:
            parts = _loaded(name, hf, found if files else None, cache_dir=nothing_kept, streaming=True)
    elif (parts := _kept(name, hf)) is None:
        with using_cache() as cache:
            writable(cache / "hub")
            parts = _loaded(name, hf, found if files else None, cache_dir=str(cache / "hub"))
            _keep(name, parts)
    return {split: _rows(name, split, parts[split], counts.get(split), hf) for split in found}


def _counted(name: str, split: str, files: list[Path]) -> tuple[tuple[str, int], ...]:
    """The name of each file and its number of rows, if there are enough."""
    if not files:
        raise NotFetchedError(f"{files_folder(name)} has no {split}-*.parquet\n{_instructions(name)}")
    parquet = importlib.import_module("pyarrow.parquet")
    counts = []
    for file in files:
        try:
            counts.append((str(file), parquet.ParquetFile(file).metadata.num_rows))
        except Exception as error:  # pyarrow's own, and what the bytes lead it to
            told = f"the files in {files_folder(name)} cannot be read: {file.name}: {error}"
            raise DamagedFileError(told) from error
    _at_least(1, counts)
    return tuple(counts)


def _at_least(least: int, counts: Iterable[tuple[str, int]], why: str = "") -> int:
    """The number of rows in files, if there are so many."""
    number = sum(count for _, count in counts)
    if number < least:
        files = ", ".join(file for file, _ in counts)
        raise DamagedFileError(f"{files}: {number} images; there must be at least {least}{why}")
    return number


def _loaded(name: str, hf: Any, files: dict[str, list[Path]] | None, **options: Any) -> Any:
    """What Hugging Face's library makes of the files, or of what it fetches."""
    hub = HUB[name]
    try:
        if files is None:
            _check_reachable(name, hf)
            return hf.load_dataset(hub.repository, hub.config, **options)
        data_files = {split: [str(file) for file in found] for split, found in files.items()}
        return hf.load_dataset("parquet", data_files=data_files, **options)
    except NotFetchedError:
        raise
    except Exception as error:  # pyarrow's and datasets' own, which have no common ancestor
        if place := place_error(error):
            if place.filename and cache_folder() not in Path(place.filename).parents:
                told = f"{name} could not be fetched: {place}; set HF_HOME to a folder that can be written"
                raise NotFetchedError(told) from error
            raise place from None
        if files is None:
            raise NotFetchedError(f"{name} could not be fetched: {error}\n{_instructions(name)}") from error
        raise DamagedFileError(f"the files in {files_folder(name)} cannot be read: {error}") from error


def _index(name: str) -> Path:
    """The file that lists what was made of the files that are there now, or of those that were fetched."""
    sums = files_folder(name) / _SUMS
    listed = [sums.read_text() if sums.exists() else ""]
    for file in local_files(name):
        made = "" if sums.exists() else file.stat().st_mtime_ns
        listed.append(f"{file.relative_to(files_folder(name))} {file.stat().st_size} {made}")
    digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]
    return cache_folder() / "hub" / f"{name}-{digest}.json"


def _keep(name: str, parts: Any) -> None:
    """List the files that the library has made, so that they are found without its locks."""
    index = _index(name)
    made = {split: [file["filename"] for file in parts[split].cache_files] for split in parts}
    relative = {split: [os.path.relpath(file, index.parent) for file in made[split]] for split in parts}
    write_atomic(index, json.dumps(relative).encode())


def _kept(name: str, hf: Any) -> dict[str, Any] | None:
    """What `_keep` has listed, only read; None where there is no list, or a file of it is gone."""
    if not (index := _index(name)).exists():
        return None
    try:
        return {
            split: hf.concatenate_datasets([hf.Dataset.from_file(str(index.parent / file)) for file in files])
            for split, files in json.loads(index.read_text()).items()
        }
    except FileNotFoundError:
        return None
    except Exception as error:  # pyarrow's
        raise DamagedFileError(f"what was made of {name} is damaged ({error}): remove {index}") from error


def _rows(name: str, split: str, rows: Any, counts: tuple[tuple[str, int], ...] | None, hf: Any) -> Rows:
    hub, features = HUB[name], rows.features or {}
    kind = features.get(hub.image)
    if not isinstance(kind, hf.Image) or not hasattr(features.get(hub.label), "names"):
        raise DamagedFileError(
            f"the files of {name} must have the columns {hub.image} (an image) and {hub.label} (a class "
            f"label), as in https://huggingface.co/datasets/{hub.repository}; got {', '.join(features)}"
        )
    classes, known = list(features[hub.label].names), DATA[name].num_classes
    if len(classes) != known:
        raise DamagedFileError(f"the files of {name} must name {known} classes, got {len(classes)}")
    names = {hub.image: "image", hub.label: "label"}
    rows = rows.select_columns(list(names)).cast_column(hub.image, hf.Image(decode=False))
    if not isinstance(rows, hf.Dataset):  # streamed, the library would fail at a bad label without a name
        rows = rows.cast_column(hub.label, hf.Value("int64"))
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    if counts is None:
        told = len(rows) if isinstance(rows, hf.Dataset) else rows.info.splits[split].num_examples
        counts = ((f"{split} of {hub.repository}", told),)
    least, why = (10, ", as a tenth is put aside for validation") if split == "train" else (1, "")
    return Rows(rows, _at_least(least, counts, why), classes, Origin(len(classes), counts))


def _decoded(parts: dict[str, Rows]) -> dict[str, Any]:
    """All images of a small set: 170 MB for the largest, SVHN."""
    state: dict[str, Any] = {}
    for prefix, part in zip(("", "test_"), parts.values(), strict=True):
        images: list[Tensor] = []
        labels: list[int] = []
        for number, row in enumerate(progress(part.rows, "decoding", unit="image")):
            name = part.origin.row(number)
            image, label = decode(row, None, name, part.origin.classes)
            if images and image.shape != images[0].shape:
                size, first = ("×".join(map(str, one.shape[1:])) for one in (image, images[0]))
                raise DamagedFileError(f"{name}: the image is {size}, the first one {first}")
            images.append(image)
            labels.append(label)
        state |= {
            f"{prefix}images": torch.stack(images),
            f"{prefix}labels": torch.tensor(labels, device="cpu"),
        }
        state["classes"] = part.classes
    return state


def put_aside(count: int) -> int:
    """How many of so many training images are put aside for validation."""
    return min(_PUT_ASIDE, count // 10)


def _check_reachable(name: str, hf: Any) -> None:
    """Ask once for the Hub, where the library would retry for half a minute."""
    hub = HUB[name]
    prepared = cache_folder() / "hub" / hub.repository.replace("/", "___")
    if prepared.exists():
        return  # fetched before: the library finds it without network
    session = importlib.import_module("huggingface_hub.utils").get_session()
    try:
        session.head(hf.config.HF_ENDPOINT, timeout=5)
    except Exception as error:  # the errors of whichever HTTP library it uses
        raise NotFetchedError(
            f"{name} is not on this machine, and {hf.config.HF_ENDPOINT} cannot be reached ({error})\n"
            f"{_instructions(name)}"
        ) from error


def _instructions(name: str) -> str:
    hub = HUB[name]
    licence = " (accept its terms there first, and log in with `hf auth login`)" if name == "imagenet" else ""
    return (
        f"On a machine with network, download train-*.parquet and {hub.test}-*.parquet of the "
        f"configuration {hub.config!r} from https://huggingface.co/datasets/{hub.repository}{licence}, "
        f"and put them into {files_folder(name)} here (SALNB_CACHE sets another place)."
    )
