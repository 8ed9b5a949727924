"""The training loop against bare steps, and the speed of the data pipeline, on whatever device there is."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as tv

from benchmarks._ratio import medians, print_table
from salnb import data
from salnb._common.packages import package_folder
from salnb.train.config import Config
from salnb.train.epoch_sums import EpochSums
from salnb.train.loop import train_epoch
from salnb.train.run import Run
from salnb.train.setup import make_fabric, make_objective, make_optimizer

BATCH = 64


def random_images(count: int, size: int) -> data.Arrays:
    """Images in memory, as uint8."""
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return data.Arrays(images, torch.arange(count) % 10)


def loop_and_bare_steps(gamma: float, steps: int = 10) -> dict[str, float]:
    """Seconds of an epoch in the loop, and of as many steps on batches that are on the device already."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            out=folder,
            gamma=gamma,
            batch_size=BATCH,
            schedule="constant",
            learning_rate=1e-4,
            save_minutes=1e9,
        )
        fabric = make_fabric(config)
        split = random_images(steps * BATCH, 32).to(fabric.device)
        dataset = data.Dataset(split, split, split, [])
        run = Run(config, fabric, make_objective(config, data.WHOLE), dataset, [], print)

        objective = make_objective(config, data.WHOLE).to(fabric.device)
        optimizer = make_optimizer(config, objective)
        batches = list(data.batches(split, 32, fabric.device, batch_size=BATCH))

        def loop() -> None:
            run.batch = 0
            train_epoch(run)
            run.sums = EpochSums()

        def bare() -> None:
            for images, labels, _ in batches:
                objective(images, labels).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            if fabric.device.type == "cuda":
                torch.cuda.synchronize()

        return medians({"loop": loop, "bare": bare}, seconds=30, least=7)


def read(split: data.Split, size: int, device: torch.device) -> int:
    """One shuffled pass; gives the number of images."""
    count = 0
    for images, _, _ in data.batches(split, size, device, batch_size=BATCH, seed=0):
        count += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def photographs(count: int, workers: int) -> data.DiskImages:
    """Encoded photographs of ImageNet's kind, again and again."""
    files = sorted((package_folder("foolbox", "chapters") / "data").glob("imagenet_*"))
    rows = [{"image": {"bytes": file.read_bytes()}, "label": 0} for file in files]
    return data.DiskImages([rows[i % len(rows)] for i in range(count)], 224, workers)


def folder_and_torchvision(count: int = 256, workers: int = 2) -> dict[str, float]:
    """Seconds of a pass over a folder of photographs, ours and that of torchvision's `ImageFolder`."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((package_folder("foolbox", "chapters") / "data").glob("imagenet_*"))
        for i in range(count):
            (place := Path(folder) / str(i % 2)).mkdir(exist_ok=True)
            (place / f"{i}.jpg").write_bytes(files[i % len(files)].read_bytes())
        ours = data.FolderImages(
            [path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*.jpg"))],
            224,
            workers,
            root=Path(folder),
            classes=["0", "1"],
        )
        steps = [tv.Resize(256), tv.CenterCrop(224), tv.ToImage(), tv.ToDtype(torch.float32, scale=True)]
        loader: DataLoader = DataLoader(
            ImageFolder(folder, tv.Compose(steps)),
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
        )
        mine = partial(read, ours, 224, torch.device("cpu"))
        return medians({"ours": mine, "theirs": partial(list, loader)}, seconds=20)


def main() -> None:
    """Print the loop's cost over bare steps, and images per second of the pipeline."""
    torch.manual_seed(0)
    rows = []
    for gamma in (0.0, 1.0):
        seconds = loop_and_bare_steps(gamma)
        ratio = seconds["loop"] / seconds["bare"]
        rows.append([f"{gamma:g}", f"{seconds['loop']:.3f}", f"{seconds['bare']:.3f}", f"{ratio:.3f}"])
    title = f"Ten steps of 64 at 32×32, small network, {torch.get_num_threads()} threads"
    print_table(title, ["gamma", "loop, s", "bare steps, s", "loop / bare steps"], rows)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits: dict[str, tuple[data.Split, int]] = {
        "in memory, 32×32": (random_images(6400, 32).to(device), 32),
        "in memory, 224×224": (random_images(640, 224).to(device), 224),
        "in memory, 32×32 resized to 224×224": (random_images(640, 32).to(device), 224),
        "JPEGs to 224×224, this process": (photographs(128, 0), 224),
        "JPEGs to 224×224, 2 more processes": (photographs(640, 2), 224),
    }
    seconds = medians({name: partial(read, *what, device) for name, what in splits.items()}, seconds=20)
    rows = [
        [name, f"{len(split) // BATCH * BATCH / seconds[name]:,.0f}"] for name, (split, _) in splits.items()
    ]
    print_table(f"Data pipeline, {device}", ["source", "images / s"], rows)

    seconds = folder_and_torchvision()
    rows = [[f"{256 / seconds['ours']:,.0f}", f"{seconds['theirs'] / seconds['ours']:.2f}"]]
    print_table("A folder of photographs to 224×224, 2 processes", ["images / s", "/ ImageFolder"], rows)


if __name__ == "__main__":
    main()
