"""What make would do: after a change of each kind, and for each target."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.reads import Reads, rule

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "pyproject.toml",
    "constraints.txt",
    "constraints-oldest.txt",
    "README.md",
    "_config.yml",
    "_toc.yml",
    "book/index.md",
    "book/references.bib",
    "book/static/site.css",
    "tools/notebooks.py",
    "tools/reads.py",
    "tools/site.py",
    "salnb/saliency.py",
    "salnb/study.py",
    "salnb/timing.py",
    "salnb/unused.py",
    "results/timing-cpu.json",
    "results/laptop/table1/lr=0.1+a.json",
    "results/laptop/table2/b.json",
    "notebooks/scales/smoke.yml",
    "notebooks/scales/paper.yml",
    "notebooks/01-methods.ipynb",
    "notebooks/02-study.ipynb",
    "notebooks/03-times.ipynb",
]
READ = {
    "01-methods": Reads({"salnb/saliency.py"}),
    "02-study": Reads(
        {
            "salnb/saliency.py",
            "salnb/study.py",
            "results/laptop/table1/lr=0.1+a.json",
            "notebooks/scales/smoke.yml",
        },
        {"results/laptop/table1", "notebooks/scales"},
    ),
    "03-times": Reads({"salnb/timing.py", "results/timing-cpu.json"}, {"results"}),
}
BUILT = [
    ".venv/.ready",
    ".venv/.versions",
    "_build/reads/01-methods.d",
    "_build/reads/02-study.d",
    "_build/reads/03-times.d",
    "_build/source/notebooks/01-methods.ipynb",
    "_build/source/notebooks/02-study.ipynb",
    "_build/source/notebooks/03-times.ipynb",
    "_build/site.stamp",
]
ALL = {*READ, "site"}


@pytest.fixture
def built(tmp_path):
    """A copy of the Makefile in a small tree in which everything has just been built."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in SOURCES + BUILT:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for chapter, read in READ.items():
        target = f"_build/source/notebooks/{chapter}.ipynb"
        (tmp_path / f"_build/reads/{chapter}.d").write_text(rule(target, read, tmp_path))
    for age, name in enumerate(SOURCES + BUILT):
        os.utime(tmp_path / name, (1_000_000_000 + age, 1_000_000_000 + age))
    return tmp_path


def make(tree, *arguments, check=True):
    command = ["make", *arguments]
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=check, env=environment)


def plan(tree, target):
    """What make would do."""
    return make(tree, "--dry-run", target).stdout


def rebuilt(tree):
    """What `make book` would make anew: chapters, and the site."""
    commands = plan(tree, "book")
    site = {"site"} if "-m tools.site" in commands else set()
    return site | set(re.findall(r"execute notebooks/(\S+)\.ipynb", commands))


def test_a_second_make_book_does_nothing(built):
    assert rebuilt(built) == set()


CHANGES = {
    "a module that two chapters read": ("salnb/saliency.py", {"01-methods", "02-study", "site"}),
    "a module that one reads": ("salnb/timing.py", {"03-times", "site"}),
    "a module that none reads, but the reference": ("salnb/unused.py", {"site"}),
    "a chapter": ("notebooks/01-methods.ipynb", {"01-methods", "site"}),
    "a record of a study": ("results/laptop/table1/lr=0.1+a.json", {"02-study", "site"}),
    "a record of times": ("results/timing-cpu.json", {"03-times", "site"}),
    "a record that no chapter reads": ("results/laptop/table2/b.json", set()),
    "a new record of a study": ("results/laptop/table1/c.json", {"02-study", "site"}),
    "a new record of times": ("results/timing-cuda.json", {"03-times", "site"}),
    "a scale": ("notebooks/scales/smoke.yml", {"02-study", "site"}),
    "a scale that no chapter reads": ("notebooks/scales/paper.yml", set()),
    "a new scale": ("notebooks/scales/gpu.yml", {"02-study", "site"}),
    "a page": ("book/index.md", {"site"}),
    "a reference": ("book/references.bib", {"site"}),
    "a style": ("book/static/site.css", {"site"}),
    "the table of contents": ("_toc.yml", {"site"}),
    "what runs the chapters": ("tools/notebooks.py", ALL),
    "an installed version": (".venv/.versions", ALL),
    "what the book does not show": ("README.md", set()),
}


