"""The chapters as they are committed, and the tool that runs them."""

import ast
import tomllib
from pathlib import Path

import nbformat
import pytest

from tools.notebooks import WIDEST, execute, problems

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def ids(paths):
    return [path.stem for path in paths]


def cells(path):
    return nbformat.read(path, as_version=4).cells


def parameters_cell(path):
    return next(cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", []))


def assigned_names(source):
    return {
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_chapter_keeps_the_rules(chapter):
    assert problems(chapter) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_every_parameter_is_read(chapter):
    """Papermill sets a parameter that nothing reads without a word."""
    parameters = parameters_cell(chapter)
    read = {
        node.id
        for cell in cells(chapter)
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert assigned_names(parameters.source) - read == set()


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_chapter_has_its_parts(chapter):
    prose = [cell.source for cell in cells(chapter) if cell.cell_type == "markdown"]
    assert prose[0].startswith("# ")
    assert "you will be able to" in prose[0]
    headings = [line for text in prose for line in text.splitlines() if line.startswith("#")]
    for part in ("Recap", "Exercise", "Further reading"):
        assert any(part in heading for heading in headings), part
    folded = [c for c in cells(chapter) if {"hide-input", "hide-cell"} & set(c.metadata.get("tags", []))]
    assert len(folded) >= 3, "set-up and two solutions"


def test_the_formatter_wraps_where_the_page_clips():
    settings = tomllib.loads((ROOT / "notebooks" / "ruff.toml").read_text())
    assert settings["line-length"] == WIDEST


def tiny(tmp_path, source):
    """A notebook that keeps the rules, with one cell of `source`."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("find_spec = 1", id="setup", metadata={"tags": ["hide-input"]}),
            nbformat.v4.new_code_cell("n = 1", id="parameters", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(source, id="work"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    path = tmp_path / "tiny.ipynb"
    nbformat.write(notebook, path)
    return path


def test_two_runs_give_the_same_file(tmp_path):
    path = tiny(tmp_path, "print(n)")
    for name in ("a", "b"):
        execute(path, tmp_path / name / path.name)
    first, second = ((tmp_path / name / path.name).read_bytes() for name in ("a", "b"))
    assert first == second
    assert problems(tmp_path / "a" / path.name) == []


def test_parameters_arrive(tmp_path):
    path = tiny(tmp_path, "print(n)")
    (tmp_path / "scale.yml").write_text("n: 41\n")
    execute(path, tmp_path / "out.ipynb", tmp_path / "scale.yml")
    assert cells(tmp_path / "out.ipynb")[-1].outputs[0].text == "41\n"


def test_a_failed_run_leaves_the_last_good_one(tmp_path):
    path, good = tiny(tmp_path, "print(n)"), tmp_path / "out.ipynb"
    execute(path, good)
    before = good.read_bytes()
    with pytest.raises(Exception, match="division by zero"):
        execute(tiny(tmp_path, "1 / 0"), good)
    assert good.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.ipynb", "tiny.ipynb"]


BROKEN = {
    "a directive": lambda nb: nb.cells.append(nbformat.v4.new_markdown_cell("{numref}`x`", id="prose")),
    "not executed": lambda nb: nb.cells[2].update(execution_count=None),
    "an unreadable id": lambda nb: nb.cells[2].update(id="0fc3a9b1"),
    "a clipped line": lambda nb: nb.cells[2].update(source=f"n = {'1' * 73}"),
    "a warning": lambda nb: nb.cells[2].outputs.append(
        nbformat.v4.new_output("stream", name="stderr", text="!")
    ),
    "an error": lambda nb: nb.cells[2].outputs.append(nbformat.v4.new_output("error", ename="E", evalue="")),
    "no parameters": lambda nb: nb.cells[1].metadata.update(tags=[]),
    "no set-up": lambda nb: nb.cells[0].metadata.update(tags=[]),
    "a picture without alt text": lambda nb: nb.cells[2].outputs.append(
        nbformat.v4.new_output("display_data", {"image/png": "aGVsbG8="})
    ),
    "a path": lambda nb: nb.cells[2].outputs.append(
        nbformat.v4.new_output("stream", name="stdout", text="saved /home/" + "somebody/x")
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_rules_notice(tmp_path, fault):
    path = tiny(tmp_path, "print(n)")
    execute(path, path)
    assert problems(path) == []
    notebook = nbformat.read(path, as_version=4)
    BROKEN[fault](notebook)
    nbformat.write(notebook, path)
    assert len(problems(path)) == 1
