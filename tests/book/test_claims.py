"""What a recap claims was shown: each of its points names the cells that show it.

The names stand in the recap cell's metadata, `shown_by`, a list for each point: ids of cells of the same chapter,
or `CHAPTER#CELL` of another. Whoever changes a point looks at what it names; whoever removes a cell hears of it here.
"""

import re
from pathlib import Path

import nbformat
import pytest

from tests.book.test_notebooks import CHAPTERS, cells, ids

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
_RECAP = re.compile(r"## Recap\n(.*?)(?=\n## |\Z)", re.DOTALL)


def recap(chapter):
    """The cell with the recap, and its points."""
    for cell in cells(chapter):
        if cell.cell_type == "markdown" and (found := _RECAP.search(cell.source)):
            return cell, re.findall(r"^\* (.*)$", found[1], re.MULTILINE)
    raise LookupError(f"{chapter.name} has no recap")


def shows(cell):
    """Whether a cell can show anything: it prints, draws, asserts, or derives something in words."""
    return cell.cell_type == "markdown" or bool(cell.outputs) or "assert" in cell.source


def found(name, chapter):
    """The cell of that name, in this chapter or in the one that it names."""
    path, _, cell_id = name.rpartition("#")
    where = NOTEBOOKS / f"{path}.ipynb" if path else chapter
    return next((c for c in nbformat.read(where, as_version=4).cells if c.id == cell_id), None)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_each_point_of_a_recap_names_what_shows_it(chapter):
    cell, points = recap(chapter)
    named = cell.metadata["shown_by"]
    assert len(named) == len(points), "a list of names for each point"
    for point, names in zip(points, named, strict=True):
        assert names, point
        for name in names:
            shown = found(name, chapter)
            assert shown is not None, f"{name!r} is no cell: {point}"
            assert shows(shown), f"{name!r} shows nothing: {point}"
            assert shown.id != cell.id
