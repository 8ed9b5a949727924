"""Splits of labelled images, in memory, on disk or streamed, each an endless source of batches by epoch."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from salnb._common.files import DamagedFileError, load_hashed, remove_drafts, save_hashed

# what the face of the package shows
__all__ = ["WHOLE", "Arrays", "Dataset", "DiskImages", "Examples", "Share", "Split", "StreamedImages"]
__all__ += ["batches", "cache_folder"]

# what is smaller is kept on the accelerator
_FITS_THE_DEVICE = 2**30
# seconds after which a file that is still not whole has been left behind: nothing takes so long to write
_ABANDONED = 24 * 3600.0


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


class Share(NamedTuple):
    """What one of several processes works on: every `of`-th image of each batch, from the `rank`-th on."""

    rank: int = 0
    of: int = 1


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
    """

    train: Split
    validation: Split
    test: Split
    classes: list[str]


@dataclass
class Arrays:
    """Images in memory, as in `Examples`."""

    images: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def first(self, count: int) -> "Arrays":
        """The first so many of the images."""
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


@dataclass
class DiskImages:
    """Encoded images on disk, decoded when their turn comes, by processes that work ahead.

    Attributes:
        rows: has a length, and gives for an index a dictionary with the encoded bytes and the label.
        size: height and width that the images are brought to.
        workers: number of processes; 0 decodes in this one.
    """

    rows: Any
    size: int
    workers: int = 0

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, decoded, and its label."""
        return decode(self.rows[index], self.size)

    def first(self, count: int) -> "DiskImages":
        """The first so many of the images."""
        return DiskImages(self.rows.select(range(min(count, len(self)))), self.size, self.workers)

    def epoch(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, share: Share = WHOLE
    ) -> Iterator[Examples]:
        """One pass over the images; see `Split`."""
        orders = _orders(len(self), batch_size, seed, start, share, torch.device("cpu"))
        loader: DataLoader = DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=[index.tolist() for index in orders],
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )
        for images, labels in loader:
            yield Examples(images, labels)


@dataclass
class StreamedImages:
    """Encoded images that arrive one after the other from far away.

    Attributes:
        rows: a streamed data set of Hugging Face.
        size: height and width that the images are brought to.
        count: how many there are.
        buffer: how many are kept at hand to choose the next one from; a shuffled pass mixes that far.
    """

    rows: Any
    size: int
    count: int
    buffer: int = 10_000

    def __len__(self) -> int:
        """The number of images."""
        return self.count

    def first(self, count: int) -> "StreamedImages":
        """The first so many of the images."""
        count = min(count, self.count)
        return StreamedImages(self.rows.take(count), self.size, count, self.buffer)

    def epoch(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, share: Share = WHOLE
    ) -> Iterator[Examples]:
        """One pass over the images; see `Split`."""
        rows = self.rows if seed is None else self.rows.shuffle(seed=seed, buffer_size=self.buffer)
        batch: list[Any] = []
        for row in rows.skip(start * batch_size):
            batch.append(row)  # still encoded: only this process's share is decoded
            if len(batch) == batch_size:
                yield from self._decoded(batch[share.rank :: share.of])
                batch = []
        if seed is None:
            yield from self._decoded(batch[share.rank :: share.of])

    def _decoded(self, rows: list[Any]) -> Iterator[Examples]:
        if rows:
            images, labels = zip(*(decode(row, self.size) for row in rows), strict=True)
            yield Examples(torch.stack(images), torch.tensor(labels))


def _each(examples: Any, function: Callable[[Tensor], Tensor]) -> list[Any]:
    """A function of images, labels and, where there are any, masks."""
    tensors = [getattr(examples, name) for name in Examples._fields]
    return [None if tensor is None else function(tensor) for tensor in tensors]


def _orders(
    count: int, batch_size: int, seed: int | None, start: int, share: Share, device: torch.device
) -> Iterator[Tensor]:
    """The indices of each batch's share."""
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        order = order[: count // batch_size * batch_size]
    for batch in order.to(device).split(batch_size)[start:]:
        if len(mine := batch[share.rank :: share.of]):
            yield mine


def read_image(file: Path | IO[bytes], *, least: int | None = None) -> Tensor:
    """The image in a file: (3, H, W), uint8.

    Args:
        file: its path, or the opened file.
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size, for less work, as long as
            no side gets shorter than this; None: at its size.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(file) as image:
        if least is not None:
            image.draft("RGB", (least, least))
        return pil_to_tensor(image.convert("RGB"))


def centre(image: Tensor, short: int, size: int) -> Tensor:
    """The middle (3, size, size) of an image whose short side is first resized, with antialiasing."""
    from torchvision.transforms.v2 import functional as tv

    return tv.center_crop(tv.resize(image, [short], antialias=True), [size, size])


def decode(row: dict[str, Any], size: int | None = None) -> tuple[Tensor, int]:
    """An encoded image as (3, H, W), uint8, with its label.

    Args:
        row: "image", with the encoded "bytes", and "label".
        size: the short side is resized with antialiasing to 8/7 of it, and the centre is cut out; None
            leaves the image as it is.
    """
    file = io.BytesIO(row["image"]["bytes"])
    if size is None:
        return read_image(file), row["label"]
    short = size * 8 // 7
    return centre(read_image(file, least=short), short, size), row["label"]


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


def cache_folder() -> Path:
    """Where data sets are kept: `$SALNB_CACHE`, or `~/.cache/salnb`."""
    return Path(os.environ.get("SALNB_CACHE") or Path.home() / ".cache" / "salnb")


def cached(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made once and kept on disk.

    Args:
        name: of the file; a change of what is made asks for a new one.
        make: gives tensors and plain values by name.

    Warns:
        UserWarning: the file was truncated or altered; it is made again.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{name}.*.pt"):
        try:
            return load_hashed(path)
        except DamagedFileError as error:
            warnings.warn(f"{error}; it is made again", stacklevel=2)
            path.unlink(missing_ok=True)  # another process may have come before
    remove_drafts(folder, older=_ABANDONED)
    state = make()
    save_hashed(folder, name, state)
    return state
