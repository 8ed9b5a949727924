"""Tables that a narrow window has no room for: each row becomes a block there, as `salnb.css` has it.

The first cell of a row is its heading, and each other cell says in its attribute `data-label` which column
it stands in. As `display: block` takes the meaning of a table's elements away from screen readers, their
roles are written out.
"""

import re
from typing import Any

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx

_TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
# in characters: what a phone shows beside each other, of which each column's padding takes some
_ROOM, _PADDING = 50, 1.6
_JOINT = re.compile(r"(?<=[\w)\]][._/=(,])(?=\w)")  # in a name of code, which may part there


def narrow_tables(body: str) -> str:
    """The page's HTML with its wide tables ready to be stacked.

    >>> table = "<table><thead><tr><th>arm</th><th>{0}</th></tr></thead>"
    >>> table += "<tbody><tr><td>{0}</td><td>1</td></tr></tbody></table>"
    >>> narrow_tables(table.format("short")) == table.format("short")
    True
    >>> narrow_tables(table.format("x" * 40)).count('<td data-label="xxx')
    1
    """
    return _TABLE.sub(lambda found: _stackable(found[0]), body)


def _stackable(html: str) -> str:
    soup = BeautifulSoup(html, "html.parser")
    heads, rows = (_rows(soup, part) for part in ("thead", "tbody"))
    regular = len(heads) == 1 and {len(row) for row in rows} == {len(heads[0])}
    if not regular or soup.select("[rowspan], [colspan]") or _narrowest(heads + rows) <= _ROOM:
        return html
    for tag, role in (("table", "table"), ("thead", "rowgroup"), ("tbody", "rowgroup"), ("tr", "row")):
        for part in soup.select(tag):
            part["role"] = role
    for table in soup.select("table"):
        table["class"] = " ".join([*filter(None, table.get_attribute_list("class")), "stacked"])
    for name in heads[0]:
        name["role"] = "columnheader"
    for heading, *cells in rows:
        heading["role"] = "rowheader"
        for name, cell in zip(heads[0][1:], cells, strict=True):
            cell["role"] = "cell"
            cell["data-label"] = _text(name)
    for text in soup.find_all(string=_JOINT):
        if text.find_parent("code"):
            first, *others = _JOINT.split(text)
            text.replace_with(first, *(part for other in others for part in (soup.new_tag("wbr"), other)))
    return str(soup)


def _rows(table: Tag, part: str) -> list[list[Tag]]:
    return [list(row.select("th, td")) for row in table.select(f"{part} > tr")]


def _narrowest(rows: list[list[Tag]]) -> float:
    """How many characters wide the table is with no word parted."""
    words = ([max(map(len, _text(cell).split()), default=0) for cell in row] for row in rows)
    return sum(max(column) + _PADDING for column in zip(*words, strict=True))


def _text(cell: Tag) -> str:
    return " ".join(cell.get_text().split())


def mend(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Make the page's tables fit a narrow window."""
    if "body" in context:
        context["body"] = narrow_tables(context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
