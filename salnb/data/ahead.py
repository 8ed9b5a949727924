"""Processes that read ahead, which may die while something else is computed."""

import contextlib
import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from salnb._common.files import DamagedFileError

__all__ = ["read_ahead"]

# seconds after which it is known how a process ended that left an error behind
_SETTLED = 1.0


def read_ahead(
    images: Any, batches: Sequence[list[int]], workers: int, collate: Callable[[list[Any]], Any]
) -> Iterator[Any]:
    """Batches of what has an item for each index, made by processes that work ahead, or by this one.

    That a process has died is told when a batch is asked for, and not in the middle of a step. Where it was
    SIGTERM, which a scheduler sends to all processes of a run at once, this one makes the other batches: a
    run reaches the point where it saves itself, and is as it would have been.

    Args:
        images: gives an item for an index.
        batches: the indices of each batch.
        workers: number of processes; 0: this one.
        collate: makes a batch of a list of items.

    Raises:
        RuntimeError: a process died of something else; or none could start, as they run the program's script
            again where they are not forked, and it does its work again.

    Warns:
        UserWarning: this process does what those did that SIGTERM has ended.
    """
    loader: DataLoader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=_leave_ctrl_c,
    )
    with torch.device("cpu"), _ctrl_c_waits():  # it draws a seed
        ready = iter(loader)
    done = 0
    with _deaths_in_turn() as turn:
        try:
            while done < len(batches):
                with turn():
                    batch = next(ready)
                done += 1
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, DamagedFileError) or not _terminated(ready):
                _explain_start(error, begun=bool(done))
                raise
            text = "SIGTERM has ended processes that decode images: this one decodes the rest of this pass"
            warnings.warn(text, stacklevel=2)
        finally:
            del ready  # ends the processes
    for indices in batches[done:]:
        yield collate([images[index] for index in indices])


def _leave_ctrl_c(number: int) -> None:
    """A terminal sends it to all processes alike: these end when the one they work for does, or says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Hold Ctrl-C back while processes start, which inherit this, until they ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _terminated(ready: Any) -> bool:
    """Whether SIGTERM has ended a process of a loader's iterator."""
    end = time.monotonic() + _SETTLED
    while True:
        found = any(process.exitcode == -signal.SIGTERM for process in getattr(ready, "_workers", ()))
        if found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def _explain_start(error: BaseException, *, begun: bool) -> None:
    """Raise a better error where processes that are not forked ended as soon as they were started."""
    method = multiprocessing.get_start_method()
    if method != "fork" and not begun and "exited unexpectedly" in str(error):
        raise RuntimeError(
            f"the processes that decode images ended at once: started by {method!r}, they run this program's "
            "script again, so it must do its work under if __name__ == '__main__':, or ask for workers=0"
        ) from error


@contextlib.contextmanager
def _deaths_in_turn() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Keep torch's error that a process has died from being raised anywhere.

    Yields a function that gives a block to wait in: it is raised there, or where such a block begins.
    """
    torchs, waiting, died = signal.getsignal(signal.SIGCHLD), False, None

    def note(number: int, frame: Any) -> None:
        nonlocal died
        try:
            torchs(number, frame)  # type: ignore[operator, misc]
        except RuntimeError as error:
            if waiting:
                raise
            died = error.with_traceback(None)

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        nonlocal waiting
        waiting = True
        try:
            if died is not None:
                raise died
            yield
        finally:
            waiting = False

    mine = callable(torchs) and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGCHLD, note)
    try:
        yield turn
    finally:
        waiting = True  # where another handler still calls this one
        if mine and signal.getsignal(signal.SIGCHLD) is note:
            signal.signal(signal.SIGCHLD, torchs)
