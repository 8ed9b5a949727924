"""Assemble the book's sources beside the executed chapters, and build the site from them.

python -m tools.site

Expects the executed chapters in `_build/source/notebooks`; writes `_build/html`.
"""

import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import nbformat

from tools.notebooks import problems

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "_build" / "source"
HTML = ROOT / "_build" / "html"
_BORROWED = re.compile(r"figures/([\w-]+)/([\w-]+)\.jpeg")


def assemble() -> None:
    """Copy prose and configuration to `_build/source` and drop chapters that no longer exist.

    Folders among the chapters are what runs left that were killed.
    """
    for name in ("_config.yml", "_toc.yml", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, SOURCE / name)
    shutil.rmtree(SOURCE / "book", ignore_errors=True)
    shutil.copytree(ROOT / "book", SOURCE / "book", ignore=shutil.ignore_patterns("__pycache__"))
    for executed in (SOURCE / "notebooks").iterdir():
        if executed.is_dir():
            shutil.rmtree(executed)
        elif not (ROOT / "notebooks" / executed.name).exists():
            executed.unlink()
    for page in (SOURCE / "book").glob("*.md"):
        for chapter, cell in _BORROWED.findall(page.read_text()):
            borrow_figure(chapter, cell)


def borrow_figure(chapter: str, cell_id: str) -> None:
    """Put the picture that a chapter's cell drew where prose pages show it, as `figures/CHAPTER/CELL.jpeg`.

    Raises:
        LookupError: the chapter has no such cell, or the cell drew nothing.
    """
    notebook = nbformat.read(SOURCE / "notebooks" / f"{chapter}.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if cell.id == cell_id and "image/jpeg" in output.get("data", {}):
                picture = SOURCE / "book" / "figures" / chapter / f"{cell_id}.jpeg"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(b64decode(output.data["image/jpeg"]))
                return
    raise LookupError(f"cell {cell_id!r} of chapter {chapter!r} shows no picture")


def build() -> int:
    """Build the site; the exit status of the build, 1 if a chapter in it was not executed."""
    chapters = sorted((SOURCE / "notebooks").glob("*.ipynb"))
    expected = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    broken = [f"{path.name}: {sentence}" for path in chapters for sentence in problems(path)]
    broken += [f"{name}: was not executed" for name in sorted(expected - {path.name for path in chapters})]
    if broken:
        print("\n".join(broken))
        return 1
    shutil.rmtree(HTML, ignore_errors=True)  # a failed build must not leave the old site behind
    # warnings are errors (-W), unresolved references are warnings (-n)
    command = [
        "jupyter-book",
        "build",
        str(SOURCE),
        "--path-output",
        str(ROOT),
        "--all",
        "-W",
        "-n",
        "--keep-going",
    ]
    return subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]], check=False
    ).returncode


if __name__ == "__main__":
    assemble()
    sys.exit(build())
