"""Sources, figures and equations that the text names: they exist, and none is listed for nothing."""

import re
from pathlib import Path

import pytest

from tests.book.test_notebooks import CHAPTERS, cells, ids

ROOT = Path(__file__).resolve().parents[2]
BOOK = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book").glob("*.md"))}
BIB = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^@\w+\{(\w+),(.*?)(?=^@|\Z)", BIB, re.MULTILINE | re.DOTALL)
# older works whose publishers gave them neither
WITHOUT_ADDRESS = {
    "krizhevsky2009learning",
    "netzer2011reading",
    "deng2009imagenet",
    "lecun1998gradient",
    "bouthillier2021variance",
    "geirhos2020shortcut",
}


def markdown(chapter):
    return "\n\n".join(cell.source for cell in cells(chapter) if cell.cell_type == "markdown")


TEXTS = {chapter.name: markdown(chapter) for chapter in CHAPTERS} | {p.name: t for p, t in BOOK.items()}
FIGURES = {
    cell.metadata["mystnb"]["figure"]["name"]: f"{int(chapter.stem[:2])}.{number}"
    for chapter in CHAPTERS
    for number, cell in enumerate(
        (c for c in cells(chapter) if c.metadata.get("mystnb", {}).get("figure")), start=1
    )
}


def cited(text):
    roles = ",".join(re.findall(r"\{cite(?::[tp])?\}`([^`]+)`", text)).split(",")
    return {*roles, *re.findall(r"references\.md#(\w+)", text)} - {""}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_cited_is_listed(name):
    assert cited(TEXTS[name]) - {key for key, _ in ENTRIES} == set()


@pytest.mark.parametrize("key", [key for key, _ in ENTRIES])
def test_what_is_listed_is_cited(key):
    assert any(key in cited(text) for text in TEXTS.values())


@pytest.mark.parametrize(("key", "fields"), ENTRIES, ids=[key for key, _ in ENTRIES])
def test_an_entry_says_where_to_find_it(key, fields):
    assert re.search(r"^\s*(url|doi) = \{", fields, re.MULTILINE) or key in WITHOUT_ADDRESS


def test_letters_with_accents_are_written_as_such():
    """A label shows the commands of LaTeX as they are."""
    assert "{\\" not in BIB


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_a_source_is_named_as_it_is_listed(chapter):
    """Authors and year in the link's text, so that a reader on Colab knows which one is meant."""
    years = {key: re.search(r"year = \{(\d+)\}", fields)[1] for key, fields in ENTRIES}
    links = re.findall(r"\[([^\]]*)\]\(\.\./book/references\.md#(\w+)\)", markdown(chapter))
    assert [text for text, key in links if not text.endswith(f", {years[key]}")] == []
    assert "references.md)" not in markdown(chapter), "a link to the list instead of an entry"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_a_figure_is_named_by_its_number(chapter):
    links = re.findall(r"\[([^\]]*)\]\((?:[\w-]+\.ipynb)?#(fig-[\w-]+)\)", markdown(chapter))
    assert [name for _, name in links if name not in FIGURES] == []
    numbered = [(text, name) for text, name in links if text.startswith("Fig. ")]
    assert [(text, name) for text, name in numbered if text != f"Fig. {FIGURES[name]}"] == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_the_paper_says_so_as_strongly(chapter):
    """ "In almost all cases" is what the paper says of Table 1, and of no other."""
    sentences = re.split(r"(?<=[.:)])\s", markdown(chapter))
    claims = [sentence for sentence in sentences if "almost all cases" in sentence.lower()]
    assert all("Table 1" in sentence or chapter.stem.startswith("12") for sentence in claims)
