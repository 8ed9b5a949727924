"""Which mutants there are, and a random sample of them."""

import ast
import fnmatch
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from tools.mutants.operators import Provider

ROOT = Path(__file__).resolve().parents[2]
plugins.OPERATOR_PROVIDERS["salnb"] = Provider()

# the modules, and what is run for each, the fastest first
ROOMS: dict[str, tuple[str, ...]] = {
    "salnb/losses.py": (
        "salnb/losses.py",
        "tests/test_losses.py",
        "tests/test_invariance.py",
        "tests/test_pool.py",
    ),
    "salnb/statistics.py": ("salnb/statistics.py", "tests/test_statistics.py"),
    "salnb/trust.py": ("salnb/trust.py", "tests/test_trust.py"),
    "salnb/saliency/isolation.py": (
        "tests/saliency/test_state.py",
        "tests/saliency/test_aliases.py",
        "tests/saliency/test_surroundings.py",
        "tests/saliency/test_foreign_code.py",
    ),
    "salnb/saliency/own_gradients.py": ("tests/saliency/test_own_gradients.py",),
    "salnb/saliency/relu_*.py": ("tests/saliency/test_relu_spellings.py",),
    "salnb/saliency/*.py": (
        "salnb/saliency",
        "tests/saliency/test_definitions.py",
        "tests/saliency/test_input.py",
        "tests/saliency/test_methods.py",
        "tests/saliency/test_layers.py",
        "tests/saliency/test_surroundings.py",
        "tests/saliency/test_state.py",
        "tests/saliency/test_aliases.py",
        "tests/saliency/test_score.py",
        "tests/saliency/test_transformers.py",
    ),
    "salnb/augment/*.py": ("salnb/augment", "tests/augment"),
    "salnb/double_backward/fused.py": ("tests/double_backward/test_fused.py",),
    "salnb/double_backward/kernels.py": ("tests/double_backward/test_fused.py",),
    "salnb/double_backward/foreign.py": ("tests/double_backward/test_foreign.py",),
    "salnb/double_backward/refusals.py": (
        "tests/double_backward/test_foreign.py",
        "tests/double_backward/test_written_gradients.py",
        "tests/double_backward/test_limits.py",
        "tests/saliency/test_foreign_code.py",
    ),
    "salnb/double_backward/recomputation.py": (
        "tests/double_backward/test_recomputation.py",
        "tests/objective/test_checkpointed_state.py",
        "tests/objective/test_checkpointing.py",
    ),
    "salnb/double_backward/b*.py": ("tests/double_backward",),
    "salnb/double_backward/*.py": (
        "tests/double_backward/test_functions.py",
        "tests/double_backward/test_limits.py",
        "tests/double_backward/test_networks.py",
        "tests/double_backward/test_overrides.py",
    ),
    "salnb/objective/compiled.py": (
        "tests/objective/test_stale_graphs.py",
        "tests/objective/test_compiled.py",
    ),
    "salnb/objective/graph_key.py": (
        "tests/objective/test_graph_key.py",
        "tests/objective/test_stale_graphs.py",
    ),
    "salnb/objective/captured.py": ("tests/objective/test_captured.py",),
    "salnb/objective/gradients_read.py": (
        "tests/saliency/test_own_gradients.py",
        "tests/objective/test_captured.py",
    ),
    "salnb/objective/randomness.py": (
        "tests/objective/test_randomness.py",
        "tests/objective/test_graph_key.py",
    ),
    "salnb/objective/balance.py": ("tests/objective/test_state_dict.py", "tests/objective/test_balance.py"),
    "salnb/objective/class_terms.py": ("tests/objective/test_own_loss.py",),
    "salnb/objective/unlabelled.py": ("tests/objective/test_unlabelled.py",),
    "salnb/objective/*.py": (
        "tests/objective/test_input.py",
        "tests/objective/test_state_dict.py",
        "tests/objective/test_batches.py",
        "tests/objective/test_unlabelled.py",
        "tests/objective/test_objective.py",
        "tests/objective/test_everywhere.py",
        "tests/objective/test_own_loss.py",
        "tests/objective/test_settings.py",
        "tests/objective/test_balance.py",
    ),
}
# of cosmic-ray's operators those whose mutants run: `a >> b` of floating-point numbers would only fail
KINDS = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_FloorDiv", "Pow_Mul"),
    *("BitAnd_BitOr", "BitOr_BitAnd", "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt"),
    *("Is_IsNot", "IsNot_Is", "Delete_USub", "Delete_Not", "Delete_Invert", "NumberReplacer", "AddNot"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
)


class Mutant(NamedTuple):
    """One way to break a module: cosmic-ray's operator at its n-th place in the file."""

    module: str
    operator: str
    occurrence: int
    start: tuple[int, int]  # line from 1, column from 0
    end: tuple[int, int]

    @property
    def kind(self) -> str:
        """The operator, without who provides it."""
        return _kind(self.operator)


