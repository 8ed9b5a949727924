"""Fixtures that every test module shares."""

import gc
import os
import signal

# before torch is imported: sums of several threads differ in their last bits, and runs are compared to the bit
os.environ.setdefault("OMP_NUM_THREADS", "1")

from contextlib import nullcontext

import pytest
import torch

from salnb.objective.precision import tf32
from tests.helpers import runs
from tests.helpers.paper_files import put_files

# a shell starts what runs in the background with Ctrl-C ignored, and so would be all processes of the tests
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="of the tests on_device")


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "there is no GPU for CUDA on this machine: take --device cpu (make test-gpu DEVICE=cpu)"
        )


def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")


def pytest_collection_finish():
    """What was imported stays, and need not be looked at whenever garbage is collected."""
    gc.freeze()


def pytest_unconfigure():
    """Packages that look for leaks at the interpreter's end would take what is frozen for one."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _repeatable():
    """Each test starts from the same seed and leaves torch's global switches as it found them."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def device(request):
    """What `--device` names, where a test makes its networks and images; float32 is not rounded to TF32 there."""
    named = torch.device(request.config.getoption("--device"))
    with tf32(False) if named.type == "cuda" else nullcontext():
        yield named


@pytest.fixture
def traced(monkeypatch):
    """The graphs of `Objective.compile()`, which run as they are traced: PyTorch's compiler takes its time."""
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graphs.append(graph) or graph)
    return graphs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of data with twenty real images as CIFAR-10 in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SALNB_CACHE", str(folder))
        put_files("cifar10")
        yield folder


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """A folder of data in which digit scenes are drawn of a tenth of the digits, or fewer."""
    from salnb.data import scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALNB_CACHE", str(tmp_path_factory.mktemp("cache")))
        few = {split: slice(digits.start, digits.start + 10) for split, digits in scenes._DIGITS.items()}
        patch.setattr(scenes, "_DIGITS", few)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nothing interrupts: its folder and its summary."""
    from salnb.train import fit

    out = tmp_path_factory.mktemp("whole") / "run"
    return out, fit(runs.settings(out), log=runs.silent)
