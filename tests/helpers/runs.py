"""Runs of a few steps on twenty real images, in this process or in one that can be killed."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from functools import partial

from salnb import results
from salnb.train.config import Config

# imported once by the server from which the processes are forked: a start takes milliseconds, not seconds
METHOD = "forkserver"
_CONTEXT = multiprocessing.get_context(METHOD)
_CONTEXT.set_forkserver_preload(["salnb.train.loop", "datasets", "tests.helpers.runs"])

# eighteen training images: four steps in an epoch
DEFAULTS = {"data": "cifar10", "batch_size": 4, "epochs": 3, "device": "cpu", "save_minutes": 0}


def settings(out, **changes):
    return Config(out=str(out), **DEFAULTS | changes)


def rows(out):
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    """The same, as they should be however often the run was stopped."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def check_same(out, whole):
    """A run's folder holds what the uninterrupted run's does, to the last bit, and nothing else."""
    folder, summary = whole
    found = results.read_record(out / "summary.json")
    assert found["parameters_sha256"] == summary["parameters_sha256"]
    assert found["test_loss"] == summary["test_loss"]
    assert without_times(rows(out)) == without_times(rows(folder))
    steps = [path.name.split(".")[0] for path in sorted((out / "checkpoints").glob("*.pt"))]
    # killed at the very end, older ones may be left
    assert steps[-2:] == ["step-000000011", "step-000000012"]
    assert not list(out.rglob(".draft-*"))


def silent(line):
    pass


def start(config, *, cache, inject=None):
    """Start a run, or go on with it, in a process of its own.

    Args:
        config: the settings.
        cache: the folder of the data.
        inject: is called in that process before the run, with its end of the pipe.

    Returns:
        The process, and our end of a pipe on which it reports: each line that it logs, and last its summary
        or its error.
    """
    return start_call(partial(_fit, config), cache=cache, inject=inject)


def start_call(call, *, cache, inject=None):
    """The same for any function that takes `log`."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_run, args=(call, str(cache), inject, theirs))
    process.start()
    theirs.close()
    return process, ours


def start_command(arguments, folder, *, cache):
    """Start `salnb` with arguments; what it prints goes into the files `stdout` and `stderr` of a folder."""
    process = _CONTEXT.Process(target=_command, args=(arguments, str(cache), folder))
    process.start()
    return process


def finish(process, pipe):
    """What a process reports last."""
    last = None
    try:
        while True:
            last = pipe.recv()
    except EOFError:
        process.join()
    return last


def _fit(config, log):
    from salnb.train import fit

    return fit(config, resume=True, log=log)


def _run(call, cache, inject, pipe):
    os.environ["SALNB_CACHE"] = cache
    import torch

    from salnb.train import Interrupted

    torch.set_num_threads(1)
    if inject is not None:
        inject(pipe)
    pipe.send("started")
    try:
        pipe.send(call(log=pipe.send))
    except (Exception, Interrupted) as error:
        pipe.send(error)


def _command(arguments, cache, folder):
    from salnb.__main__ import main

    os.environ["SALNB_CACHE"] = cache
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(arguments))


# --- what can be injected: each stops a process at a point where it is then killed ---------------------------


def stop_while_writing_a_checkpoint(pipe):
    """In the middle of the file, at the third checkpoint."""
    import torch

    saves, save = _count_saves(), torch.save

    def stop(state, file):
        save(state, file)
        if len(saves) == 3:
            assert file.tell() > 200_000
            file.truncate(100_000)
            file.flush()
            _report_and_wait(pipe)

    torch.save = stop


def stop_before_a_checkpoint_has_its_name(pipe):
    """When all is written, at the third checkpoint."""
    from salnb._common import files as _files

    place = _files._place
    saves = _count_saves()

    def stop(file, path):
        if len(saves) == 3:
            _report_and_wait(pipe)
        return place(file, path)

    _files._place = stop


def stop_before_old_checkpoints_are_removed(pipe):
    """When the newest has its name and those before it are still there."""
    from salnb.train import checkpoint

    saves, newest = _count_saves(), checkpoint._newest_first

    def stop(folder):
        if len(saves) == 3:
            _report_and_wait(pipe)
        return newest(folder)

    checkpoint._newest_first = stop


def _count_saves():
    from salnb.train import checkpoint

    save, saves = checkpoint.save_hashed, []

    def counted(*args):
        saves.append(args)
        return save(*args)

    checkpoint.save_hashed = counted
    return saves


def _report_and_wait(pipe):
    pipe.send("here")
    with contextlib.suppress(EOFError):  # until the process is killed, or the one that would kill it is gone
        pipe.recv()


def wait_for(pipe, word):
    """Read reports until one of them is the word."""
    while (report := pipe.recv()) != word:
        assert not isinstance(report, BaseException), report


def kill(process):
    """Kill a process; gives whether it was still running."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
