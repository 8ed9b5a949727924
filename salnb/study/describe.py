"""What the records of a study say, as tables and sentences in Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from salnb._common.tables import markdown_table
from salnb.statistics import Comparison

__all__ = ["coverage", "listed", "ranking", "stacked", "table", "verdicts"]

Row = TypeVar("Row")


def listed(words: Iterable[str]) -> str:
    """Words in a row.

    >>> listed(["none", "class", "all three"])
    'none, class and all three'
    """
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def table(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], object]]) -> str:
    """A table with a row for each of some things, such as comparisons.

    Args:
        rows: the things.
        columns: for the name of each column, what makes its cell from a thing.

    >>> print(table([3, 4], {"n": str, "square": lambda n: n * n}))
    | n | square |
    |---|---|
    | 3 | 9 |
    | 4 | 16 |
    """
    cells = ([cell(row) for cell in columns.values()] for row in rows)
    return markdown_table(list(columns), cells, rule="---")


def stacked(*tables: str) -> str:
    """One table of several that have the same columns."""
    first, *others = (each.splitlines() for each in tables)
    return "\n".join([*first, *(line for lines in others for line in lines[2:])])


def coverage(
    planned: Mapping[str, Sequence[Mapping[str, Any]]], records: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """A table of what has been run, beside what the paper's scale asks for: studies by data set and network.

    Args:
        planned: for each study, the factors of the trainings of the paper's scale.
        records: for each study, its records.
    """
    rows = []
    for study, found in records.items():
        plan = [(factors["data"], factors["network"]) for factors in planned[study]]
        ran = [(record["factors"]["data"], record["factors"]["network"]) for record in found]
        ended = list(zip(ran, (record["status"] for record in found), strict=True))
        for place in dict.fromkeys([*plan, *ran]):
            done, failed = (ended.count((place, status)) for status in ("done", "failed"))
            rows.append((study, *place, plan.count(place) or "–", done or "none", failed))
    header = ("study", "data", "network", "runs of the paper's scale", "recorded", "failed")
    return markdown_table(header, rows, rule="---")


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """Which settings are better than the reference, worse, or indistinguishable from it, in sentences."""
    words = {"better": "better than", "worse": "worse than", "cannot tell": "indistinguishable from"}
    return [
        f"**{len(names)} of {len(comparisons)} settings are {which} the reference**: {listed(names)}."
        for verdict, which in words.items()
        if (names := _named(comparisons, verdict))
    ]


def ranking(comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences on the settings of a study: the best and the worst, what helps and what hurts, and chance."""
    if not comparisons:
        raise ValueError("comparisons must hold at least one, got none")
    ranked = sorted(comparisons, key=lambda c: -c.difference)
    best, last = ranked[0], ranked[-1]
    useful, harmful = (_named(ranked, verdict) for verdict in ("better", "worse"))
    return [
        f"On these data the best mean is that of **{best.what}** ({100 * best.difference:+.1f} points, "
        f"{best.verdict}), the worst that of **{last.what}** ({100 * last.difference:+.1f} points, "
        f"{last.verdict}).",
        f"Shown to help, in this order: {listed(useful)}."
        if useful
        else "**No setting is shown to help here.**",
        *([f"Shown to hurt: {listed(harmful)}."] if harmful else []),
        f"Of {len(ranked)} intervals of 95 %, about {0.05 * len(ranked):.1f} would leave out zero if no "
        "setting changed anything: a single verdict in such a list is a hint, to be asked again as above.",
    ]


def _named(comparisons: Sequence[Comparison], verdict: str) -> list[str]:
    return [c.what for c in comparisons if c.verdict == verdict]
