"""Splits of labelled images, in memory, on disk or streamed, each an endless source of batches by epoch."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from salnb._common.files import DamagedFileError
from salnb._common.limits import check_integer
from salnb.data.ahead import read_ahead

# what the face of the package shows
__all__ = ["WHOLE", "Arrays", "Dataset", "DiskImages", "Examples", "Origin", "Share", "Split"]
__all__ += ["StreamedImages", "batches", "hide_labels"]

# what is smaller is kept on the accelerator
_FITS_THE_DEVICE = 2**30
_MOST = 2**31  # of anything that is counted


class Examples(NamedTuple):
    """Some labelled images.

    Attributes:
        images: (N, 3, H, W), uint8 as stored, or float32 in [0, 1] from `batches`.
        labels: (N,), int64.
        masks: (N, 1, H, W), bool: the pixels of the object; None where that is not known.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Share:
    """What one of several processes works on: every `of`-th image of each batch, from the `rank`-th on."""

    rank: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_integer("rank", self.rank, 0, check_integer("of", self.of, 1, _MOST) - 1)


WHOLE = Share()


class Split(Protocol):
    """What training asks of images, wherever they are."""

    def __len__(self) -> int:
        """The number of images."""

    def first(self, count: int) -> "Split":
        """The first so many of the images."""

    def epoch(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, share: Share = WHOLE
    ) -> Iterator[Examples]:
        """One pass over the images, uint8, in batches.

        Args:
            batch_size: number of images in a batch, over all shares.
            seed: of the order, and leave out an incomplete last batch; None: all, in the stored order.
            start: number of batches to leave out at the beginning: where an interrupted pass goes on.
            share: which part of each batch.
        """


@dataclass
class Dataset:
    """A data set in three parts that have nothing in common.

    Attributes:
        train: to learn from.
        validation: to look at while learning.
        test: to look at once.
        classes: the name of each class.
        families: by split, (N,) the class whose background each image has; None: backgrounds belong to none.
        backgrounds: (M, 3, H, W), uint8, that objects can be put on; None: there is none.
    """

    train: Split
    validation: Split
    test: Split
    classes: list[str]
    families: dict[str, Tensor] | None = None
    backgrounds: Tensor | None = None


@dataclass
class Arrays:
    """Images in memory, as in `Examples`."""

    images: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError unless there are as many of each."""
        if len(set(counts := _each(self, len))) != 1 + (self.masks is None):
            told = ", ".join(
                f"{n} {name}" for n, name in zip(counts, Examples._fields, strict=True) if n is not None
            )
            raise ValueError(f"images, labels and masks must be as many, got {told}")

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def first(self, count: int) -> "Arrays":
        """The first so many of the images."""
        count = check_integer("count", count, 0, _MOST)
        return Arrays(*_each(self, lambda tensor: tensor[:count]))

    def to(self, device: torch.device) -> "Arrays":
        """The same, kept on a device, unless that would take more than 1 GiB of it."""
        if self.images.nbytes > _FITS_THE_DEVICE:
            return self
        return Arrays(*_each(self, lambda tensor: tensor.to(device)))

    def epoch(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, share: Share = WHOLE
    ) -> Iterator[Examples]:
        """One pass over the images; see `Split`."""
        for index in _orders(len(self), batch_size, seed, start, share, self.labels.device):
            yield Examples(*_each(self, itemgetter(index)))


class Origin(NamedTuple):
    """Where the rows of a split stand, for the error that one of them may cause.

    Attributes:
        classes: K: labels are from 0 to K - 1; None: not known.
        files: the name of each file and its number of rows, in order.
        first: number of the row that the split begins with.
    """

    classes: int | None = None
    files: tuple[tuple[str, int], ...] = ()
    first: int = 0

    def row(self, index: int) -> str:
        """The name of a row of the split."""
        index += self.first
        for file, count in self.files:
            if index < count:
                return f"row {index} of {file}"
            index -= count
        return f"row {index}"


ANYWHERE = Origin()


@dataclass
class DiskImages:
    """Encoded images on disk, decoded when their turn comes, by processes that work ahead.

    Attributes:
        rows: has a length, and gives for an index a dictionary with the encoded bytes and the label.
        size: height and width that the images are brought to.
        workers: number of processes; 0 decodes in this one.
        origin: where the rows stand.
    """

    rows: Any
    size: int
    workers: int = 0
    origin: Origin = ANYWHERE

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, decoded, and its label."""
        return decode(self.rows[index], self.size, self.origin.row(index), self.origin.classes)

    def first(self, count: int) -> "DiskImages":
        """The first so many of the images."""
        count = min(check_integer("count", count, 0, _MOST), len(self))
        return replace(self, rows=self.rows.select(range(count)))

    def epoch(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, share: Share = WHOLE
    ) -> Iterator[Examples]:
        """One pass over the images; see `Split`."""
        orders = _orders(len(self), batch_size, seed, start, share, torch.device("cpu"))
        batches = [index.tolist() for index in orders]
        try:
            yield from read_ahead(self, batches, self.workers, _collate)
        except DamagedFileError as error:  # from another process with its traceback, of which this is the end
            message = str(error).rpartition("DamagedFileError: ")[2].strip()
            # its frames hold the loader, whose processes would wait until they are collected
            raise DamagedFileError(message) from error.with_traceback(None)


