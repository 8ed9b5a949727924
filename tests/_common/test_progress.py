"""The progress bar is there on a terminal, whatever this tells of itself, and nowhere else."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import pytest

from salnb._common.progress import log_line, progress

PROGRAM = (
    "from salnb._common.progress import progress; print(sum(progress(range(3), 'counting', unit='thing')))"
)


@pytest.fixture(name="tqdm")
def _tqdm():
    return pytest.importorskip("tqdm")


@pytest.mark.usefixtures("tqdm")
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


@pytest.mark.usefixtures("tqdm")
def test_a_file_shows_none():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert answer.stdout == b"3\n"
    assert answer.stderr == b""


class Terminal(io.StringIO):
    """One to which nothing can be written after so many times."""

    def __init__(self, writes, error):
        super().__init__()
        self.writes, self.error = writes, error

    def isatty(self):
        return True

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), ValueError("closed"), RuntimeError("odd")], ids=repr
)
@pytest.mark.parametrize("writes", range(6))
def test_a_bar_that_fails_is_given_up(writes, error, tqdm):
    file = Terminal(writes, error)
    bar = progress(what="counting", total=3, file=file, mininterval=0)
    for text in "abc":
        bar.update()
        bar.set_postfix_str(text)
    bar.close()
    failed = progress(range(3), file=Terminal(writes, error), mininterval=0)
    assert list(failed) == [0, 1, 2]
    # and so is the line: the next bar does not stand below it
    with progress(total=3, file=Terminal(99, error)) as bar:
        assert bar.pos == 0
    # the lock that all bars share is free for those of other threads
    lock = tqdm.tqdm.get_lock()
    thread = threading.Thread(target=lambda: (lock.acquire(), lock.release()), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.usefixtures("tqdm")
def test_without_a_terminal_there_is_no_bar(monkeypatch):
    closed = Terminal(9, None)
    closed.close()
    for file in (closed, None):
        monkeypatch.setattr(sys, "stderr", file)
        assert list(progress(range(3), "counting")) == [0, 1, 2]
        with progress(what="counting", total=3) as bar:
            bar.update()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("closed")], ids=repr)
def test_a_line_that_nobody_reads_is_lost(monkeypatch, error):
    log_line("line", Terminal(0, error))
    for file in (Terminal(0, error), None):
        monkeypatch.setattr(sys, "stdout", file)
        log_line("line")
    log_line("line", file := io.StringIO())
    assert file.getvalue() == "line\n"
