"""Processes that train together: groups of one and of two, over gloo."""

import contextlib
import datetime
import faulthandler

import torch
import torch.distributed as dist

from tests.helpers import runs

WAIT = 300  # seconds after which processes that wait for one another give up


@contextlib.contextmanager
def group(folder, rank=0, size=1):
    """The group that meets in a folder."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=WAIT),
    )
    try:
        yield
        dist.barrier()  # none hangs up on another that has still to read
    finally:
        dist.destroy_process_group()


def in_two(folder, call, *args):
    """What `call(rank, *args)` returns in each of two processes; it must be importable."""
    torch.multiprocessing.start_processes(
        _process, (str(folder), call, args), nprocs=2, start_method=runs.METHOD
    )
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _process(rank, folder, call, args):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(2 * WAIT, exit=True)
    with group(folder, rank, 2):
        torch.save(call(rank, *args), f"{folder}/{rank}.pt")
