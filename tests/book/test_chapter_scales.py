"""The scale files are parameter files of the chapters of experiments: each override arrives and is used."""

import ast
from pathlib import Path

import pytest
import yaml

from salnb import study
from tests.book.test_notebooks import CHAPTERS, assigned_names, cells, ids, parameters_cell

ROOT = Path(__file__).resolve().parents[2]
SCALES = sorted((ROOT / "notebooks" / "scales").glob("*.yml"))
EXPERIMENTS = [chapter for chapter in CHAPTERS if chapter.stem[:2] in ("12", "13", "14", "16")]


def calls(chapter, function):
    """The calls of a function of `salnb.study` in a chapter."""
    trees = [ast.parse(cell.source) for cell in cells(chapter) if cell.cell_type == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func) == f"study.{function}"]


def test_there_are_chapters_and_scales():
    assert {chapter.stem[:2] for chapter in EXPERIMENTS} >= {"12", "13", "14"}
    assert {"smoke", "laptop", "gpu", "colab", "paper"} <= {path.stem for path in SCALES}


@pytest.mark.parametrize("chapter", EXPERIMENTS, ids=ids(EXPERIMENTS))
@pytest.mark.parametrize("scale", SCALES, ids=ids(SCALES))
def test_every_override_is_a_parameter(chapter, scale):
    """Papermill adds what is not a parameter without a word."""
    overrides = yaml.safe_load(scale.read_text(encoding="utf-8"))
    assert overrides.keys() <= assigned_names(parameters_cell(chapter).source)


@pytest.mark.parametrize("chapter", EXPERIMENTS, ids=ids(EXPERIMENTS))
def test_the_scale_decides_what_is_run(chapter):
    """It is loaded, and the study that is run gets what was loaded, however it was given."""
    (loaded,) = (call for call in calls(chapter, "load_scale") if ast.unparse(call.args[0]) == "scale")
    source = next(cell.source for cell in cells(chapter) if ast.unparse(loaded) in cell.source)
    (name,) = (
        ast.unparse(node.targets[0])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == ast.unparse(loaded)
    )
    assert name in [ast.unparse(call.args[1]) for call in calls(chapter, "run")]


@pytest.mark.parametrize("scale", SCALES, ids=ids(SCALES))
def test_an_override_says_what_the_name_says(scale):
    values = yaml.safe_load(scale.read_text(encoding="utf-8"))["scale"]
    assert study.load_scale(values).to_dict() == study.load_scale(scale.stem).to_dict()
