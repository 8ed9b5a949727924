"""Attack the tests: break the package in many small ways, one at a time, and see which the tests notice.

python -m tools.mutants --minutes 30 --sample 200 --seed 0
python -m tools.mutants --modules salnb/losses.py --again    # run once more what survived

cosmic-ray finds what can be broken and breaks it, and its session (`_build/mutants/session.sqlite`) holds
the results: a run that is stopped, or whose time is over, goes on where it was. Two processes work at a time,
each in a copy of the tree of its own. The report, `_build/mutants/report.md`, shows each survivor's line.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from multiprocessing import get_context
from pathlib import Path

from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

from tools.mutants.report import findings, report
from tools.mutants.sample import ROOMS, ROOT, Mutant, draw, key, modules, statement, tests_of
from tools.mutants.trial import Baseline, attempt, baseline, baseline_from, prepare

OUT = ROOT / "_build" / "mutants"
TIMEOUT = 5  # times as long as the tests take of what is not broken, and at least
LEAST_TIMEOUT = 60  # seconds
WORKERS = 2


class Session:
    """cosmic-ray's database of mutants and results, opened for these mutants."""

    def __init__(self, path: Path, mutants: Mapping[str, Mutant]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = WorkDB(path, WorkDB.Mode.create)
        self.mutants = mutants
        known = {item.job_id for item in self.database.work_items}
        for name, m in mutants.items():
            if name not in known:
                spec = MutationSpec(Path(m.module), m.operator, m.occurrence, m.start, m.end)
                self.database.add_work_item(WorkItem.single(name, spec))

    def outcomes(self) -> dict[str, str]:
        """The outcome of each mutant that has been run."""
        found = {name: result for name, result in self.database.results if name in self.mutants}
        return {name: _outcome(str(r.test_outcome.value), r.output) for name, r in found.items()}

    def write(self, name: str, outcome: str, output: str) -> None:
        """Write down what came of a mutant."""
        killed = TestOutcome.SURVIVED if outcome == "survived" else TestOutcome.KILLED
        text = "timeout" if outcome == "timed out" else output
        self.database.set_result(name, WorkResult(WorkerOutcome.NORMAL, text, killed))


def _outcome(tested: str, output: str | None) -> str:
    if tested == "survived":
        return "survived"
    return "timed out" if output == "timeout" else "noticed"


def run(texts: Mapping[Mutant, str], session: Session, minutes: float, again: bool) -> None:
    """Try the mutants that have no result yet until the time is over.

    With `again` also those that survived, for which all tests of the room are run, not only those that reach
    the broken line.
    """
    ends = time.monotonic() + 60 * minutes
    done = session.outcomes()
    ahead = [n for n in session.mutants if n not in done or (again and done[n] == "survived")]
    if not ahead:
        return
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ProcessPoolExecutor(WORKERS, get_context("spawn"), prepare, (folder,)) as pool,
    ):
        rooms = _baselines(pool, {tests_of(session.mutants[name].module) for name in ahead})
        running: dict[Future, str] = {}
        for name in ahead:
            while len(running) >= WORKERS:
                _collect(running, session)
            if time.monotonic() > ends:
                break
            mutant = session.mutants[name]
            room = rooms[tests_of(mutant.module)]
            lines = statement((ROOT / mutant.module).read_text(), mutant)
            tests = room.tests(mutant.module, range(0) if again else lines)
            timeout = max(LEAST_TIMEOUT, TIMEOUT * sum(room.seconds[test] for test in tests))
            running[pool.submit(attempt, mutant.module, texts[mutant], tests, timeout)] = name
        while running:
            _collect(running, session)


def _baselines(pool: ProcessPoolExecutor, rooms: set[tuple[str, ...]]) -> dict[tuple[str, ...], Baseline]:
    """What each room's tests do while nothing is broken; kept for the next run of the same tree."""
    jobs: dict[Future, tuple[tuple[str, ...], Path]] = {}
    found = {}
    for room in sorted(rooms):
        kept = OUT / "baselines" / f"{_fingerprint(room)}.json"
        if kept.exists():
            found[room] = baseline_from(json.loads(kept.read_text()))
        else:
            jobs[pool.submit(baseline, room)] = room, kept
    for job in as_completed(jobs):
        room, kept = jobs[job]
        found[room] = job.result()
        print(f"{sum(found[room].seconds.values()):6.1f} s  {' '.join(room)}", flush=True)
        for test in found[room].failed:
            print(f"fails although nothing is broken, and is left out: {test}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found[room]._asdict()))
    return found


def _fingerprint(room: tuple[str, ...]) -> str:
    """Changes with the package, the helpers and the tests of a room."""
    places = (ROOT / path for path in ("salnb", "tests/helpers", *room))
    files = sorted(
        {file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))}
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _collect(running: dict[Future, str], session: Session) -> None:
    for job in wait(running, return_when=FIRST_COMPLETED).done:
        name = running.pop(job)
        outcome, seconds, output = job.result()
        session.write(name, outcome, output)
        mutant = session.mutants[name]
        print(f"{seconds:6.1f} s  {outcome:9}  {mutant.module}:{mutant.start[0]}  {mutant.kind}", flush=True)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description="Attack the tests.")
    parser.add_argument("--minutes", type=float, default=30, help="when to stop; the next run goes on")
    parser.add_argument("--sample", type=int, default=200, help="number of mutants in all modules together")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--modules", nargs="*", default=list(ROOMS), help="patterns of paths")
    parser.add_argument("--again", action="store_true", help="run what survived once more, after new tests")
    options = parser.parse_args()
    sources = {module: (ROOT / module).read_text() for module in modules(options.modules)}
    texts = draw(sources, options.sample, options.seed)
    mutants = {key(mutant, sources[mutant.module]): mutant for mutant in texts}
    session = Session(OUT / "session.sqlite", mutants)
    try:
        run(texts, session, options.minutes, options.again)
    except KeyboardInterrupt:
        print("stopped; the next run goes on from here")
    text = report(findings(mutants, sources, texts, session.outcomes()))
    (OUT / "report.md").write_text(text)
    print(text.split("\n## ")[0] + f"see {OUT / 'report.md'}")


if __name__ == "__main__":
    main()
