"""Which tables a phone stacks, and what the build writes into them for that."""

import importlib.util
from pathlib import Path

import pytest

bs4 = pytest.importorskip("bs4")
pd = pytest.importorskip("pandas")
pytest.importorskip("sphinx")

PATH = Path(__file__).resolve().parents[2] / "book" / "extensions" / "narrow_tables.py"


@pytest.fixture(scope="module")
def narrow_tables():
    spec = importlib.util.spec_from_file_location("narrow_tables", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.narrow_tables


def test_a_table_that_fits_stays_as_it_is(narrow_tables):
    page = "<p>a</p>" + pd.DataFrame({"a": [1, 2], "b": [3, 4]}).to_html() + "<p>z</p>"
    assert narrow_tables(page) == page


@pytest.mark.parametrize("index", [True, False])
def test_each_cell_of_a_wide_table_names_its_column(narrow_tables, index):
    names = [f"column {letter * 12}" for letter in "abcdef"]
    frame = pd.DataFrame([range(6), range(6)], columns=names)
    page = bs4.BeautifulSoup("<p>a</p>" + narrow_tables(frame.to_html(index=index)), "html.parser")
    assert page.table["class"] == ["dataframe", "stacked"]
    for row in page.select("tbody tr"):
        heading, *cells = row.select("th, td")
        assert heading["role"] == "rowheader"
        assert [cell["data-label"] for cell in cells] == (names if index else names[1:])
        assert {cell["role"] for cell in cells} == {"cell"}
    assert {cell["role"] for cell in page.select("thead th")} == {"columnheader"}


def test_a_table_with_cells_over_several_columns_stays_as_it_is(narrow_tables):
    frame = pd.DataFrame(
        [range(6)], columns=pd.MultiIndex.from_product([["one" * 9, "two" * 9], list("abc")])
    )
    assert narrow_tables(frame.to_html()) == frame.to_html()


def test_names_in_code_may_part_at_their_joints_and_lose_nothing(narrow_tables):
    name = "salnb.double_backward.use_fused_batch_norm(enabled=True)"
    table = "<table><thead><tr><th>what</th><th>function</th></tr></thead><tbody><tr><td>a.b_c</td><td><code>"
    table = bs4.BeautifulSoup(narrow_tables(f"{table}{name}</code></td></tr></tbody></table>"), "html.parser")
    assert table.code.get_text() == name
    assert [str(part) for part in table.code.contents[:4]] == ["salnb.", "<wbr/>", "double_", "<wbr/>"]
    assert table.select("tbody td")[0].contents == ["a.b_c"]