@pytest.mark.parametrize(("changed", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_change_makes_anew_what_depends_on_it(built, changed, expected):
    (built / changed).touch()
    assert rebuilt(built) == expected


REMOVALS = {
    "a record": ("results/laptop/table1/lr=0.1+a.json", {"02-study", "site"}),
    "a module": ("salnb/study.py", {"02-study", "site"}),
    "what a chapter read": ("_build/reads/01-methods.d", {"01-methods", "site"}),
    "a chapter's outputs": ("_build/source/notebooks/03-times.ipynb", {"03-times", "site"}),
    "all that was built": ("_build", ALL),
}


@pytest.mark.parametrize(("removed", "expected"), REMOVALS.values(), ids=REMOVALS)
def test_what_is_gone_makes_anew_what_depended_on_it(built, removed, expected):
    path = built / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert rebuilt(built) == expected


def test_the_first_record_of_a_study_is_noticed_by_who_looks_for_any(built):
    """A search for `*/table1/*.json` looks into each folder for table1, and lists only what has it."""
    (built / "results/laptop/table3").mkdir()
    assert rebuilt(built) == {"03-times", "site"}


def test_an_installation_that_changed_no_version_runs_no_chapter(built):
    (built / ".venv/.ready").write_text("torch==2.15.0\n")
    (built / ".venv/.versions").write_text("torch==2.15.0\n")
    os.utime(built / ".venv/.versions", (1_000_000_050, 1_000_000_050))
    before = (built / ".venv/.versions").stat().st_mtime
    make(built, ".venv/.versions")
    assert (built / ".venv/.versions").stat().st_mtime == before
    (built / ".venv/.ready").write_text("torch==2.16.0\n")
    make(built, ".venv/.versions")
    assert (built / ".venv/.versions").read_text() == "torch==2.16.0\n"


PARTS = {"test-unit": "not slow", "test-notebooks": "--nbval", "test-pages": "tests/book/test_pages.py\n"}


@pytest.mark.parametrize("target", PARTS)
def test_a_part_of_the_tests_runs_by_itself(built, target):
    commands = plan(built, target)
    assert [part for part, mark in PARTS.items() if mark in commands] == [target]
    assert "-m tools" not in commands


def test_the_parts_of_the_tests_run_one_after_the_other(built):
    shutil.rmtree(built / "_build")
    commands = plan(built, "test")
    unit, notebooks, pages = (commands.index(mark) for mark in PARTS.values())
    assert unit < notebooks < pages
    assert unit < commands.index("execute notebooks/01-methods") < pages


@pytest.fixture
def bare(tmp_path):
    """A tree in which nothing has been installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_an_old_python_is_refused_in_one_line(bare):
    old = bare / "python3.8"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 8); $2"\n')
    old.chmod(0o755)
    ended = make(bare, "env", f"PYTHON={old}", check=False)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if not line.startswith("make")]
    assert said == [f"Python 3.11 or newer is needed, {old} is 3.8: make PYTHON=python3.12"]


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"python3": (3, 11), "python3.11": (3, 11)}, "python3"),
        ({"python3": (3, 13), "python3.11": (3, 11)}, "python3.11"),
        ({"python3.11": (3, 11)}, "python3.11"),
        ({"python3": (3, 11)}, "python3"),
        ({"python3": (3, 12), "python3.11": None}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_oldest_versions_take_the_python_that_they_need(bare, monkeypatch, versions, found):
    """Or one line says that there is none; None is a name behind which there is nothing, as pyenv has them."""
    commands = bare / "bin"
    commands.mkdir()
    for name in ("make", "bash", "find"):
        (commands / name).symlink_to(shutil.which(name))
    for name, version in versions.items():
        run = f'{sys.executable} -S -c "import sys; sys.version_info = {version}; $2"' if version else "false"
        (commands / name).write_text(f"#!{shutil.which('sh')}\n{run}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    ended = make(bare, "--silent", "has-python-oldest", check=False)
    if found:
        assert (ended.returncode, ended.stdout) == (0, "")
        assert f"\n{found} tools/install.py .venv-oldest" in plan(bare, "test-oldest-quick")
    else:
        assert ended.returncode != 0
        assert ended.stdout == "the oldest versions need Python 3.11, and there is none: make PYTHON=…\n"


def test_a_missing_python_is_named_in_one_line(bare):
    ended = make(bare, "env", "PYTHON=no-such-python", check=False)
    assert ended.returncode != 0
    assert ended.stdout == "there is no no-such-python: make PYTHON=…\n"
