"""Training runs and rows of the timing study, as the command line has them."""

import json
import math

import pytest
import torch

from salnb import data, timing
from salnb.__main__ import main
from salnb.timing import Case
from salnb.train.config import Config

# what `salnb train` needs, and Colab has: without it these tests are skipped
TRAINING = ("lightning_fabric", "torchmetrics", "safetensors", "tqdm")


@pytest.fixture
def scenes(monkeypatch):
    """Noise with masks in the place of the digit scenes, which other packages are needed for."""
    for package in TRAINING:
        pytest.importorskip(package)
    split = data.Arrays(
        torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8),
        torch.arange(24) % 10,
        torch.rand(24, 1, 32, 32) < 0.3,
    )
    dataset = data.Dataset(split, split.first(8), split.first(8), [str(digit) for digit in range(10)])
    monkeypatch.setattr(data, "load", lambda name, size, **options: dataset)


def only_for_gpus(precision, device):
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        pytest.skip(f"{precision} needs a GPU: --device cuda")


@pytest.mark.usefixtures("scenes")
@pytest.mark.parametrize("precision", ["32", "tf32", "bf16", "fp16"])
def test_salnb_train(precision, tmp_path, device, capsys):
    only_for_gpus(precision, device)
    settings = {"batch-size": 8, "epochs": 2, "precision": precision, "device": device.type, "out": tmp_path}
    assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0, (
        capsys.readouterr()
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["config"]["precision"] == precision
    assert all(math.isfinite(summary[name]) for name in ("total", "saliency_loss", "test_saliency_on_object"))
    assert summary["provenance"]["device"].startswith(device.type)
    assert summary["peak_memory_bytes"] > 0


@pytest.mark.usefixtures("scenes")
@pytest.mark.parametrize("precision", ["32", "fp16"])
def test_a_run_goes_on(precision, tmp_path, device):
    """In float32 on the CPU, wherever it began."""
    only_for_gpus(precision, device)
    from salnb.train import fit

    options = {"out": str(tmp_path), "batch_size": 8, "epochs": 2, "precision": precision}

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Config(device=device.type, **options), log=stop, bar=False)
    where = "cpu" if precision == "32" else device.type
    summary = fit(Config(device=where, **options), resume=True, log=lambda line: None, bar=False)
    assert (summary["steps"], summary["epochs"]) == (6, 2)
    assert summary["provenance"]["device"].startswith(where)


CASES = {
    "baseline": Case("small", None),
    "with saliency": Case("small"),
    "every fourth step": Case("small", every=4),
    "tf32": Case("small", precision="tf32"),
    "bf16": Case("small", precision="bf16"),
    "channels last": Case("small", channels_last=True),
    "guided Grad-CAM": Case("small", "guided_grad_cam"),
    "SmoothGrad": Case("small", "smoothgrad", samples=2),
    # of the step with saliency test_precision has one: to compile takes half a minute
    "compiled baseline": Case("small", None, precision="bf16", compiled=True),
    "captured": Case("small", precision="bf16", captured=True),
    "captured baseline": Case("small", None, precision="bf16", captured=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_each_kind_of_salnb_time(name, device):
    case = Case(**vars(CASES[name]) | {"batch": 2, "size": 32})
    if device.type == "cpu" and name != "with saliency":
        pytest.skip("on a CPU tests/timing has them all: --device cuda")
    row = timing.measure(case, device, iterations=4)
    assert "lacks" not in row, row["lacks"]
    assert row["seconds"]["median"] > 0
    assert row["peak_bytes"] > row["held_bytes"] > 0
    assert row["flops"] > row["convolution_flops"] > 0
    if case.every == 1 and case.mode == "eager":
        assert sum(row["kinds"].values()) > 0