@dataclass
class StreamedImages:
    """Encoded images that arrive one after the other from far away.

    Attributes:
        rows: a streamed data set of Hugging Face.
        size: height and width that the images are brought to.
        count: how many there are.
        buffer: how many are kept at hand to choose the next one from; a shuffled pass mixes that far.
        origin: where the rows stand.
    """

    rows: Any
    size: int
    count: int
    buffer: int = 10_000
    origin: Origin = ANYWHERE

    def __len__(self) -> int:
        """The number of images."""
        return self.count

    def first(self, count: int) -> "StreamedImages":
        """The first so many of the images."""
        count = min(check_integer("count", count, 0, _MOST), self.count)
        with torch.device("cpu"):  # the library makes tensors that processes share
            return replace(self, rows=self.rows.take(count), count=count)

    def epoch(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, share: Share = WHOLE
    ) -> Iterator[Examples]:
        """One pass over the images; see `Split`."""
        check_integer("batch_size", batch_size, 1, _MOST)
        start = check_integer("start", start, 0, _MOST)
        with torch.device("cpu"):
            rows = self.rows if seed is None else self.rows.shuffle(seed=seed, buffer_size=self.buffer)
            rows = rows.skip(start * batch_size)
        batch: list[tuple[Any, str]] = []
        for number, row in enumerate(rows, start * batch_size):
            # still encoded: only this process's share is decoded
            batch.append((row, self.origin.row(number) if seed is None else self._unordered(row)))
            if len(batch) == batch_size:
                yield from self._decoded(batch[share.rank :: share.of])
                batch = []
        if seed is None:
            yield from self._decoded(batch[share.rank :: share.of])

    def _decoded(self, rows: list[tuple[Any, str]]) -> Iterator[Examples]:
        if rows:
            yield _collate([decode(row, self.size, name, self.origin.classes) for row, name in rows])

    def _unordered(self, row: dict[str, Any]) -> str:
        """What can be told of a row when its number is not known any more."""
        path = (row["image"] or {}).get("path") or "without a name"
        place = "".join(f", in {file} or a later file" for file, _ in self.origin.files[:1])
        return f"image {path} with label {row['label']}{place}"


def hide_labels(split: Arrays, per_class: int, generator: torch.Generator) -> Arrays:
    """The same images with a few labels only; images that keep theirs appear often enough to be a quarter.

    Args:
        split: the images.
        per_class: how many of each class keep their label; -1 takes the place of the others.
        generator: draws which.

    Raises:
        TypeError, ValueError: it is no number, or a class has fewer images.
    """
    per_class = check_integer("per_class", per_class, 1, _MOST)
    order = torch.randperm(len(split), generator=generator, device="cpu").to(split.labels.device)
    kept = []
    for label in split.labels.unique():
        of_class = order[split.labels[order] == label]
        if len(of_class) < per_class:
            raise ValueError(
                f"labels_per_class must be at most {len(of_class)}, the images of class {int(label)}, "
                f"got {per_class}"
            )
        kept.append(of_class[:per_class])
    labelled = torch.cat(kept)
    hidden = torch.ones_like(split.labels, dtype=torch.bool).index_fill_(0, labelled, False)
    copies = max(1, round(int(hidden.sum()) / 3 / len(labelled)))
    index = torch.cat([hidden.nonzero()[:, 0], labelled.repeat(copies)])
    found = Arrays(*_each(split, itemgetter(index)))
    return replace(found, labels=found.labels.where(~hidden[index], -1))


