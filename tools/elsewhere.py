"""Run every chapter where this tree is not: in an empty folder, with the environment that runs this file.

.venv-colab/bin/python -P tools/elsewhere.py notebooks/*.ipynb --outputs _build/colab

Needs papermill and an installed `salnb`; imports nothing of the tree. The folder of outputs shows how far a
chapter got.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent


def run(notebook: Path, output: Path) -> str | None:
    """Run a chapter in an empty folder of its own; its last words if it failed."""
    begin = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
        ended = subprocess.run(
            [*command, str(notebook), str(output)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    failed = ended.returncode != 0
    seconds = time.monotonic() - begin
    print("failed" if failed else "passed", f"{notebook.stem}: {seconds:.0f} s", flush=True)
    return ended.stderr[-3000:] or "it said nothing" if failed else None


def main() -> int:
    """Run the command line; 1 if a chapter failed or the package comes from the tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    package = find_spec("salnb")
    if package is None or Path(package.origin or "").resolve().parent == TREE / "salnb":
        print("salnb must be installed here, from a wheel")
        return 1
    print(*(f"{name} {version(name)}" for name in ("salnb", "torch", "torchvision")), sep=", ", flush=True)
    arguments.outputs.mkdir(parents=True, exist_ok=True)
    outputs = [(arguments.outputs / path.name).resolve() for path in arguments.notebooks]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        ends = list(pool.map(run, [path.resolve() for path in arguments.notebooks], outputs))
    failed = [(path.stem, words) for path, words in zip(arguments.notebooks, ends, strict=True) if words]
    for name, words in failed:
        print(f"\n{name}:\n{words}")
    print(f"{len(ends) - len(failed)} passed, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
