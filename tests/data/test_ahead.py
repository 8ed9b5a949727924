"""Processes that decode images ahead of time: when one dies, and what then becomes of the pass."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from PIL import Image

from salnb.data import ahead
from salnb.data.folder import FolderImages

_SIZE = 16


@pytest.fixture
def split(tmp_path):
    """Forty images, decoded by two processes."""
    names = [f"{name}/{i}.png" for i in range(20) for name in ("cat", "dog")]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 6 * i, dtype=np.uint8)).save(tmp_path / name)
    return FolderImages(names, _SIZE, 2, root=tmp_path, classes=("cat", "dog"))


def end(number):
    """Send a signal to all that decode, and wait until it has ended them, as this process is told."""
    decoding = [process.pid for process in active_children()]
    assert len(decoding) == 2
    # from elsewhere: of the one they work for SIGTERM would be a request to finish
    subprocess.run(["kill", f"-{int(number)}", *map(str, decoding)], check=True)
    if number != signal.SIGINT:
        for process in decoding:
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        torch.zeros(1)  # torch's error would be raised here


def numbers(batches):
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("after", [1, 3, 9])
def test_a_pass_outlives_the_processes_that_sigterm_ended(split, after):
    expected = numbers(split.epoch(4, seed=1))
    before = signal.getsignal(signal.SIGCHLD)
    batches = split.epoch(4, seed=1)
    found = [next(batches) for _ in range(after)]
    end(signal.SIGTERM)
    with pytest.warns(UserWarning, match="this one decodes the rest"):
        found += batches
    assert numbers(found) == expected
    assert signal.getsignal(signal.SIGCHLD) is before
    assert not active_children()


def test_a_process_that_died_otherwise_is_told_when_a_batch_is_asked_for(split):
    batches = split.epoch(4, seed=1)
    next(batches)
    end(signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) is killed by signal: Killed"):
        list(batches)


@pytest.mark.parametrize("seconds", [0, 1], ids=["at once", "late"])
def test_ctrl_c_is_left_to_the_process_they_work_for(split, monkeypatch, seconds):
    expected, ignore = numbers(split.epoch(4, seed=1)), ahead._leave_ctrl_c
    monkeypatch.setattr(ahead, "_leave_ctrl_c", lambda number: (time.sleep(number * seconds), ignore(number)))
    batches = split.epoch(4, seed=1)
    found = [next(batches)]  # of process 0: the other one may not have begun
    end(signal.SIGINT)
    assert numbers([*found, *batches]) == expected


def test_a_handler_of_ones_own_is_still_called(split):
    seen, batches = [], split.epoch(4, seed=1)
    list(batches)
    torchs = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, lambda *args: seen.append(args))
    try:
        list(split.epoch(4, seed=1))
    finally:
        signal.signal(signal.SIGCHLD, torchs)
    assert seen


SCRIPT = """
import multiprocessing
from pathlib import Path
from salnb.data.folder import FolderImages

multiprocessing.set_start_method("spawn", force=True)
names = sorted(str(path.relative_to({root!r})) for path in Path({root!r}).rglob("*.png"))
print(len(list(FolderImages(names, 16, 1, root=Path({root!r}), classes=("cat", "dog")).epoch(4, seed=1))))
"""


@pytest.mark.parametrize("guard", ["if True:", "if __name__ == '__main__':"])
def test_a_script_that_started_processes_run_again(split, tmp_path, guard):
    """What the start method is from Python 3.14 on, and on other systems before, runs a script again."""
    lines = SCRIPT.format(root=str(tmp_path)).strip().splitlines()
    script = tmp_path / "script.py"
    script.write_text("\n".join([*lines[:3], guard, *(f"    {line}" for line in lines[3:])]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1:]
    if "main" in guard:
        assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr
    else:
        assert done.returncode == 1
        assert "ended at once: started by 'spawn'" in last[0]
        assert "if __name__ == '__main__':, or ask for workers=0" in last[0]
