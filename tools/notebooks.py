"""Run the chapters with papermill, and check the rules that every committed notebook keeps.

python -m tools.notebooks execute notebooks/01-….ipynb --to _build/source/notebooks/01-….ipynb
python -m tools.notebooks execute notebooks/12-….ipynb --to … --parameters notebooks/scales/smoke.yml
python -m tools.notebooks lint notebooks/*.ipynb
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat

from tools import reads

LARGEST = 1_500_000  # bytes of a committed notebook
WIDEST = 76  # characters of a line of code that a page does not clip; also in notebooks/ruff.toml
_DIRECTIVE = re.compile(r"^\s*(```|:::)\{|\{[a-z-]+\}`", re.MULTILINE)
_MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|content)/\w+")


def execute(notebook: Path, to: Path, parameters: Path | None = None, depfile: Path | None = None) -> None:
    """Run `notebook` and write it with its outputs to `to`, which is replaced only if every cell succeeded.

    What differs between two runs that computed the same thing (timestamps, durations, the interpreter's
    version) is left out, so that the same results give the same file. What the run read of this tree goes
    to `depfile`, as a makefile.
    """
    import papermill
    import yaml

    values = yaml.safe_load(parameters.read_text()) if parameters else {}
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        raw = Path(folder) / notebook.name
        with reads.watched() as read:
            papermill.execute_notebook(
                str(notebook),
                str(raw),
                parameters=values,
                cwd=str(notebook.parent),
                progress_bar=False,
                request_save_on_cell_execute=False,
                coalesce_streams=True,  # how a slow cell's lines were sent depends on the run
            )
        if depfile:
            depfile.parent.mkdir(parents=True, exist_ok=True)
            whole = raw.with_suffix(".d")
            whole.write_text(reads.rule(str(to), read))
            os.replace(whole, depfile)
        clean = raw.with_suffix(".clean")  # written last: make compares its time with the depfile's
        nbformat.write(without_run_data(nbformat.read(raw, as_version=4)), clean)
        os.replace(clean, to)


def without_run_data(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what papermill and the kernel add to each run."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill adds an empty list
    return notebook


def problems(path: Path) -> list[str]:
    """What the notebook at `path` does against the rules, one sentence each."""
    notebook = nbformat.read(path, as_version=4)
    found = []
    if path.stat().st_size > LARGEST:
        found.append(f"is larger than {LARGEST / 1e6} MB")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not executed from top to bottom")
    if sum("parameters" in cell.metadata.get("tags", []) for cell in code) != 1:
        found.append("must have one cell with the tag 'parameters'")
    setup = next((cell for cell in code), None)
    if setup is None or "hide-input" not in setup.metadata.get("tags", []) or "find_spec" not in setup.source:
        found.append("must begin with a folded set-up cell that installs salnb where it is missing")
    for cell in notebook.cells:
        found += [f"cell {cell.id!r} {sentence}" for sentence in _cell_problems(cell)]
    return found


def _cell_problems(cell: nbformat.NotebookNode) -> list[str]:
    found = []
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", cell.id):
        found.append("needs an id that can be read")
    if cell.cell_type == "markdown" and _DIRECTIVE.search(cell.source):
        found.append("has a directive or role, which Colab does not render")
    if cell.cell_type == "code" and (wide := [ln for ln in cell.source.splitlines() if len(ln) > WIDEST]):
        found.append(f"has a line of {max(map(len, wide))} characters, at most {WIDEST}: wrap it")
    outputs = cell.get("outputs", [])
    found += [sentence for output in outputs for sentence in _output_problems(output)]
    if any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})):
        mystnb = cell.metadata.get("mystnb", {})
        if not mystnb.get("figure", {}).get("caption") or not mystnb.get("image", {}).get("alt"):
            found.append("shows a picture without a caption or without alt text")
    return found


def _output_problems(output: nbformat.NotebookNode) -> list[str]:
    data = output.get("data", {})
    text = output.get("text", "") + "".join(data.get("text/plain", ""))
    faults = {
        "holds an error": output.output_type == "error",
        "writes to stderr": output.get("name") == "stderr",
        "holds a widget": any("widget" in kind for kind in data),
        "shows a path of the machine it ran on": _MACHINE_PATH.search(text),
    }
    return [sentence for sentence, there in faults.items() if there]


def main() -> int:
    """Run the command line; 1 if a notebook breaks a rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("execute", help="run one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("--to", type=Path, required=True, help="where the notebook with its outputs goes")
    run.add_argument("--parameters", type=Path, help="a YAML file of papermill parameters")
    run.add_argument("--depfile", type=Path, help="where what it read goes, for make")
    check = commands.add_parser("lint", help="check committed notebooks")
    check.add_argument("notebooks", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "execute":
        execute(arguments.notebook, arguments.to, arguments.parameters, arguments.depfile)
        return 0
    broken = [f"{path}: {sentence}" for path in arguments.notebooks for sentence in problems(path)]
    print("\n".join(broken) or f"{len(arguments.notebooks)} notebooks keep the rules")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