def _collate(examples: list[Any]) -> Examples:  # made in shared memory, if other processes read
    images, labels, *masks = map(list, zip(*examples, strict=True))
    return Examples(default_collate(images), torch.tensor(labels, device="cpu"), *map(default_collate, masks))


def _each(examples: Any, function: Callable[[Tensor], Any]) -> list[Any]:
    """A function of images, labels and, where there are any, masks."""
    tensors = [getattr(examples, name) for name in Examples._fields]
    return [None if tensor is None else function(tensor) for tensor in tensors]


def _orders(
    count: int, batch_size: int, seed: int | None, start: int, share: Share, device: torch.device
) -> Iterator[Tensor]:
    """The indices of each batch's share."""
    check_integer("batch_size", batch_size, 1, _MOST)
    start = check_integer("start", start, 0, _MOST)
    order = torch.arange(count, device="cpu")
    if seed is not None:
        seed = check_integer("seed", seed, -(2**63), 2**64 - 1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
        order = order[: count // batch_size * batch_size]
    for batch in order.to(device).split(batch_size)[start:]:
        if len(mine := batch[share.rank :: share.of]):
            yield mine


def read_image(file: Path | IO[bytes], *, least: int | None = None) -> Tensor:
    """The image in a file: (3, H, W), uint8, upright as its EXIF says, and on white where it is transparent.

    Args:
        file: its path, or the opened file.
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size, for less work, as long as
            no side gets shorter than this; None: at its size.

    Raises:
        ValueError: a grey value may mean anything: a real number beyond [0, 1], or a whole one of 32 bits.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(file) as opened, torch.device("cpu"):
        if least is not None:
            opened.draft("RGB", (least, least))
        image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":  # grey of more than 8 bits, which Pillow would clip
            grey, white = pil_to_tensor(image).float(), 1 if image.mode == "F" else 65535
            # Pillow says "I" of 16 bits, too, of a PNG and of a PGM, whose whitest it makes 65535
            known = image.mode[1:] or image.mode == "F" or opened.format in ("PNG", "PPM")
            if not (known and grey.min() >= 0 and grey.max() <= white):  # NaN is not between them either
                told = f"from {grey.min():g} to {grey.max():g} in mode {image.mode}"
                raise ValueError(f"its values are {told}, of which none is known to be white")
            return (grey / white * 255).round_().to(torch.uint8).repeat(3, 1, 1)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return pil_to_tensor(image.convert("RGB"))


def centre(image: Tensor, short: int, size: int) -> Tensor:
    """The middle (3, size, size) of an image whose short side is first resized, with antialiasing."""
    from torchvision.transforms.v2 import functional as tv

    return tv.center_crop(tv.resize(image, [short], antialias=True), [size, size])


def decode(
    row: dict[str, Any], size: int | None = None, name: str = "a row", classes: int | None = None
) -> tuple[Tensor, int]:
    """An encoded image as (3, H, W), uint8, with its label.

    Args:
        row: "image", with the encoded "bytes", and "label".
        size: the short side is resized with antialiasing to 8/7 of it, and the centre is cut out; None
            leaves the image as it is.
        name: of the row.
        classes: K; None: any label will do.

    Raises:
        DamagedFileError: with the row's name: the image cannot be decoded, or the label is none.
    """
    label, short = row["label"], None if size is None else size * 8 // 7
    if classes is not None and (label is None or not 0 <= label < classes):
        raise DamagedFileError(f"{name}: the label must be from 0 to {classes - 1}, got {label}")
    try:
        image = read_image(io.BytesIO(row["image"]["bytes"]), least=short)
    except Exception as error:  # whatever the bytes lead the decoders of Pillow to
        raise DamagedFileError(f"{name}: the image cannot be decoded ({error})") from error
    return image if size is None or short is None else centre(image, short, size), label


def batches(split: Split, size: int, device: torch.device, **epoch: Any) -> Iterator[Examples]:
    """One pass over a split, as float32 images in [0, 1] of one size on a device.

    Args:
        split: the images.
        size: height and width; images of another size are resized there, with antialiasing.
        device: where the batches go; what is to be resized travels small.
        **epoch: of `Split.epoch`.
    """
    for examples in split.epoch(**epoch):
        images, *others = _each(examples, lambda tensor: tensor.to(device, non_blocking=True))
        images = images.float().div_(255)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        yield Examples(images, *others)
