"""Devices: their names, and which of them this machine has."""

import subprocess
import sys

import pytest
import torch

from salnb._common.devices import best_device, check_device_name, resolve_device


@pytest.fixture
def machine(monkeypatch):
    """Sets how many GPUs this machine claims to have."""

    def claim(*, cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return claim


@pytest.mark.parametrize("name", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_names(name):
    check_device_name(name)


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:x", "cpu:0", "cuda:0 ", "cuda:01", "cuda:٣", "cuda:12345", None, 3]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}"):
        check_device_name(name)


@pytest.mark.parametrize(
    ("has", "best"), [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": 1, "mps": True}, "cuda")]
)
def test_the_best_there_is(machine, has, best):
    machine(**has)
    assert best_device() == best
    assert resolve_device("auto") == torch.device(best)


def test_what_is_not_there_is_refused(machine):
    machine(cuda=2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2 is not on this machine: take cuda, or auto"):
        resolve_device("cuda:2")
    with pytest.raises(ValueError, match="device cuda:2 is not on this machine: it has 2 GPUs"):
        resolve_device("cuda:2", advice="it has 2 GPUs")
    with pytest.raises(ValueError, match="device cuda:300 is not on this machine"):
        resolve_device("cuda:300")
    with pytest.raises(ValueError, match="device mps is not on this machine: take cuda, or auto"):
        resolve_device("mps")


def test_names_are_checked_without_torch():
    program = (
        "import sys, salnb._common.devices as d; d.check_device_name('cuda'); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
