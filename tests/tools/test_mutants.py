"""`make mutants`: what it breaks, which sample it takes, what it reports. The attack itself runs for minutes."""

import ast
import random

import pytest

pytest.importorskip("cosmic_ray", reason="an extra of its own: pip install 'salnb[mutants]'")

from cosmic_ray.mutating import mutate_code

from tools.mutants import sample
from tools.mutants.__main__ import Session
from tools.mutants.operators import OPERATORS
from tools.mutants.report import Found, answers, report
from tools.mutants.sample import (
    ROOT,
    Change,
    Mutant,
    candidates,
    change_of,
    mutated,
    shares,
    turns,
)
from tools.mutants.trial import Baseline

SOURCE = '''
from torch import Tensor

Maybe = Tensor | None
__all__ = ["f", "g" + "h"]

def f(x: Tensor | int, n: int = 1) -> Tensor | None:
    """Docstring with 1 + 1."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n - 0}")
    return x.abs() * (n + 2)
'''


def mutant(module="m.py", operator="core/NumberReplacer", occurrence=0):
    return Mutant(module, operator, occurrence, (1, 0), (1, 1))


def broken():
    found = candidates("m.py", SOURCE)
    return {m: mutated(m, SOURCE) for m in found}


def test_types_messages_and_lists_of_names_are_left_alone():
    stretches = [
        ast.get_source_segment(SOURCE, node)
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.BinOp)
    ]
    assert "Tensor | None" in stretches
    changed = {change_of(SOURCE, text).before for text in broken().values() if text}
    assert changed == {
        "def f(x: Tensor | int, n: int = 1) -> Tensor | None:",  # the default
        "if n < 1:",
        "return x.abs() * (n + 2)",
    }


def test_every_mutant_is_python_and_changes_something():
    texts = [text for text in broken().values() if text is not None]
    assert len(texts) > 5
    assert all(ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE)) for text in texts)
    assert any("return x * (n + 2)" in text for text in texts)


def test_operators_do_what_their_examples_say():
    for operator in OPERATORS.values():
        for example in operator.examples():
            code = mutate_code(example.pre_mutation_code, operator(), example.occurrence)
            assert code.replace("'", '"') == example.post_mutation_code


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("SwapName", "x.mean((1, 2))", "x.sum((1, 2))"),
        ("SwapName", "def f(alpha, beta): return alpha * 1", "def f(alpha, beta): return beta * 1"),
        ("OneOfSeveralMaxima", "x.abs().amax(1)", "x.abs().max(1).values"),
        ("DropCall", "y = x.clone()", "y = x"),
        ("SwapOrder", "torch.where(a, b, c)", "torch.where(a, c, b)"),
        ("SwapOrder", "y = a - b", "y = b - a"),
        ("SwapOrder", "(a - b).square()", None),  # the sign is lost
        ("SwapName", "from torch import mean", None),
        ("SwapName", "f(min=1)", None),
        ("DropReversal", "reversed(steps)", "(steps)"),
    ],
)
def test_mistakes_of_tensor_code(name, before, after):
    assert mutate_code(before, OPERATORS[name](), 0) == after


def test_kinds_take_turns():
    many = [mutant(occurrence=i) for i in range(9)]
    few = [mutant(operator="salnb/DropCall", occurrence=i) for i in range(2)]
    first = list(turns(many + few, random.Random(0)))[:4]
    assert {m.kind for m in first[:2]} == {m.kind for m in first[2:]} == {"NumberReplacer", "DropCall"}


def test_the_sample_is_split_in_proportion_to_size():
    assert shares({"a": 300, "b": 100}, 8) == {"a": 6, "b": 2}
    assert shares({"a": 300, "b": 1}, 8) == {"a": 7, "b": 1}
    assert sum(shares({"a": 1, "b": 1, "c": 1}, 10).values()) == 10


def test_every_module_has_tests_that_exist():
    for module in sample.modules():
        assert all((ROOT / path).exists() for path in sample.tests_of(module))


def test_report_counts_and_lists_what_survived():
    outcomes = ["noticed"] * 7 + ["timed out", "survived", "survived", "not run"]
    found = [Found(mutant(occurrence=i), Change(i, "a", "b"), outcome) for i, outcome in enumerate(outcomes)]
    found[8] = Found(mutant(), Change(8, "old", "new"), "survived", answer="equal")
    text = report(found)
    assert "| all | 7 | 1 | 2 | 1 | 80% |" in text
    assert "2 survived, 1 of them answered" in text
    assert text.index("## m.py:9") < text.index("## m.py:8")  # what is open comes first
    assert "Answered: equal" in text
    assert "-old\n+new" in text


def test_answers_are_of_lines_that_exist():
    for module, line, becomes in answers():
        assert line in [there.strip() for there in (ROOT / module).read_text().splitlines()]
        assert becomes != line


def test_a_session_goes_on_where_it_was(tmp_path):
    both = {"one": mutant(), "two": mutant(occurrence=1)}
    first = Session(tmp_path / "session.sqlite", both)
    first.write("one", "timed out", "")
    first.database.close()
    assert Session(tmp_path / "session.sqlite", both).outcomes() == {"one": "timed out"}


def test_a_mutant_needs_the_tests_that_reach_its_statement():
    source = "def f(x):\n    if x > 1:\n        return (\n            x + 1\n        )\n"
    assert list(sample.statement(source, Mutant("m.py", "a/B", 0, (4, 16), (4, 17)))) == [3, 4, 5]
    assert list(sample.statement(source, Mutant("m.py", "a/B", 0, (2, 9), (2, 10)))) == [2]
    room = Baseline(
        {"slow": 2.0, "fast": 1.0, "other": 0.1},
        {"m.py": {1: [""], 3: ["slow"], 4: ["slow", "fast", "broken"]}},
        ["broken"],
    )
    assert room.tests("m.py", range(3, 6)) == ["fast", "slow"]
    assert room.tests("m.py", range(1, 2)) == ["other", "fast", "slow"]  # it runs at import
    assert room.tests("m.py", range(7, 8)) == ["other", "fast", "slow"]  # another process may run it
