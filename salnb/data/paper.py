"""The paper's data sets, through Hugging Face `datasets`: CIFAR-10, CIFAR-100, SVHN, ImageNet.

The small ones are decoded once and kept in memory as uint8; ImageNet is read from disk as needed, or
streamed. Each may also come from Parquet files put into a folder by hand, for machines without network.
"""

import hashlib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from salnb._common.catalog import unknown
from salnb._common.files import DamagedFileError, sha256, write_atomic
from salnb._common.packages import require
from salnb._common.progress import progress
from salnb.data.base import Arrays, Dataset, DiskImages, StreamedImages, cache_folder, cached, decode

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
        ValueError: `name` is unknown, or a set other than ImageNet is to be streamed.
        NotFetchedError: it is neither here nor can be fetched; the message says what to download.
        DamagedFileError: a file is truncated or altered.
    """
    if name not in HUB:
        raise unknown("name", name, HUB)
    hub, files = HUB[name], local_files(name)
    if hub.in_memory:
        if streamed:
            raise ValueError(f"streamed is for imagenet, got {name}")
        # what was decoded from other files must not be taken for these
        source = f"files-{verify(name)[:8]}" if files else "hub"
        parts = cached(f"{name}-{source}", lambda: _decoded(_open(name)))
        images, labels = parts["images"], parts["labels"]
        aside = put_aside(len(labels))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        learnt, validated = (Arrays(images[i], labels[i]) for i in (order[aside:], order[:aside]))
        tested = Arrays(parts["test_images"], parts["test_labels"])
        return Dataset(learnt, validated, tested, parts["classes"])
    if sum(file.stat().st_size for file in files) <= _QUICKLY_HASHED:
        verify(name)
    parts = _open(name, streamed=streamed)
    train, test = parts["train"], parts[hub.test]
    aside = put_aside(train.number)  # ImageNet's rows lie in a random order already
    if streamed:
        return Dataset(
            StreamedImages(train.rows.skip(aside), size, train.number - aside),
            StreamedImages(train.rows.take(aside), size, aside),
            StreamedImages(test.rows, size, test.number),
            train.classes,
        )
    return Dataset(
        DiskImages(train.rows.select(range(aside, train.number)), size, workers),
        DiskImages(train.rows.select(range(aside)), size, workers),
        DiskImages(test.rows, size, workers),
        train.classes,
    )


def files_folder(name: str) -> Path:
    """Where the Parquet files of a data set may be put by hand."""
    return cache_folder() / "files" / name


def local_files(name: str) -> list[Path]:
    """The Parquet files that were put there."""
    return sorted(files_folder(name).rglob("*.parquet"))


def verify(name: str) -> str:
    """Compare the files that were put there with their checksums.

    The checksums stand in `SHA256SUMS` beside the files, as `sha256sum` writes and reads them. Where
    there are none yet, they are written down.

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
        write_atomic(sums, found.encode())
    written = sums.read_text() if sums.exists() else ""
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
    splits = ("train", hub.test)
    options: dict[str, Any] = {"cache_dir": str(cache_folder() / "hub"), "streaming": streamed}
    if files:
        data_files = {split: [str(f) for f in files if f.name.startswith(f"{split}-")] for split in splits}
        for split, found in data_files.items():
            if not found:
                raise NotFetchedError(f"{files_folder(name)} has no {split}-*.parquet\n{_instructions(name)}")
        try:
            parts = hf.load_dataset("parquet", data_files=data_files, **options)
        except Exception as error:  # pyarrow's and datasets' own, which have no common ancestor
            raise DamagedFileError(f"the files in {files_folder(name)} cannot be read: {error}") from error
        counts = {split: _count_rows(found) for split, found in data_files.items()}
    else:
        _check_reachable(name, hf)
        try:
            parts = hf.load_dataset(hub.repository, hub.config, **options)
        except (OSError, hf.exceptions.DatasetsError) as error:
            raise NotFetchedError(f"{name} could not be fetched: {error}\n{_instructions(name)}") from error
        counts = {split: parts[split].info.splits[split].num_examples for split in splits}
    return {split: _rows(name, parts[split], counts[split], hf) for split in splits}


def _rows(name: str, rows: Any, count: int, hf: Any) -> Rows:
    hub = HUB[name]
    features = rows.features or {}
    if hub.image not in features or not hasattr(features.get(hub.label), "names"):
        raise DamagedFileError(
            f"the files of {name} must have the columns {hub.image} (an image) and {hub.label} (a class "
            f"label), as in https://huggingface.co/datasets/{hub.repository}; got {', '.join(features)}"
        )
    names = {hub.image: "image", hub.label: "label"}
    rows = rows.select_columns(list(names)).cast_column(hub.image, hf.Image(decode=False))
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    return Rows(rows, count, list(features[hub.label].names))


def _count_rows(files: Iterable[str]) -> int:
    parquet = importlib.import_module("pyarrow.parquet")
    return sum(parquet.ParquetFile(file).metadata.num_rows for file in files)


def _decoded(parts: dict[str, Rows]) -> dict[str, Any]:
    """All images of a small set: 170 MB for the largest, SVHN."""
    state: dict[str, Any] = {}
    for prefix, part in zip(("", "test_"), parts.values(), strict=True):
        rows = progress(part.rows, "decoding", unit="image")
        images, labels = zip(*map(decode, rows), strict=True)
        state |= {f"{prefix}images": torch.stack(images), f"{prefix}labels": torch.tensor(labels)}
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
