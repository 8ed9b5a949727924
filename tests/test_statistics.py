"""Statistics: paired comparisons against scipy and by hand, the sign test, their table and their sentences."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from salnb import statistics
from salnb.statistics import Comparison, compare, in_words, markdown, mean, sign_test


def record(strategy, seed, accuracy, augmentation="rotation", **changes):
    factors = {"augmentation": augmentation, "strategy": strategy, "seed": seed}
    return {"status": "done", "factors": factors, "result": {"test_accuracy": accuracy}} | changes


def records_of(reference, saliency, augmentation="rotation"):
    """Records from an accuracy for each seed."""
    return [
        record(strategy, seed, accuracy, augmentation)
        for strategy, values in (("reference", reference), ("saliency", saliency))
        for seed, accuracy in enumerate(values)
        if accuracy is not None
    ]


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_differences_are_those_of_a_paired_t_test(n):
    generator = np.random.default_rng(n)
    # seeds differ by more than the strategies do: only a paired comparison sees through that
    seeds = generator.normal(0.5, 0.2, n)
    reference, saliency = ((seeds + shift + generator.normal(0, 0.01, n)).tolist() for shift in (0.0, 0.02))
    (found,) = compare(records_of(reference, saliency))
    expected = stats.ttest_rel(saliency, reference)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.difference == pytest.approx(np.mean(saliency) - np.mean(reference))
    assert (found.n, found.what, found.where) == (n, "saliency", {"augmentation": "rotation"})
    assert (found.reference, found.value) == pytest.approx((np.mean(reference), np.mean(saliency)))
    unpaired = stats.ttest_ind(saliency, reference).confidence_interval(0.95)
    assert found.high - found.low < (unpaired.high - unpaired.low) / 2 or n == 2


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        reference = generator.normal(0.5, 0.1, 4)
        saliency = reference + 0.03 + generator.normal(0, 0.02, 4)
        (found,) = compare(records_of(reference.tolist(), saliency.tolist()))
        hits += found.low <= 0.03 <= found.high
    # three standard deviations of a binomial around 380
    assert abs(hits - 380) <= 14


def test_only_seeds_that_have_both_are_compared():
    reference, saliency = [0.5, None, 0.7, 0.1], [0.6, 0.9, None, 0.25]
    (found,) = compare(records_of(reference, saliency))
    assert found.n == 2
    assert (found.reference, found.value, found.difference) == pytest.approx((0.3, 0.425, 0.125))
    assert found.differences == pytest.approx([0.1, 0.15])
    records = records_of([0.5, 0.6, 0.7], [0.6, 0.7, 0.9])
    failed = record("saliency", 2, 0.0) | {"status": "failed", "error": "OutOfMemoryError"}
    del failed["result"]
    assert compare([*records[:-1], failed])[0].n == 2
    assert compare(records_of([0.5, None], [None, 0.5])) == []
    assert compare([]) == []


def test_each_place_is_compared_with_its_own_reference_in_the_order_of_the_records():
    names = ["rotation", "cutout", "mixup"]
    records = [
        record(strategy, seed, 0.5 + 0.1 * index * (strategy == "saliency") + 0.01 * seed, name)
        for seed in (0, 1)
        for index, name in enumerate(names)
        for strategy in ("reference", "saliency")
    ]
    found = compare(records)
    assert [c.where["augmentation"] for c in found] == names
    assert [c.difference for c in found] == pytest.approx([0.0, 0.1, 0.2])


def test_several_values_of_another_factor_and_another_metric():
    records = [
        {
            "status": "done",
            "factors": {"data": "svhn", "variant": variant, "seed": seed},
            "result": {"validation_accuracy": accuracy + seed / 10},
        }
        for variant, accuracy in (("default", 0.4), ("none", 0.3), ("pool=2", 0.6))
        for seed in (0, 1, 2)
    ]
    found = compare(records, "variant", "none", metric="validation_accuracy")
    assert [(c.what, c.n) for c in found] == [("default", 3), ("pool=2", 3)]
    assert [c.difference for c in found] == pytest.approx([0.1, 0.3])
    with pytest.raises(KeyError, match="test_accuracy"):
        compare(records, "variant", "none")
    with pytest.raises(KeyError, match="strategy"):
        compare(records, metric="validation_accuracy")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.11, 0.09], "better"),
        ([-0.1, -0.11, -0.09], "worse"),
        ([0.1, -0.1, 0.05], "cannot tell"),
        ([0.1], "cannot tell"),
        ([0.0, 0.0], "cannot tell"),
        ([0.25, 0.26], "better"),
        ([0.25, 0.25], "cannot tell"),
        ([0.25] * 20, "cannot tell"),
    ],
    ids=str,
)
def test_verdicts(differences, verdict):
    (found,) = compare(records_of([0.5] * len(differences), [0.5 + d for d in differences]))
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.0, 0.1, "cannot tell"), (-0.1, 0.0, "cannot tell"), (1e-9, 0.1, "better")]
)
def test_an_interval_that_ends_at_zero_does_not_leave_it_out(low, high, verdict):
    assert Comparison({}, "saliency", 3, 0.5, 0.5, 0.0, low, high).verdict == verdict


def test_one_pair_says_nothing_of_the_spread():
    (found,) = compare(records_of([0.5], [0.75]))
    assert (found.n, found.difference, found.low, found.high) == (1, 0.25, -math.inf, math.inf)


@pytest.mark.parametrize("seeds", [[0.5, 0.5], [0.5, 0.6, 0.7, 0.9], [0.0] * 3], ids=str)
@pytest.mark.parametrize("difference", [0.1, 0.0, -0.3])
def test_equal_differences_say_nothing_of_the_spread(seeds, difference):
    """They are equal up to rounding: 0.6 - 0.5 is not quite 0.7 - 0.6."""
    (found,) = compare(records_of(seeds, [seed + difference for seed in seeds]))
    assert (found.low, found.high, found.verdict) == (-math.inf, math.inf, "cannot tell")
    assert found.difference == pytest.approx(difference)
    assert "| unknown | cannot tell |" in markdown([found])
    (narrow,) = compare(records_of(seeds, [seed + 0.1 + 1e-12 * i for i, seed in enumerate(seeds)]))
    assert math.isfinite(narrow.high - narrow.low)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", True], ids=repr)
def test_what_is_no_number_is_refused_with_its_record(value):
    with pytest.raises(ValueError, match=r"test_accuracy must be a finite number, got .* of {.*'seed': 1}"):
        compare([*records_of([0.5, 0.5], [0.5]), record("saliency", 1, value)])


def test_two_records_of_one_training_are_refused():
    """One of them would be compared with the other's reference: records of two scales, say."""
    records = records_of([0.5, 0.6], [0.7, 0.8])
    with pytest.raises(ValueError, match=r"records must each be of other factors, got two of {.*'seed': 1}"):
        compare([*records, record("saliency", 1, 0.9)])


