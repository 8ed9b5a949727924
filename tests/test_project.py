"""The files that set the project up agree with one another."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def exact_versions(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(next(iter(r.specifier)).version) for r in requirements}


CONSTRAINTS, OLDEST = exact_versions("constraints.txt"), exact_versions("constraints-oldest.txt")
DIRECT = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]


@pytest.mark.parametrize("requirement", [r for r in DIRECT if r.name != "salnb"], ids=lambda r: r.name)
def test_constraints_hold_a_version_that_the_package_allows(requirement):
    exact = CONSTRAINTS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(exact)


@pytest.mark.parametrize("name", sorted(OLDEST.keys() & {canonicalize_name(r.name) for r in DIRECT}))
def test_the_oldest_versions_are_those_that_the_package_promises(name):
    bounds = {s.version for r in DIRECT if canonicalize_name(r.name) == name for s in r.specifier}
    assert {Version(bound) for bound in bounds} == {Version(OLDEST[name])}


def test_all_that_the_package_needs_is_tested_at_its_oldest():
    lines = PROJECT["dependencies"] + EXTRAS["train"]
    assert {canonicalize_name(Requirement(line).name) for line in lines} <= OLDEST.keys()


@pytest.mark.parametrize("name", ["torch", "torchvision", "numpy"])
def test_what_colab_brings_is_never_pinned(name):
    bounds = [s.operator for r in DIRECT if r.name == name for s in r.specifier]
    assert all(operator == ">=" for operator in bounds)


def test_conda_environment_installs_the_package_with_known_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert f"python{PROJECT['requires-python']}" in conda
    assert "--constraint constraints.txt" in pip
    (package,) = [line for line in pip if line.startswith("--editable")]
    extras = re.fullmatch(r"--editable \.\[(.*)\]", package).group(1).split(",")
    assert set(extras) <= set(EXTRAS)
    makefile = (ROOT / "Makefile").read_text()
    assert f"--editable '.[{','.join(extras)}]'" in makefile


def test_versions_agree():
    import salnb

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == salnb.__version__ == citation["version"]


def test_readme_names_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "book" / "reproduce.md"]
    named = {
        t for path in documents for t in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert named >= {"book", "test", "help"}
    for target in named:
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), f"make {target}"


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    wanted = recipe.replace("$(BIN)", ".venv/bin").replace(" $(NOTEBOOKS)", "").split("\n")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == [line.strip() for line in wanted if line]
    assert {hook["language"] for hook in local["hooks"]} == {"system"}  # no download, the versions of .venv


def test_changelog_begins_with_what_is_unreleased_and_names_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert PROJECT["version"] in versions


def test_table_of_contents_names_every_chapter_and_page_once():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert len(files) == len(set(files))
    there = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "notebooks").glob("*.ipynb")}
    there |= {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "book").glob("*.md")}
    assert set(files) == there
