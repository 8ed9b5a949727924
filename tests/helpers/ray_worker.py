"""What the tests' Ray workers do besides: they note down what they train, and stop where they are told to."""

import os
import time
from pathlib import Path

import torch


def prepare():
    """Called in each worker when it starts.

    In the folder SALNB_TEST_NOTES, ``attempts`` gets a line for each training that is begun or gone on with:
    its seed, the step that it goes on from, the process. Where ``stop-SEED`` names a step, the process reports
    itself in ``stopped-SEED`` after that step and waits; so it does only once.
    """
    from salnb.train import loop

    torch.set_num_threads(1)
    notes = Path(os.environ["SALNB_TEST_NOTES"])
    train_epoch, step_generator = loop.train_epoch, loop.step_generator
    seen = []

    def noted(run):
        if run.config.out not in seen:
            seen.append(run.config.out)
            with open(notes / "attempts", "a") as file:
                file.write(f"{run.config.seed} {run.step} {os.getpid()}\n")
        return train_epoch(run)

    def stopping(run):
        stop = notes / f"stop-{run.config.seed}"
        if stop.exists() and run.step == int(stop.read_text()):
            stop.rename(notes / f"stopped-{run.config.seed}")
            (notes / f"pid-{run.config.seed}").write_text(str(os.getpid()))
            while not run.signals:
                time.sleep(0.02)
        return step_generator(run)

    loop.train_epoch, loop.step_generator = noted, stopping
