"""Plan files: numbers as they are written, and mistakes that are told with the file."""

import pytest

from salnb import results
from salnb.__main__ import main
from salnb.study.plans import load_plan

PLAN = """
question: does it?
decision: it does
scale: {data: [digit-scenes], networks: [small], seeds: [0], training: {learning_rate: 1e-3, precision: 32}}
settings: {augmentation: affine, weight_decay: 1e-4}
balances: [3e-2, 0.1]
negligible: 2e-2
gate: {rise: 5e-2}
arms:
  relu: {settings: {gamma: 0}}
  max: {settings: {gamma: 1e-1}, reference: relu, tuned: true, twin: true, primary: true}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Take the place of the plan of the study "treated"."""
    (tmp_path / "plans").mkdir()
    monkeypatch.setattr(results, "published", lambda: tmp_path)
    load_plan.cache_clear()
    yield (tmp_path / "plans" / "treated.yml").write_text
    load_plan.cache_clear()


def test_numbers_are_read_as_they_are_written(write):
    write(PLAN)
    plan = load_plan("treated")
    assert plan.balances == (0.03, 0.1)
    assert (plan.negligible, plan.gate.rise, plan.gate.metric) == (0.02, 0.05, "test_correlation")
    assert plan.arms["max"].settings == {"augmentation": "affine", "weight_decay": 1e-4, "gamma": 0.1}
    assert plan.own_scale().training == {"learning_rate": 0.001, "precision": "32"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a mapping is expected, got NoneType"),
        ("- a\n", "a mapping is expected, got list"),
        ("question: a\n", "lacks 'arms'"),
        (PLAN.replace("arms:", "arms:\n  relu: {settings: {}}"), "relu is named twice"),
        (PLAN.replace("reference: relu", "reference: rely"), "reference of 'max' 'rely' is unknown"),
        (PLAN.replace("gate: {rise", "gate: {raise"), "raise"),
        (PLAN.replace("gamma: 0}", "gamma: 0"), "line"),
        (PLAN + "valid_if: other\n", "valid_if 'other' is unknown"),
    ],
)
def test_mistakes_are_told_with_the_file(text, why, write, capsys):
    write(text)
    with pytest.raises(ValueError, match=rf"plan of treated, .*treated\.yml: .*{why}"):
        load_plan("treated")
    assert main(["study", "treated", "--scale", "plan", "--out", "x"]) == 2
    assert why in capsys.readouterr().err
