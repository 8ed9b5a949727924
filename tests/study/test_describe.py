"""Tables and sentences about records."""

import pytest

from salnb.statistics import Comparison
from salnb.study import describe


def comparison(what, difference, half=0.01):
    return Comparison({}, what, 3, 0.5, 0.5 + difference, difference, difference - half, difference + half)


BETTER, WORSE, UNCLEAR = comparison("pool", 0.05), comparison("cosine", -0.05), comparison("l1", 0.005)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["a"], "a"), (["a", "b"], "a and b"), (iter("abc"), "a, b and c")],
    ids=["one", "two", "three"],
)
def test_listed(words, said):
    assert describe.listed(words) == said


def test_stacked_tables_keep_one_header():
    tables = [describe.table([n], {"n": str}) for n in (1, 2)]
    assert describe.stacked(*tables) == describe.table([1, 2], {"n": str})
    assert describe.stacked(tables[0]) == tables[0]


def test_coverage_lists_what_is_planned_and_then_what_was_run_beside():
    def at(network, status="done"):
        return {"factors": {"data": "svhn", "network": network, "seed": 0}, "status": status}

    planned = {"table2": [at("resnet18")["factors"]] * 2, "table3": []}
    records = {"table2": [at("small"), at("small", "failed")], "table3": [at("small")]}
    assert describe.coverage(planned, records).splitlines()[2:] == [
        "| table2 | svhn | resnet18 | 2 | none | 0 |",
        "| table2 | svhn | small | – | 1 | 1 |",
        "| table3 | svhn | small | – | 1 | 0 |",
    ]


def test_verdicts_name_each_setting_once():
    said = describe.verdicts([WORSE, UNCLEAR, BETTER, comparison("l2", 0.0)])
    assert said == [
        "**1 of 4 settings are better than the reference**: pool.",
        "**1 of 4 settings are worse than the reference**: cosine.",
        "**2 of 4 settings are indistinguishable from the reference**: l1 and l2.",
    ]
    assert len(describe.verdicts([BETTER])) == 1


def test_ranking_names_the_ends_and_what_is_shown():
    best, helps, hurts, chance = describe.ranking([WORSE, BETTER, UNCLEAR])
    assert "best mean is that of **pool** (+5.0 points, better)" in best
    assert "the worst that of **cosine** (-5.0 points, worse)" in best
    assert helps == "Shown to help, in this order: pool."
    assert hurts == "Shown to hurt: cosine."
    assert chance.startswith("Of 3 intervals of 95 %, about 0.2 would")


def test_ranking_says_where_nothing_helps():
    _, helps, chance = describe.ranking([UNCLEAR])
    assert helps == "**No setting is shown to help here.**"
    assert chance.startswith("Of 1 intervals")


def test_nothing_can_be_ranked():
    assert describe.verdicts([]) == []
    with pytest.raises(ValueError, match="comparisons must hold at least one, got none"):
        describe.ranking([])
