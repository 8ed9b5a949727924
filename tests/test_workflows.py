"""The workflows name what exists, and nothing that somebody else can change."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JOBS = {
    f"{path.stem}-{name}": job
    for path in WORKFLOWS
    for name, job in yaml.safe_load(path.read_text())["jobs"].items()
}


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_actions_are_pinned_to_commits(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses or "uses" not in path.read_text()
    for action in uses:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_an_action_has_one_version():
    pins = {action for path in WORKFLOWS for action in re.findall(r"uses: (.*)", path.read_text())}
    assert len({action.partition("@")[0] for action in pins}) == len(pins)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_a_known_image_a_limit_and_few_rights(name):
    job = JOBS[name]
    assert job["runs-on"] == "ubuntu-24.04"
    assert job["timeout-minutes"] <= 120
    rights = {"ci-publish": {"pages": "write", "id-token": "write"}, "weekly-report": {"issues": "write"}}
    assert job.get("permissions") == rights.get(name)


def test_every_supported_python_is_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = JOBS["ci-check"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"
    assert pythons == [f"3.{minor}" for minor in range(11, 11 + len(pythons))]


def test_the_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {name for path in WORKFLOWS for name in re.findall(r"make ([a-z-]+)", path.read_text())}
    named |= set(re.findall(r"run make ([a-z-]+)", (ROOT / ".ci" / "run").read_text()))
    named |= {entry["target"] for entry in JOBS["ci-versions"]["strategy"]["matrix"]["include"]}
    named |= {target.split()[0] for target in JOBS["weekly-newest"]["strategy"]["matrix"]["target"]}
    assert named >= {"lint", "test", "book", "test-oldest", "test-colab", "test-recipes"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