def comparison(difference, n=3, spread=0.01, what="saliency"):
    return Comparison(
        {"augmentation": "rotation"},
        what,
        n,
        0.5,
        0.5 + difference,
        difference,
        difference - spread,
        difference + spread,
    )


@pytest.mark.parametrize(
    "signs", [(1, 1, 1), (1, -1, 0, 1), (-1,) * 9, (1,) * 8 + (-1,), (0, 0), ()], ids=str
)
def test_the_sign_test_counts_coin_tosses(signs):
    positive, tosses, p = sign_test([comparison(0.01 * sign) for sign in signs])
    assert (positive, tosses) == (signs.count(1), len(signs) - signs.count(0))
    # every outcome of so many tosses that is at least as far from half
    outcomes = list(itertools.product((0, 1), repeat=tosses))
    as_far = [o for o in outcomes if abs(2 * sum(o) - tosses) >= abs(2 * positive - tosses)]
    assert p == pytest.approx(len(as_far) / len(outcomes))


def test_the_table():
    table = markdown(
        [comparison(0.025), comparison(-0.5, what="other"), comparison(0.0, n=1, spread=math.inf)]
    )
    header, rule, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert header == [
        "augmentation", "compared", "seeds", "reference", "value", "difference", "95 % interval", "verdict",
    ]  # fmt: skip
    assert rule == ["---"] * len(header)
    assert rows == [
        ["rotation", "saliency", "3", "50.0%", "52.5%", "+2.5%", "+1.5% to +3.5%", "better"],
        ["rotation", "other", "3", "50.0%", "0.0%", "-50.0%", "-51.0% to -49.0%", "worse"],
        ["rotation", "saliency", "1", "50.0%", "50.0%", "+0.0%", "unknown", "cannot tell"],
    ]
    assert markdown([]) == "nothing can be compared: no seed has both"


def test_mean():
    assert mean([1, 2, 6]) == 3
    with pytest.raises(ValueError, match="values must hold at least one number, got none"):
        mean([])


# --- in sentences ------------------------------------------------------------------------------------------

BETTER, WORSE, UNCLEAR = (
    Comparison({}, "saliency", 3, 0.5, 0.5 + middle, middle, middle - 0.02, middle + 0.02)
    for middle in (0.04, -0.04, 0.01)
)


