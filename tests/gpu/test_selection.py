"""`make test-gpu` finds all tests that take a device, and needs what a bare machine has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def make(*arguments):
    command = ["make", "--dry-run", "test-gpu", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def selected():
    """The files that it runs."""
    paths = [ROOT / name for name in re.findall(r"(?<= )tests/\S+", make())]
    return {file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])}


def takes_device(file):
    """Whether a test has the argument `device`, and not from its own list of names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            given = {argument.arg for argument in node.args.args}
            listed = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if "device" in given and "'device'" not in listed:
                return True
    return False


def test_all_files_with_such_tests_are_selected():
    assert {file for file in (ROOT / "tests").rglob("test_*.py") if takes_device(file)} <= selected()


def test_the_device_is_told():
    assert "--device cuda -m on_device" in make()
    assert "--device cpu -m on_device" in make("DEVICE=cpu")


def test_it_is_collected_with_torch_torchvision_and_pytest_alone():
    """That all else is hidden is seen by tests that need it, beside the selection: the only ones that fail."""
    needing = ROOT / "tests/augment/test_contract.py"
    options = ["-p", "tests.helpers.bare", "-p", "no:cacheprovider", "--collect-only", "-qm", "on_device"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, [*selected(), needing])]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    failed = set(re.findall(r"^ERROR (\S+)", ended.stdout, re.MULTILINE))  # as tests and as docstrings
    assert failed == {str(needing.relative_to(ROOT))}
    assert "No module named 'hypothesis'" in ended.stdout
    assert int(re.search(r"(\d+)/\d+ tests collected ", ended.stdout).group(1)) > 600
