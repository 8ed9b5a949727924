"""Running chapters where the source tree is not."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "elsewhere.py"


def test_the_package_of_the_tree_is_refused(tmp_path):
    """It is what this environment has: an editable installation."""
    command = [sys.executable, "-P", str(TOOL), "a.ipynb", "--outputs", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1
    assert ended.stdout == "salnb must be installed here, from a wheel\n"


def test_each_chapter_runs_in_an_empty_folder(tmp_path):
    """A package of the name lies beside, as if a wheel had been installed."""
    (tmp_path / "site" / "salnb").mkdir(parents=True)
    (tmp_path / "site" / "salnb" / "__init__.py").touch()
    sources = {"good": "import os; assert os.listdir() == []; open('x', 'w')", "bad": "1 / 0"}
    for name, source in sources.items():
        cell = nbformat.v4.new_code_cell(source, id="work")
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(
            nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}),
            tmp_path / f"{name}.ipynb",
        )
    command = [sys.executable, "-P", str(TOOL), "good.ipynb", "bad.ipynb", "--outputs", "outputs"]
    site = {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=site)
    assert ended.returncode == 1
    assert "passed good: " in ended.stdout
    assert "failed bad: " in ended.stdout
    assert "ZeroDivisionError" in ended.stdout
    assert ended.stdout.endswith("1 passed, 1 failed\n")
    assert re.match(r"salnb \S+, torch \S+, torchvision \S+\n", ended.stdout)
    assert (tmp_path / "outputs" / "good.ipynb").exists()
