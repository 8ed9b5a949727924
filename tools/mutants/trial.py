"""One mutant: its module broken in a copy of the tree, and the tests run there in a process of their own.

The functions run in a process of the pool, which has loaded what no mutant changes and forks for each mutant:
loading torch takes longer than most of the tests.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.mutants.sample import ROOT

__all__ = ["Baseline", "attempt", "baseline", "prepare"]

COPIED = ("notebooks", "results", "salnb", "tests", "tools")
PRELOADED = (
    *("torch", "torchvision", "torchvision.transforms.v2", "torch.fx.experimental.proxy_tensor"),
    *("torch._dynamo", "torch._functorch.aot_autograd", "pytest", "hypothesis", "coverage"),
    *("lightning.fabric", "yaml", "torchmetrics", "PIL.Image"),
)
# comparisons with other libraries and with the compiler: they repeat what a definition in the same file tests
LEFT_OUT = "not (captum or kornia or pytorch_grad_cam or make_fx or compiles or compiled_is_equal)"
LONGEST = 1800  # seconds that the tests of a room may take

_tree = Path()


class Baseline(NamedTuple):
    """What the tests of a room do while nothing is broken.

    Attributes:
        seconds: of each test that passes, in their order.
        reached: for each module the tests that run a line of it.
        failed: tests that fail, although nothing is broken.
    """

    seconds: dict[str, float]
    reached: dict[str, dict[int, list[str]]]
    failed: list[str]

    def tests(self, module: str, lines: range) -> list[str]:
        """The tests that reach these lines, the fastest first; all where it is at import, or in no test."""
        found = {test for line in lines for test in self.reached.get(module, {}).get(line, [])}
        chosen = self.seconds.keys() if "" in found or not found else found - set(self.failed)
        return sorted(chosen, key=lambda test: self.seconds[test])


def prepare(parent: str) -> None:
    """Make this process ready: a copy of the tree, and everything loaded that no mutant changes."""
    global _tree
    _tree = Path(tempfile.mkdtemp(dir=parent))
    shutil.copy(ROOT / "pyproject.toml", _tree)
    for name in COPIED:
        shutil.copytree(ROOT / name, _tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def attempt(module: str, text: str, tests: Sequence[str], timeout: float) -> tuple[str, float, str]:
    """Run tests with a module's text replaced: the outcome, the seconds it took, the last lines."""
    path = _tree / module
    original = path.read_text()
    try:
        path.write_text(text)
        _forget_bytecode(path)
        outcome, seconds = _in_a_fork(lambda: _pytest(_files(tests), _Only(tests)), timeout)
    finally:
        path.write_text(original)
        _forget_bytecode(path)
    return outcome, seconds, (_tree / "output").read_text(errors="replace")[-1500:]


def baseline(paths: Sequence[str]) -> Baseline:
    """Run all tests of a room; those that fail while nothing is broken can tell nothing, and are left out."""
    written = _tree / "baseline.json"
    written.unlink(missing_ok=True)
    _in_a_fork(lambda: _pytest(paths, _Record()), LONGEST)
    if not written.exists():
        output = (_tree / "output").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(paths)}: the tests do not run\n{output}")
    return baseline_from(json.loads(written.read_text()))


def baseline_from(saved: dict[str, Any]) -> Baseline:
    """A baseline from its JSON."""
    reached = saved["reached"].items()
    numbered = {name: {int(line): tests for line, tests in lines.items()} for name, lines in reached}
    return Baseline(saved["seconds"], numbered, saved["failed"])


def _files(tests: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(test.split("::")[0] for test in tests))


def _forget_bytecode(path: Path) -> None:
    """Python tells sources apart by size and second, which two mutants may share."""
    for old in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        old.unlink()


def _in_a_fork(work: Callable[[], int], timeout: float) -> tuple[str, float]:
    """The outcome of tests in a process group of their own, of which nothing is left; and the seconds."""
    began = time.monotonic()
    (_tree / "exit").unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            (_tree / "exit").write_text(str(work()))
        finally:
            os._exit(0)
    outcome = "timed out"
    while time.monotonic() - began < timeout:
        if os.waitpid(child, os.WNOHANG)[0]:
            passed = (_tree / "exit").exists() and (_tree / "exit").read_text() == "0"
            outcome = "survived" if passed else "noticed"
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if outcome == "timed out":
        os.waitpid(child, 0)
    return outcome, time.monotonic() - began


def _pytest(paths: Sequence[str], plugin: "_Only | _Record") -> int:
    """In the fork: run the tests of the copy, and say how it went as pytest does."""
    file = os.open(_tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(_tree)
    sys.path.insert(0, str(_tree))
    os.environ["PYTHONPATH"] = str(_tree)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of nbval and xdist load for seconds
    for name in [name for name in sys.modules if name.split(".")[0] in ("salnb", "tests", "tools")]:
        del sys.modules[name]
    import hypothesis
    import pytest
    import torch

    torch.set_num_threads(1)
    # an example that fails is enough: no search for the smallest one, and the same examples in each run
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    stop = ["-x"] if isinstance(plugin, _Only) else []
    options = [*stop, "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", LEFT_OUT, "--tb=short"]
    with plugin:
        code = int(pytest.main([*options, *paths], plugins=[plugin]))
    if not str(getattr(sys.modules.get("salnb"), "__file__", _tree)).startswith(str(_tree)):
        raise RuntimeError("the tests did not run in the copy of the tree")
    return code


class _Only(contextlib.nullcontext):
    """Runs the given tests only, in their order as far as files allow."""

    def __init__(self, tests: Sequence[str]) -> None:
        super().__init__()
        self.rank = {test: i for i, test in enumerate(tests)}
        self.files = {file: i for i, file in enumerate(_files(tests))}

    def pytest_collection_modifyitems(self, items: list) -> None:
        """See pytest."""
        kept = [item for item in items if item.nodeid in self.rank]
        file = {item: self.files[item.nodeid.split("::")[0]] for item in kept}
        items[:] = sorted(kept, key=lambda item: (file[item], self.rank[item.nodeid]))


class _Record:
    """Writes down how long each test takes and which lines of the package it reaches.

    A fixture that several tests share runs within the first of them: its lines are reached by all of them.
    """

    def __init__(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, include=[f"{_tree}/salnb/*"])
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.shared: dict[str, list[str]] = {}

    def __enter__(self) -> None:
        self.coverage.start()

    def __exit__(self, *_: object) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        reached = {
            str(Path(file).relative_to(_tree)): {
                line: [test for context in contexts for test in self.shared.get(context, [context])]
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        passed = {test: seconds for test, seconds in self.seconds.items() if test not in self.failed}
        found = {"seconds": passed, "reached": reached, "failed": sorted(self.failed)}
        (_tree / "baseline.json").write_text(json.dumps(found))

    def pytest_runtest_protocol(self, item: Any) -> None:
        """See pytest."""
        self.seconds[item.nodeid] = 0.0
        for name in getattr(item, "fixturenames", ()):
            self.shared.setdefault(f"fixture {name}", []).append(item.nodeid)
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See pytest."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> None:
        """See pytest."""
        if fixturedef.scope != "function":
            self.coverage.switch_context(f"fixture {fixturedef.argname}")

    def pytest_runtest_call(self, item: Any) -> None:
        """See pytest."""
        self.coverage.switch_context(item.nodeid)
