"""What a study says: paired differences with their intervals, and a sign test over all of them."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from salnb._common.limits import check_number, check_pair
from salnb._common.tables import markdown_table

__all__ = [
    "Comparison",
    "compare",
    "holm_levels",
    "in_words",
    "interval",
    "markdown",
    "mean",
    "p_value",
    "reached",
    "sign_test",
]


@dataclass(frozen=True)
class Comparison:
    """Training runs with something, against runs of the same seeds without.

    Attributes:
        where: the factors that both have in common.
        what: which runs are compared with the reference.
        n: number of seeds of which both are there.
        reference: mean of the reference.
        value: mean of what is compared with it.
        difference: mean of the differences of pairs.
        low: lower end of the interval that holds the mean difference with 95 % confidence. It is -inf where
            nothing is known of the spread: for one pair, and where the differences of all pairs are equal, as
            those of a few accuracies, which are counts of images, may be by chance.
        high: upper end, or inf.
        pairs: for each seed, what the reference and what is compared with it reached.
    """

    where: dict[str, Any]
    what: str
    n: int
    reference: float
    value: float
    difference: float
    low: float
    high: float
    pairs: tuple[tuple[float, float], ...] = ()

    @property
    def differences(self) -> list[float]:
        """By how much each run differs from the reference of its seed."""
        return [ours - theirs for theirs, ours in self.pairs]

    @property
    def verdict(self) -> str:
        """One of "better" and "worse" where the interval leaves out zero, else "cannot tell"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "cannot tell"


def compare(
    records: Iterable[Mapping[str, Any]],
    factor: str = "strategy",
    reference: str = "reference",
    *,
    metric: str = "test_accuracy",
) -> list[Comparison]:
    """Compare each value of a factor with the reference, seed by seed.

    Runs of one seed share the weights they start from, the split and the order of the batches; what all
    of that does to the accuracy cancels in the difference. The interval is that of a paired t-test.

    Args:
        records: of a study, see `salnb.study.read`; failed runs are left out.
        factor: what is compared.
        reference: the value that the others are compared with.
        metric: a number in the results.

    Returns:
        A comparison for each other value of the factor and each combination of the other factors, in the
        order of the records; none where no seed has both.

    Raises:
        KeyError: a record lacks the factor or the metric.
        TypeError: a factor is no number, text, or list or dictionary of such.
        ValueError: a metric is no finite number, or two records are of the same factors.
    """
    values: dict[tuple, dict[str, dict[int, float]]] = {}
    orders: dict[tuple, dict[str, Any]] = {}
    for record in records:
        if record["status"] != "done":
            continue
        factors = dict(record["factors"])
        seed, what = factors.pop("seed"), _hashable(factors.pop(factor), factor)
        # in whatever order a record has them
        key = tuple((name, _hashable(factors[name], name)) for name in sorted(factors))
        place = values.setdefault(key, {})
        orders.setdefault(key, factors)
        of_seed = place.setdefault(what, {})
        if seed in of_seed:
            raise ValueError(f"records must each be of other factors, got two of {record['factors']}")
        of_seed[seed] = reached(record, metric)
    found = []
    for key, place in values.items():
        base = place.get(reference, {})
        for what, of_seed in place.items():
            seeds = sorted(of_seed.keys() & base.keys())
            if what == reference or not seeds:
                continue
            pairs = tuple((base[seed], of_seed[seed]) for seed in seeds)
            ends = interval(pairs)
            theirs, ours = map(mean, zip(*pairs, strict=True))
            numbers = (len(seeds), theirs, ours, ours - theirs, *ends, pairs)
            found.append(Comparison(dict(orders[key]), what, *numbers))
    return found


def _hashable(value: Any, name: str) -> Any:
    """A factor's value, of a list or dictionary what it holds, to be told from others."""
    if isinstance(value, list | tuple):
        return tuple(_hashable(item, name) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _hashable(value[key], name)) for key in sorted(value, key=repr))
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"records must have factors of numbers and texts, got {value!r} as {name!r}")


def reached(record: Mapping[str, Any], metric: str) -> float:
    """A number in the result of a record.

    Raises:
        KeyError: the record lacks it.
        ValueError: it is no finite number.
    """
    value = record["result"][metric]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{metric} must be a finite number, got {value!r} in the record of {record['factors']}"
        )
    return value


def sign_test(comparisons: Sequence[Comparison]) -> tuple[int, int, float]:
    """How often the difference is positive, and how surprising that would be if it were a coin's toss.

    Args:
        comparisons: those that count as tosses; differences of zero are left out.

    Returns:
        The number of positive differences, of all that are not zero, and the two-sided p-value.
    """
    from scipy.stats import binomtest

    signs = [c.difference > 0 for c in comparisons if c.difference]
    return sum(signs), len(signs), float(binomtest(sum(signs), len(signs)).pvalue) if signs else 1.0


