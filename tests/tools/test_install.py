"""Setting up an environment: what is missing is said first, what goes on is said meanwhile."""

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tools import install

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def plenty(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 100e9))


def test_a_full_disk_is_named_before_anything_is_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 1.25e9))
    assert install.main(str(tmp_path / "venv"), "torch") == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("1.2 GB are free on the disk of ")
    assert line.endswith(" GB are needed")
    assert not (tmp_path / "venv").exists()


def test_what_is_there_needs_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 1e9))
    monkeypatch.setattr(install, "UNPACKED", 2000)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "torch.so").write_bytes(bytes(1500))
    assert install.shortcoming(tmp_path / "venv") is None


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_that_makes_no_environments_is_refused(monkeypatch, tmp_path, plenty, missing):
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == missing else name)
    assert "apt-get install python3-venv" in install.shortcoming(tmp_path / "venv")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 100e9))
    assert install.shortcoming(tmp_path / "venv") is None


SAID = """\
Collecting torch==2.15.0 (from -c constraints.txt (line 187))
  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)
  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (887.9 MB)
Collecting nvidia-cublas==13.4.1.3
  Using cached nvidia_cublas-13.4.1.3-py3-none-manylinux_2_27_x86_64.whl (1.2 GB)
  Downloading idna-3.20-py3-none-any.whl (70 kB)
Installing collected packages: idna, nvidia-cublas, torch
"""


def test_what_is_large_is_told_and_the_rest_is_summed_up(tmp_path, capsys):
    progress = install.Progress(tmp_path)
    *lines, last = SAID.splitlines()
    for line in lines:
        progress.hear(line)
    progress.sum_up()
    progress.hear(last)
    (tmp_path / "lib/python3.11/site-packages/idna-3.20.dist-info").mkdir(parents=True)
    progress.sum_up()
    assert [line.split("  ", 2)[2] for line in capsys.readouterr().out.splitlines()] == [
        "downloading torch 2.15.0, 888 MB",
        "using cached nvidia_cublas 13.4.1.3, 1,200 MB",
        "3 packages found, 2.1 GB",
        "unpacking 3 packages",
        "1 of 3 unpacked",
    ]


def test_a_failure_shows_what_pip_said_last(tmp_path, capsys):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert install.pip(Path(tmp_path), ["--no-index", "no-such-package"]) != 0
    said = capsys.readouterr().out
    assert "No matching distribution found for no-such-package" in said
    assert said.endswith(f"pip failed with status 1; all that it said is in {tmp_path / 'install.log'}\n")
    assert "no-such-package" in (tmp_path / "install.log").read_text()
