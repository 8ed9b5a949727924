"""What a chapter reads of this tree, seen while it runs and written down for make.

As compilers do it: what a run reads is what the next run depends on, and a first run needs no such file.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import source_from_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# folders of data: which files there are decides what a chapter shows
DATA = ("results", "notebooks/scales")
_PLAIN = re.compile(r"[\w./+=@,-]+", re.ASCII)  # what make reads as nothing but a name


@dataclass
class Reads:
    """The files of a tree that were read, and its folders of data that were listed, as relative paths."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)


@contextmanager
def watched(tree: Path = ROOT) -> Iterator[Reads]:
    """What the Python processes that are started meanwhile read of `tree`; known when they have ended."""
    reads, tree = Reads(), tree.resolve()
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder).resolve() / "notes"
        path = filter(None, [str(ROOT / "tools" / "watch"), os.environ.get("PYTHONPATH")])
        ours = {
            "PYTHONPATH": os.pathsep.join(path),
            "SALNB_READS_TREE": str(tree),
            "SALNB_READS_NOTES": str(notes),
        }
        before = {name: os.environ.pop(name, None) for name in ours}
        os.environ.update(ours)
        try:
            yield reads
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value
        for line in notes.read_text().splitlines() if notes.exists() else ():
            kind, _, noted = line.partition("\t")
            read = _name_in(tree, Path(noted))
            if read and kind == "file":
                reads.files.add(read)
            elif read and any(f"{read}/".startswith(f"{data}/") for data in DATA):
                reads.folders.add(read)


def _name_in(tree: Path, path: Path) -> str | None:
    """The name of a source in the tree; None for what is elsewhere, gone, installed or built."""
    if path.parent.name == "__pycache__":
        path = Path(source_from_cache(str(path)))
    if not path.is_relative_to(tree) or not path.exists():
        return None
    name = path.relative_to(tree).as_posix()
    return None if name.startswith((".", "_")) else name


def rule(target: str, reads: Reads, tree: Path = ROOT) -> str:
    """A makefile: `target` is out of date when a file that it read is newer or gone, or a listing differs.

    Raises:
        ValueError: a name that make would not read as one.
    """
    lines = [f"read := {_names(reads.files)}", f"{target}: $(read)"]
    if reads.files:
        lines.append("$(read):")  # no rule makes them: one that is gone is no error
    for folder in sorted(reads.folders):
        # a search for */NAME/* looks for NAME without listing
        patterns = [f"{folder}/*", f"{folder}/*/*/"]
        found = {path.relative_to(tree).as_posix() for path in tree.glob(f"{folder}/[!.]*")}
        found |= {
            f"{path.relative_to(tree).as_posix()}/"
            for path in tree.glob(f"{folder}/[!.]*/[!.]*")
            if path.is_dir()
        }
        listing = f"$(sort $(wildcard {' '.join(patterns)}))"
        lines += [f'ifneq "{listing}" "{_names(found)}"', f"{target}: listing", "endif"]
    return "\n".join(lines) + "\n"


def _names(names: set[str]) -> str:
    if odd := [name for name in names if not _PLAIN.fullmatch(name)]:
        raise ValueError(f"make needs names of letters, digits and ./+=@,- alone, got {min(odd)!r}")
    return " ".join(sorted(names))
