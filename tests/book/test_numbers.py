"""Every number in prose that could be a measurement is computed: none is written by hand.

Looked at is the Markdown of the chapters of experiments and of the pages of the book. What a cell computes and
displays is an output, and is not looked at; neither are code, mathematics and the targets of links.
"""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("05", "12", "13", "14", "15", "16")
PAGES = [
    *(path for n in EXPERIMENTS for path in sorted((ROOT / "notebooks").glob(f"{n}-*.ipynb"))),
    *sorted((ROOT / "book").glob("*.md")),
]

# numbers that may stand in prose, with the reason: none of them was measured
ALLOWED = {
    "95 %": "confidence level of all intervals",
    "3.11": "of Python, which the package needs",
    "11 GB": "of disk to keep free for an installation, a recommendation",
}

_NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`"  # code
    r"|\$\$.*?\$\$|\$[^$]*\$"  # mathematics
    r"|\]\([^)]*\)|https?://\S+|<[^>]*>"  # links
    r"|\*\*\d+\. "  # the numbers of exercises
    r"|\b(?:Fig|Sec)\. \d+\.\d+",  # the numbers of figures and of the paper's sections
    re.DOTALL,
)
_UNITS = r"%|×|times\b|percent|points?\b|ms\b|s\b|sec\w*|min(?:utes?)?\b|h\b|hours?|days?|weeks?|[kKMGT]i?B\b|[GTP]FLOPs?\b"
_MEASUREMENT = re.compile(rf"(?<![\w.])(\d[\d,]*\.\d+|\d[\d,]*(?:\.\d+)?[ \u00a0]?(?:{_UNITS}))(?![\d×])")


def measurements(text):
    """What could be one, and is not allowed."""
    prose = _NOT_PROSE.sub(" ", text)
    found = [number.replace("\u00a0", " ") for number in _MEASUREMENT.findall(prose)]
    return [number for number in found if number not in ALLOWED]


def prose_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_no_number_in_prose_is_written_by_hand(page):
    assert measurements(prose_of(page)) == []


@pytest.mark.parametrize("number", ALLOWED)
def test_what_is_allowed_is_used(number):
    assert any(number in prose_of(page).replace("\u00a0", " ") for page in PAGES)


WRITTEN = {
    "an accuracy": ("reaches 85.7 % here", ["85.7"]),
    "a share": ("it rose to 0.23, then fell", ["0.23"]),
    "whole percents": ("in 85 % of all cases, 12% of which", ["85 %", "12%"]),
    "points": ("costs 12 points, or 3 percent", ["12 points", "3 percent"]),
    "a factor": ("2 × as slow, 3 times as long", ["2 ×", "3 times"]),
    "durations": ("152 ms, 20 s, 3 minutes and 2 hours", ["152 ms", "20 s", "3 minutes", "2 hours"]),
    "thousands": ("1,176.71 each", ["1,176.71"]),
    "sizes": ("170 MB of disk", ["170 MB"]),
    "plain counts and sizes of images": (
        "five seeds, 1,000 classes, 224×224, chapter 11, Table 2, eq. 8",
        [],
    ),
    "code, mathematics and links": (
        "`lr=0.05`, $\\tfrac{1}{2} = 0.5$, [here](a-1.5.md)\n```\n0.5 s\n```",
        [],
    ),
    "an exercise": ("**1. A ramp.** Grow", []),
    "a figure and a section": ("as in [Fig. 5.3](#fig-x) and in Sec. 3.1", []),
    "the confidence level": ("its 95 % interval", []),
}


@pytest.mark.parametrize(("text", "found"), WRITTEN.values(), ids=WRITTEN)
def test_numbers_are_found(text, found):
    """The test above notices what it is there for."""
    assert [number.replace("%", " %").replace("  ", " ") for number in measurements(text)] == [
        number.replace("%", " %").replace("  ", " ") for number in found
    ]