def _kind(operator: str) -> str:
    return re.sub(r".*/(Replace(Binary|Comparison|Unary)Operator_)?", "", operator)


class Change(NamedTuple):
    """The first line that a mutant changes, before and after."""

    line: int
    before: str
    after: str


def modules(patterns: Iterable[str] = ROOMS) -> list[str]:
    """The modules that the patterns match."""
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found)


def tests_of(module: str) -> tuple[str, ...]:
    """What is run for a module."""
    return next(tests for pattern, tests in ROOMS.items() if fnmatch.fnmatch(module, pattern))


def untouched(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The stretches of a module that are not broken: types, error messages, decorators, `__all__`."""
    tree = ast.parse(source)
    nodes: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            nodes += [a.annotation for a in (*every, arguments.vararg, arguments.kwarg) if a and a.annotation]
            nodes += [node.returns] if node.returns else []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes += node.decorator_list
            nodes += node.bases if isinstance(node, ast.ClassDef) else []
        if isinstance(node, ast.AnnAssign):
            nodes.append(node.annotation)
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
            nodes.append(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "TypeVar", "cast"):
            nodes.append(node)
    for node in tree.body:
        if isinstance(node, ast.Assign) and (
            isinstance(node.value, ast.BinOp) or ast.unparse(node.targets[0]) == "__all__"
        ):
            nodes.append(node)  # names of types, as `Maybe = Tensor | None`
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]  # type: ignore[attr-defined]


def candidates(module: str, source: str) -> list[Mutant]:
    """All that cosmic-ray and our operators could do to a module."""
    names = [n for n in plugins.operator_names() if n.startswith("salnb/") or _kind(n) in KINDS]
    tree, skipped, found = get_ast(source), untouched(source), []
    nodes = list(ast_nodes(tree))
    for name in names:
        operator = plugins.get_operator(name)()
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start and end <= last for first, last in skipped):
                found.append(Mutant(module, name, occurrence, start, end))
    return found


def mutated(mutant: Mutant, source: str) -> str | None:
    """The module's text with the mutant in it; None where that is no Python or changes nothing.

    The star of a signature may become a slash: what callers keep to is not what is tested.
    """
    operator = plugins.get_operator(mutant.operator)()
    text = mutate_code(source, operator, mutant.occurrence)
    try:
        same = text is None or _without_stars(text) == _without_stars(source)
    except SyntaxError:
        return None
    return None if same else text


def _without_stars(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults = [*node.defaults, *(default for default in node.kw_defaults if default)]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
    return ast.dump(tree)


def turns(mutants: Iterable[Mutant], rng: random.Random) -> Iterator[Mutant]:
    """The mutants in random order, one of each kind in turn, so that no kind outweighs the others."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        kinds.setdefault(mutant.kind, []).append(mutant)
    rows = list(kinds.values())
    rng.shuffle(rows)
    for row in rows:
        rng.shuffle(row)
    for one_of_each in itertools.zip_longest(*rows):
        yield from (mutant for mutant in one_of_each if mutant is not None)


def shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` split in proportion to the sizes, at least one for each."""
    whole = sum(sizes.values())
    exact = {name: total * size / whole for name, size in sizes.items()}
    split = {name: max(1, int(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name]):
        if sum(split.values()) < total:
            split[name] += 1
    return split


def draw(sources: Mapping[str, str], sample: int, seed: int) -> dict[Mutant, str]:
    """A random sample, of each module in proportion to its lines: mutants, and the modules broken by them."""
    wanted = shares({module: len(source.splitlines()) for module, source in sources.items()}, sample)
    drawn: list[tuple[Mutant, str]] = []
    for module, source in sources.items():
        rng = random.Random(f"{seed} {module}")
        texts = ((m, mutated(m, source)) for m in turns(candidates(module, source), rng))
        sound = ((m, text) for m, text in texts if text is not None)
        drawn += itertools.islice(sound, wanted[module])
    random.Random(seed).shuffle(drawn)
    return dict(drawn)


def key(mutant: Mutant, source: str) -> str:
    """What the session knows a mutant by: another source makes another mutant."""
    return hashlib.sha256(
        f"{mutant.module} {source} {mutant.operator} {mutant.occurrence}".encode()
    ).hexdigest()[:24]


def change_of(source: str, text: str) -> Change:
    """Which line a mutant changes, and into what."""
    pairs = enumerate(zip(source.splitlines(), text.splitlines(), strict=False), start=1)
    return next(Change(i, a.strip(), b.strip()) for i, (a, b) in pairs if a != b)


def statement(source: str, mutant: Mutant) -> range:
    """The lines of the statement that a mutant changes; of one with a body, those above it."""
    first, last = mutant.start[0], mutant.end[0]
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= first and last <= (node.end_lineno or 0)
    ]
    if not around:
        return range(first, last + 1)
    node = max(around, key=lambda node: node.lineno)
    body = getattr(node, "body", None)
    end = body[0].lineno - 1 if body else node.end_lineno or 0
    return range(node.lineno, max(end, last) + 1)