@pytest.mark.parametrize(
    ("comparisons", "verdicts", "signs"),
    [
        ([BETTER], "Of 1 comparison, 1 says better, 0 say worse, and 0 cannot tell.", "in 1 of 1;"),
        (
            [BETTER, WORSE, UNCLEAR],
            "Of 3 comparisons, 1 says better, 1 says worse, and 1 cannot tell.",
            "in 2 of 3;",
        ),
    ],
)
def test_verdicts_and_signs_are_counted(comparisons, verdicts, signs):
    words = in_words(comparisons)
    assert words.startswith(verdicts)
    assert signs in words


def test_the_probability_is_that_of_the_sign_test():
    assert "with a probability of 0.0039 (sign test)" in in_words([BETTER] * 9)
    assert "with a probability of 1 (sign test)" in in_words([BETTER, WORSE])


def test_nothing_to_compare_is_said():
    assert in_words([]) == "Nothing can be compared: no seed has both."


PAIRS = [(0.5, 0.6), (0.4, 0.7), (0.5, 0.5)]
NO_NUMBERS = {
    "confidence": lambda x: statistics.interval(PAIRS, x),
    "alpha": lambda x: statistics.holm_levels([0.3, 0.01], alpha=x),
    r"p_values\[1\]": lambda x: statistics.holm_levels([0.3, x]),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
@pytest.mark.parametrize("value", [math.nan, -0.1, 1.5, True, "0.5", None], ids=repr)
def test_what_is_no_probability_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*\[0, 1\], got {value!r}"):
        NO_NUMBERS[name](value)


@pytest.mark.parametrize("pair", [(math.nan, 0.1), (0.1, "0.2"), (True, 0.1), (0.1,), 0.3], ids=repr)
def test_a_pair_that_is_not_of_two_numbers_is_refused_by_its_place(pair):
    for function in (statistics.interval, statistics.p_value):
        with pytest.raises((TypeError, ValueError), match=r"^pairs\[1\] must"):
            function([PAIRS[0], pair])


@pytest.mark.parametrize("unit", [2.0**-1060, 1e-200, 1e200, 2.0**1020])
def test_an_interval_of_any_unit(unit):
    pairs = [(0.0, 1.0), (0.5, 2.0), (1.0, 4.5)]
    low, high = statistics.interval([(unit * a, unit * b) for a, b in pairs])
    assert (low / unit, high / unit) == pytest.approx(statistics.interval(pairs), rel=1e-3)
    scaled = statistics.p_value([(unit * a, unit * b) for a, b in pairs])
    assert scaled == pytest.approx(statistics.p_value(pairs), rel=1e-12)


def test_differences_beyond_all_numbers_have_an_interval_without_an_end():
    low, high = statistics.interval([(-1e308, 1e308), (-1e308, 1.5e308)])
    assert -math.inf < low < 0
    assert high == math.inf


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8])
def test_the_mean_of_an_array(dtype):
    assert mean(np.array([100, 120], dtype=dtype)) == 110.0
    with pytest.raises(ValueError, match="at least one number"):
        mean(np.array([], dtype=dtype))


def test_factors_may_come_in_any_order():
    first, second = record("reference", 0, 0.5), record("saliency", 0, 0.6)
    second["factors"] = dict(reversed(second["factors"].items()))
    first["factors"], second["factors"] = (f["factors"] | {"data": "svhn"} for f in (first, second))
    second["factors"] = dict(reversed(second["factors"].items()))
    (found,) = compare([first, second])
    assert list(found.where) == ["augmentation", "data"]
    assert found.pairs == ((0.5, 0.6),)


def test_factors_may_be_lists_and_dictionaries():
    """As `layers` and `augmentation_options` are in a record that was read from JSON."""
    runs = [record("reference", 0, 0.5), record("saliency", 0, 0.6), record("saliency", 0, 0.9)]
    for run, layers in zip(runs, (["a"], ["a"], ["a", "b"]), strict=True):
        run["factors"] |= {"layers": layers, "options": {"angle": [1, 2], "fill": None}}
    (found,) = compare(runs)
    assert found.pairs == ((0.5, 0.6),)
    assert found.where["layers"] == ["a"]
    by_layers = compare([runs[1], runs[2]], "layers", ("a",))
    assert [found.what for found in by_layers] == [("a", "b")]


def test_a_factor_of_another_kind_is_refused_by_name():
    run = record("reference", 0, 0.5)
    run["factors"]["layers"] = {1, 2}
    with pytest.raises(TypeError, match=r"factors of numbers and texts, got \{1, 2\} as 'layers'"):
        compare([run])