def in_words(comparisons: Sequence[Comparison]) -> str:
    """What comparisons say together, in sentences: their verdicts, and the sign test.

    >>> worse = Comparison({}, "saliency", 2, 0.5, 0.4, -0.1, -0.11, -0.09)
    >>> print(in_words([worse]).split(".")[0])
    Of 1 comparison, 0 say better, 1 says worse, and 0 cannot tell
    """
    if not comparisons:
        return "Nothing can be compared: no seed has both."
    verdicts = [c.verdict for c in comparisons]
    better, worse, unclear = (verdicts.count(v) for v in ("better", "worse", "cannot tell"))
    positive, of, p = sign_test(comparisons)
    n = len(verdicts)
    return (
        f"Of {n} comparison{'s' * (n != 1)}, {better} say{'s' * (better == 1)} better, {worse} "
        f"say{'s' * (worse == 1)} worse, and {unclear} cannot tell. The difference is positive in "
        f"{positive} of {of}; if signs were a coin's toss, a count as uneven would come up with a "
        f"probability of {p:.2g} (sign test)."
    )


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table of comparisons, in Markdown: accuracies and their differences in percent."""
    if not comparisons:
        return "nothing can be compared: no seed has both"
    header = [*comparisons[0].where, "compared", "seeds", "reference", "value", "difference"]
    rows = []
    for c in comparisons:
        interval = f"{c.low:+.1%} to {c.high:+.1%}" if math.isfinite(c.high - c.low) else "unknown"
        numbers = (f"{c.reference:.1%}", f"{c.value:.1%}", f"{c.difference:+.1%}", interval)
        rows.append((*c.where.values(), c.what, c.n, *numbers, c.verdict))
    return markdown_table([*header, "95 % interval", "verdict"], rows)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; raises a ValueError where there are no values."""
    if not len(values):  # which an array has, too
        raise ValueError("values must hold at least one number, got none")
    return sum(map(float, values)) / len(values)


def interval(pairs: Sequence[tuple[float, float]], confidence: float = 0.95) -> tuple[float, float]:
    """The interval that holds the mean difference of pairs with some confidence, by a paired t-test.

    Args:
        pairs: for each seed, what the reference and what is compared with it reached.
        confidence: a probability, from 0 to 1.

    Returns:
        Its ends: -inf and inf where nothing is known of the spread, see `Comparison`.

    Raises:
        TypeError, ValueError: `confidence` is no probability, there is no pair, or one is not of two finite
            numbers; the message names which.
    """
    confidence = check_number("confidence", confidence, 0, 1)
    known = _spread(pairs)
    if known is None:
        return -math.inf, math.inf
    from scipy.stats import t

    centre, error, unit = known
    half = float(t.ppf((1 + confidence) / 2, len(pairs) - 1)) * error
    return (centre - half) * unit, (centre + half) * unit


def p_value(pairs: Sequence[tuple[float, float]]) -> float:
    """How surprising the mean difference of pairs would be without any effect (two-sided paired t-test).

    One where nothing is known of the spread. For errors see `interval`.
    """
    known = _spread(pairs)
    if known is None:
        return 1.0
    from scipy.stats import t

    centre, error, _ = known
    return 2 * float(t.sf(abs(centre) / error, len(pairs) - 1))


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """For each of several tests, the level at which Holm's procedure decides it (Holm, 1979).

    An interval of confidence 1 - level leaves out zero where the procedure rejects, and only there; all of
    them together err with a probability of `alpha` at most.

    Args:
        p_values: of the tests.
        alpha: the probability that any true hypothesis is rejected.

    Raises:
        TypeError, ValueError: one of these is no probability, from 0 to 1; the message names it.

    >>> holm_levels([0.3, 0.01, 0.04], alpha=0.06)
    [0.03, 0.02, 0.03]
    """
    p_values = [check_number(f"p_values[{i}]", p, 0, 1) for i, p in enumerate(p_values)]
    alpha = check_number("alpha", alpha, 0, 1)
    count, levels, stopped = len(p_values), [0.0] * len(p_values), False
    level = alpha
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        if not stopped:  # from the first test that is not rejected on, none is
            level = alpha / (count - rank)
            stopped = p_values[i] >= level
        levels[i] = level
    return levels


def _spread(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """The mean difference and its standard error, in a unit, which is the last; None: nothing is known of it.

    The unit, a power of two, keeps squares and differences of any numbers from being too large or too small.
    """
    most = sys.float_info.max
    pairs = [check_pair(f"pairs[{i}]", pair, -most, most, "two numbers") for i, pair in enumerate(pairs)]
    largest = max((abs(value) for pair in pairs for value in pair), default=0.0)
    unit = 2.0 ** max(math.frexp(largest)[1] - 1, -1022)
    differences = [ours / unit - theirs / unit for theirs, ours in pairs]
    n, centre = len(differences), mean(differences)
    # equal up to how finely the numbers themselves are told apart
    equal = 4 * sys.float_info.epsilon * largest / unit
    if max(differences) - min(differences) <= equal:
        return None
    return centre, math.sqrt(sum((d - centre) ** 2 for d in differences) / (n - 1) / n), unit
