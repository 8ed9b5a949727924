"""Links for the reader of the site, from the plain Markdown that the chapters are written in.

In a chapter a figure is `[Fig. 1.1](#fig-name)`, a source `[Nie et al., 2018](../book/references.md#key)` and
an equation of the paper "eq. 7". The site numbers figures itself, so that a number cannot go stale, leads
from a source to its entry and back, and from an equation to the place where it stands.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx.application import Sphinx

EQUATIONS = "book/notation"  # has all of them
_FIGURE = re.compile(r"\[([^\]]+)\]\((?:[\w./-]*)#(fig-[\w-]+)\)")
_NUMBERED = re.compile(r"Fig\. \d+\.\d+")
_IN_BRACKETS = re.compile(r"\(\[[^\]]+\]\([./]*(?:book/)?references\.md#(\w+)\)\)")
_SOURCE = re.compile(r"\[[^\]]+\]\([./]*(?:book/)?references\.md#(\w+)\)")
_EQUATION = re.compile(r"\b([Ee]q\. )([1-8])\b(?!\.\d)")
_SHOWN_EQUATION = re.compile(r"\\(?:tag|text)\{\(?(\d)\b")
_CHAPTER = re.compile(r"(\d\d)-[\w-]+\.html")


def with_roles(markdown: str) -> str:
    """The text with the site's roles in place of links to figures and sources.

    >>> with_roles("In [Fig. 1.2](#fig-a) and [here](02-b.ipynb#fig-c)")
    'In {numref}`Fig. %s <fig-a>` and {ref}`here <fig-c>`'
    >>> with_roles("as [Wu, 2020](../book/references.md#wu) says ([Li, 2021](../book/references.md#li))")
    'as {cite:t}`wu` says {cite:p}`li`'
    """

    def figure(found: re.Match[str]) -> str:
        text, name = found.groups()
        return f"{{numref}}`Fig. %s <{name}>`" if _NUMBERED.fullmatch(text) else f"{{ref}}`{text} <{name}>`"

    markdown = _FIGURE.sub(figure, markdown)
    return _SOURCE.sub(r"{cite:t}`\1`", _IN_BRACKETS.sub(r"{cite:p}`\1`", markdown))


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Put roles into a page before it is parsed."""
    if not page.startswith("notebooks/"):
        source[0] = with_roles(source[0])
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_roles("".join(cell["source"]))
    source[0] = json.dumps(notebook)


def link_equations(app: Sphinx, document: nodes.document) -> None:
    """Give each equation of the paper an anchor, and lead its mentions there."""
    page, here = app.env.docname, set()
    for block in document.findall(nodes.math_block):
        for number in _SHOWN_EQUATION.findall(block.astext()):
            if number not in here:
                here.add(number)
                block["ids"].append(f"eq-{number}")
    for text in list(document.findall(nodes.Text)):
        if _EQUATION.search(text) and not _is_fixed(text):
            text.parent.replace(text, list(_pieces(app, page, here, text.astext())))


def _is_fixed(text: nodes.Text) -> bool:
    """Code, formulas, headings and links stay as they are."""
    parent = text.parent
    while parent is not None:
        if isinstance(
            parent, nodes.FixedTextElement | nodes.literal | nodes.math | nodes.title | nodes.reference
        ):
            return True
        if isinstance(parent, nodes.raw | nodes.image) or parent.tagname in (
            "pending_xref",
            "desc_signature",
        ):
            return True
        parent = parent.parent
    return False


def _pieces(app: Sphinx, page: str, here: set[str], text: str) -> Iterable[nodes.Node]:
    end = 0
    for found in _EQUATION.finditer(text):
        if found.start() > end:
            yield nodes.Text(text[end : found.start()])
        number = found[2]
        to = "" if number in here else app.builder.get_relative_uri(page, EQUATIONS)
        yield nodes.reference("", found[0], internal=True, refuri=f"{to}#eq-{number}")
        end = found.end()
    if end < len(text):
        yield nodes.Text(text[end:])


def name_chapters(app: Sphinx, document: nodes.document, page: str) -> None:
    """A link to a chapter says its number and title when it is pointed at."""
    for link in document.findall(nodes.reference):
        if found := _CHAPTER.search(link.get("refuri", "")):
            (name,) = (name for name in app.env.titles if name.startswith(f"notebooks/{found[1]}-"))
            link["reftitle"] = f"Chapter {int(found[1])}: {app.env.titles[name].astext()}"


class AuthorYearLabels(BaseLabelStyle):  # type: ignore[misc]
    """The names of an entry's authors and its year, as in the text."""

    def format_labels(self, entries: Iterable[Any]) -> Iterable[str]:
        """The label of each entry."""
        for entry in entries:
            names = [" ".join(person.last_names) for person in entry.persons["author"]]
            several = f"{names[0]} et al." if len(names) > 2 or "others" in names else " and ".join(names)
            yield f"{several}, {entry.fields['year']}"


class Style(PlainStyle):  # type: ignore[misc]
    """Plain entries, with these labels."""

    default_label_style = AuthorYearLabels


register_plugin("pybtex.style.formatting", "salnb", Style)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", read_source)
    app.connect("doctree-read", link_equations)
    app.connect("doctree-resolved", name_chapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
