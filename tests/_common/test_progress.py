"""The progress bar is there on a terminal, whatever this tells of itself, and nowhere else."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

PROGRAM = (
    "from salnb._common.progress import progress; print(sum(progress(range(3), 'counting', unit='thing')))"
)


@pytest.mark.parametrize("size", [(0, 0), (40, 100)], ids=["of unknown size", "40 lines"])
def test_a_terminal_shows_a_bar(size):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=theirs, check=True
    )
    shown = os.read(ours, 10_000).decode()
    assert answer.stdout == b"3\n"
    assert "counting:   0%" in shown
    assert "0/3" in shown


def test_a_file_shows_none():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert answer.stdout == b"3\n"
    assert answer.stderr == b""
