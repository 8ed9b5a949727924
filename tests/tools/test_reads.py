"""What a chapter reads is noticed, in its own process and in those that it starts."""

import os
import subprocess
import sys

import nbformat
import pytest

from tools import reads
from tools.notebooks import execute


@pytest.fixture
def tree(tmp_path):
    """A small tree with records, a scale and a package."""
    for name in (
        "results/times.json",
        "results/laptop/table1/a.json",
        "results/laptop/table1/b.json",
        "results/laptop/open/c.json",
        "notebooks/scales/smoke.yml",
        "notebooks/scales/paper.yml",
        "package/__init__.py",
        "package/used.py",
        "package/unused.py",
        "_build/old.json",
        ".venv/lib.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def read_by(tree, code):
    """What a program reads of the tree that is its working directory."""
    with reads.watched(tree) as read:
        subprocess.run([sys.executable, "-c", code], cwd=tree, check=True)
    return read


def test_files_that_are_opened(tree):
    read = read_by(tree, "open('results/times.json'); open('notebooks/scales/smoke.yml', 'rb')")
    assert read == reads.Reads({"results/times.json", "notebooks/scales/smoke.yml"})


def test_a_folder_that_is_searched(tree):
    code = "from pathlib import Path; [p.read_text() for p in Path('results/laptop/table1').glob('*.json')]"
    read = read_by(tree, code)
    assert read.files == {"results/laptop/table1/a.json", "results/laptop/table1/b.json"}
    assert read.folders == {"results/laptop/table1"}


@pytest.mark.parametrize("run", ["first", "second"])
def test_modules_that_are_imported(tree, run):
    """A compiled copy in __pycache__ stands for its source."""
    if run == "second":
        writing = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run([sys.executable, "-c", "import package.used"], cwd=tree, check=True, env=writing)
        assert (tree / "package/__pycache__").exists()
    assert read_by(tree, "import package.used") == reads.Reads({"package/__init__.py", "package/used.py"})


def test_what_a_child_process_reads(tree):
    inner = "open('results/times.json')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    assert read_by(tree, code).files == {"results/times.json"}


def test_what_is_no_source_is_left_out(tree):
    code = (
        "import os; open('_build/old.json'); open('.venv/lib.py'); open('new.txt', 'w'); os.listdir('package');"
        "open(os.devnull); open(os.open('/dev/null', os.O_RDONLY))"
    )
    assert read_by(tree, code) == reads.Reads()


def test_the_environment_is_left_as_it_was(tree, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    before = dict(os.environ)
    with reads.watched(tree):
        assert os.environ["PYTHONPATH"].endswith(f"watch{os.pathsep}somewhere")
    assert dict(os.environ) == before
    with pytest.raises(subprocess.CalledProcessError):
        read_by(tree, "raise SystemExit(1)")
    assert dict(os.environ) == before


def test_a_name_that_make_would_not_read_is_refused(tree):
    with pytest.raises(ValueError, match=r"make needs names of .*, got 'results/a b\.json'"):
        reads.rule("chapter.ipynb", reads.Reads({"results/a b.json"}), tree)


def test_a_run_of_a_chapter_writes_down_what_it_read(tmp_path):
    source = "import salnb.results; n = len(list(salnb.results.published().glob('timing-*.json')))"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, id="work")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    chapter, out, depfile = (tmp_path / name for name in ("01-a.ipynb", "out/01-a.ipynb", "reads/01-a.d"))
    nbformat.write(notebook, chapter)
    execute(chapter, out, depfile=depfile)
    first, target, *rest = depfile.read_text().splitlines()
    assert {"salnb/__init__.py", "salnb/results.py"} <= set(first.removeprefix("read := ").split())
    assert "salnb/losses.py" not in first
    assert target == f"{out}: $(read)"
    assert any(line.startswith('ifneq "$(sort $(wildcard results/* ') for line in rest)
    assert out.stat().st_mtime_ns >= depfile.stat().st_mtime_ns
