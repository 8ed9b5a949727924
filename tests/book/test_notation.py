"""The table of `book/notation.md`, equation → function, against the source; one spelling of equations."""

import inspect
import io
import pkgutil
import re
import textwrap
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTATION = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| eq\. (\d+) \| `([\w.]+)` \|$", NOTATION, re.MULTILINE)


def test_the_table_has_every_equation_once():
    assert [int(number) for number, _ in TABLE] == list(range(1, 9))
    assert set(re.findall(r"\\text\{\((\d)\)\}", NOTATION)) == {number for number, _ in TABLE}


@pytest.mark.parametrize(("number", "name"), TABLE)
def test_the_function_has_the_equation_on_a_line(number, name):
    """As a comment behind code: the docstring alone would not say where."""
    source = inspect.getsource(pkgutil.resolve_name(name))
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline)
        if token.type == tokenize.COMMENT and token.line.split("#")[0].strip()
    ]
    assert any(re.search(rf"\beq\. {number}\b", comment) for comment in comments)


def test_the_backward_pass_of_relu_has_three_rules():
    source = inspect.getsource(pkgutil.resolve_name(dict(TABLE)["4"]))
    assert re.findall(r"# eq\. 4, (\w+):", source) == ["gradient", "DeconvNet", "guided"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "salnb").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_equations_have_one_spelling(path):
    mentions = re.findall(r"\beq(?:s|n|uations?)?\b\.?\s*\(?\d", path.read_text("utf-8"), re.IGNORECASE)
    assert [mention for mention in mentions if not re.fullmatch(r"eq\. \d", mention)] == []
