"""How the package is built: what imports what, and how long its pieces are; all read from the source."""

import ast
import functools
import graphlib
import importlib
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# what is ours: not the environment and not what is built
FOLDERS = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith((".", "_"))]
FILES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {"torch", "torchvision"}
# rooms that need one of the package's extras; their faces do not
EXTRA = {"salnb.plot": "chapters", "salnb.study": "train", "salnb.train": "train"}


def module_name(path):
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): ast.parse((ROOT / path).read_text()) for path in FILES if path[:6] == "salnb/"}
# what a reader may import: no part of the name is private
PUBLIC = [name for name in SOURCES if not any(part.startswith("_") for part in name.split("."))]


class Imports(NamedTuple):
    """The modules that one module names, by when they are imported."""

    first: set[str]
    late: set[str]
    typing: set[str]


def named(node):
    """The modules that an import statement names; of our own, the module where a name is looked for."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert node.level == 0, f"line {node.lineno}: imports are absolute"
    inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {whole if whole in SOURCES else home(node.module, name) for name, whole in inner.items()}


def home(package, name):
    """The module that a package's face takes a name from; the package itself where it owns the name."""
    module = taken(package).get(name, package)
    return module if module.startswith("salnb") else package


@functools.cache
def taken(package):
    """The names that a package's face takes from modules, and which these are."""
    nodes = ast.walk(SOURCES[package]) if package in SOURCES else ()
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    # of several modules the first that is met
    return {alias.asname or alias.name: node.module for node in froms[::-1] for alias in node.names[::-1]}


def imports_of(tree):
    found = Imports(set(), set(), set())

    def visit(node, when):
        if isinstance(node, ast.Import | ast.ImportFrom):
            when.update(named(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = found.late
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = found.typing
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(tree, found.first)
    return found


IMPORTS = {name: imports_of(tree) for name, tree in SOURCES.items()}


def ours(names):
    return {name for name in names if name in SOURCES}


def circle_in(graph):
    """A circle of a graph, as the names along it, or None."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(error.args[1][::-1])
    return None


def room(module):
    """A package or a top-level module: the first two parts of the name."""
    return ".".join(module.split(".")[:2])


def test_no_circle_among_modules():
    """Neither at import time, nor later inside a function, nor for the types alone."""
    circle = circle_in({name: ours(chain(*found)) for name, found in IMPORTS.items()})
    assert circle is None


def test_no_import_upwards_among_rooms():
    """The rooms have floors: there is an order in which each imports only from rooms below it."""
    rooms = defaultdict(set)
    for name, found in IMPORTS.items():
        rooms[room(name)] |= {room(other) for other in ours(chain(*found))} - {room(name)}
    circle = circle_in(rooms)
    assert circle is None


def loaded_with(module):
    """All modules of ours that are loaded when one is imported, packages on the way included."""
    loaded, ahead = set(), [module]
    while ahead:
        if (name := ahead.pop()) not in loaded:
            loaded.add(name)
            ahead += ours(IMPORTS[name].first) | ours([name.rpartition(".")[0]])
    return loaded


def foreign(module):
    """The packages from elsewhere, beyond the standard library, that importing a module needs."""
    tops = {name.split(".")[0] for other in loaded_with(module) for name in IMPORTS[other].first}
    return tops - sys.stdlib_module_names - {"salnb"}


def packages(extra):
    """What an extra of pyproject.toml installs, under the names that are imported."""
    return {
        re.match(r"[\w-]+", line)[0].replace("-", "_") for line in PROJECT["optional-dependencies"][extra]
    }


@pytest.mark.parametrize("module", SOURCES)
def test_importing_a_module_needs_torch_and_torchvision_only(module):
    """Everything else is imported where it is used, or belongs to the extra that the room is for."""
    extra = packages(EXTRA[room(module)]) | {"numpy"} if room(module) in EXTRA else set()
    assert foreign(module) <= NEEDED | extra


def test_the_command_line_starts_without_torch():
    """A mistyped option is answered before torch is loaded, which takes seconds."""
    assert foreign("salnb.__main__") == set()


def newly_loaded(code, before):
    """The packages that some code loads, beyond the standard library and what was loaded before."""
    probe = (
        f"import sys; {before}; before = set(sys.modules); {code}; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    command = [sys.executable, "-c", probe]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return set(answer.stdout.split()) - sys.stdlib_module_names - {"salnb"}


def test_python_loads_what_the_source_says():
    """The tests above read the source; this one asks Python."""
    modules = [name for name in PUBLIC if room(name) not in EXTRA or name in ("salnb.study", "salnb.train")]
    everything = f"import {', '.join(modules)}; [getattr(salnb, name) for name in salnb.__all__]"
    assert newly_loaded(everything, "import torch, torchvision") <= NEEDED
    assert newly_loaded("import salnb.__main__", "pass") == set()


@pytest.mark.parametrize("module", PUBLIC)
def test_public_modules_list_their_names(module):
    loaded = importlib.import_module(module)
    assert loaded.__all__, "a public module lists its names in __all__"
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
    assert len(set(loaded.__all__)) == len(loaded.__all__)


def test_the_reference_shows_every_public_room():
    """Of a room's modules, those that it documents exist; their `__all__` says what the page shows."""
    pages = "".join(path.read_text() for path in (ROOT / "book" / "api").glob("*.md"))
    shown = set(re.findall(r"automodule:: (\S+)", pages))
    assert shown <= set(PUBLIC)
    assert {room(name) for name in PUBLIC} - {room(name) for name in shown} == {"salnb"}


def test_contributing_says_where_each_kind_of_change_goes():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Everyday work")[0]
    named = set(re.findall(r"`(\w+)(?:/|\.py)`", table))
    assert {room(name).removeprefix("salnb.") for name in SOURCES} - named == {"_version"}


@pytest.mark.parametrize("path", FILES)
def test_modules_stay_small(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= 400, f"{path}: {lines} lines, at most 400: split it"


def length(function):
    """The lines of a function, its docstring left out."""
    first = function.body[0]
    lines = function.end_lineno - function.lineno + 1
    return lines - (first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0)


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("tests/")])
def test_functions_stay_short(path):
    functions = [
        node
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f"{f.name}: {length(f)} lines, at most 50: split it" for f in functions if length(f) > 50]
    assert long == []
