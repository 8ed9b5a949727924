"""What the records of a study with a plan say, by the rule that the plan wrote down before there were any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from salnb._common.tables import markdown_table
from salnb.statistics import Comparison, compare, holm_levels, interval, mean, p_value, reached
from salnb.study.plans import Plan, twin_of
from salnb.study.values import done

__all__ = ["POOLED", "Verdict", "agreement_table", "judge", "markdown"]

Record = Mapping[str, Any]

# in place of an augmentation: the mean over all of a plan
POOLED = "mean of all"

# how far maps agree, and how much is in them: columns of a table, with the metrics and their form
_AGREEMENT = {
    "correlation": ("test_correlation", "{:.3f}"),
    "of 4×4 blocks": ("test_correlation_4x4", "{:.3f}"),
    "with another's": ("test_correlation_others", "{:.3f}"),
    "eq. 7": ("test_map_distance", "{:.4f}"),
    "half of a map on": ("test_half_area", "{:.1%}"),
    "on the object": ("test_saliency_on_object", "{:.1%}"),
    "training accuracy": ("train_accuracy", "{:.1%}"),
}


@dataclass(frozen=True)
class Verdict:
    """What a plan's rule says of one comparison.

    Attributes:
        comparison: of the arm with its reference or its twin, with an interval adjusted after Holm within the
            primary comparisons, or within all others.
        against: the arm that it is compared with.
        inner: the 90 % interval.
        rise: of the gate's metric, over the reference.
        treated: whether the arm has passed the gate.
        primary: whether the plan's question is answered by it.
        negligible: how small a difference does not matter.
        valid: whether the plan's positive control, if it has one, helps.
    """

    comparison: Comparison
    against: str
    inner: tuple[float, float]
    rise: float
    treated: bool
    primary: bool
    negligible: float
    valid: bool = True

    @property
    def verdict(self) -> str:
        """One of "task invalid", "not treated", "helps", "hurts", "negligible" and "cannot tell"."""
        if not self.valid:
            return "task invalid"
        if not self.treated:
            return "not treated"
        if self.comparison.verdict != "cannot tell":
            return {"better": "helps", "worse": "hurts"}[self.comparison.verdict]
        low, high = self.inner
        return "negligible" if -self.negligible < low and high < self.negligible else "cannot tell"


def judge(plan: Plan, records: Sequence[Record]) -> list[Verdict]:
    """The verdicts on a plan's arms, each against its reference and, where it has one, against its twin.

    Args:
        plan: the plan.
        records: of its study. An arm with a run that failed has not passed the gate; seeds that are missing
            on one side are left out.

    Returns:
        The primary ones first, then in the order of the plan. Unless the plan's positive control helps, the
        task cannot show what the plan asks, and all others are "task invalid". Of a plan with several
        augmentations also those of the means over them, as the augmentation `POOLED`; only these are primary.
    """
    found = []
    records = [*_pooled(plan, records), *records]
    for name, arm in plan.arms.items():
        if arm.reference is None or arm.is_twin:
            continue
        for where in dict.fromkeys(map(_where, records)):
            ours = [record for record in records if _where(record) == where]
            rise, treated = _gate(plan, ours, name, arm.reference)
            primary = arm.primary and dict(where).get("augmentation", POOLED) == POOLED
            for other in (arm.reference, *([twin_of(name)] if arm.twin else [])):
                for comparison in _compared(ours, name, other, plan.metric):
                    inner = interval(comparison.pairs, 0.9)
                    found.append(Verdict(comparison, other, inner, rise, treated, primary, plan.negligible))
    primary, others = ([v for v in found if v.primary is which] for which in (True, False))
    return _valid(plan, [*_adjusted(primary), *_adjusted(others)])


def _where(record: Record) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in record["factors"].items() if name not in ("arm", "seed"))


def _pooled(plan: Plan, records: Sequence[Record]) -> list[Record]:
    """For each arm and seed, one record with the means over the plan's augmentations, if all are there."""
    groups: dict[tuple, list[Record]] = {}
    for record in records if plan.augmentations else ():
        factors = {**record["factors"], "augmentation": POOLED}
        groups.setdefault(tuple(factors.items()), []).append(record)
    pooled: list[Record] = []
    for key, group in groups.items():
        factors = dict(key)
        if len(group) < len(plan.augmentations):
            continue
        if len(done(group)) < len(group):
            pooled.append({"factors": factors, "status": "failed"})
            continue
        names = (plan.metric, plan.gate.metric, "train_accuracy")
        means = {name: mean([reached(record, name) for record in group]) for name in names}
        pooled.append({"factors": factors, "status": "done", "result": means})
    return pooled


def _valid(plan: Plan, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same, invalid on data where the positive control does not help."""
    if plan.valid_if is None:
        return list(verdicts)
    controls = [v for v in verdicts if v.comparison.what == plan.valid_if]
    proved = [v.comparison.where for v in controls if v.verdict == "helps"]
    return [v if v in controls else replace(v, valid=v.comparison.where in proved) for v in verdicts]


def _compared(records: Sequence[Record], name: str, other: str, metric: str) -> list[Comparison]:
    pair = [record for record in records if record["factors"]["arm"] in (name, other)]
    return compare(pair, "arm", other, metric=metric)


def _gate(plan: Plan, records: Sequence[Record], name: str, reference: str) -> tuple[float, bool]:
    """The rise of the gate's metric, and whether the arm has passed; without a gate it must not collapse."""
    rises = _compared(records, name, reference, plan.gate.metric)
    learnt = _compared(records, name, reference, "train_accuracy")
    if not rises or not learnt:
        return 0.0, False
    failed = any(r["status"] == "failed" and r["factors"]["arm"] == name for r in records)
    sound = learnt[0].value >= plan.gate.accuracy * learnt[0].reference
    rise = rises[0].difference
    return rise, not failed and sound and (rise >= plan.gate.rise or not plan.arms[name].gated)


def _adjusted(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same with the intervals of Holm's procedure."""
    levels = holm_levels([p_value(v.comparison.pairs) for v in verdicts])
    adjusted = []
    for v, level in zip(verdicts, levels, strict=True):
        low, high = interval(v.comparison.pairs, 1 - level)
        adjusted.append(replace(v, comparison=replace(v.comparison, low=low, high=high)))
    return adjusted


def agreement_table(records: Sequence[Record], factor: str) -> str:
    """How far the maps of each kind of run agree, in Markdown; "" where no record says so.

    Args:
        records: of a study.
        factor: the factor whose values are compared; the others, but for the seed, have columns too.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in done(records):
        if record["result"].get("test_correlation") is not None:
            others = {k: v for k, v in record["factors"].items() if k not in ("seed", factor)}
            groups.setdefault((*others.items(), (factor, record["factors"][factor])), []).append(record)
    if not groups:
        return ""
    rows = []
    for factors, group in groups.items():
        cells = []
        for metric, form in _AGREEMENT.values():
            known = [reached(r, metric) for r in group if r["result"].get(metric) is not None]
            cells.append(form.format(mean(known)) if known else "–")
        rows.append((*dict(factors).values(), len(group), *cells))
    return markdown_table([*dict(next(iter(groups))), "seeds", *_AGREEMENT], rows)


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of verdicts, in Markdown: differences in points, with their adjusted and 90 % intervals."""
    rows = []
    for v in verdicts:
        c = v.comparison
        rows.append(
            (
                *c.where.values(),
                f"**{c.what}**" if v.primary else c.what,
                "its twin" if v.against == twin_of(c.what) else v.against,
                c.n,
                f"{v.rise:+.3f}",
                f"{100 * c.difference:+.1f}",
                f"{100 * c.low:+.1f} to {100 * c.high:+.1f}",
                f"{100 * v.inner[0]:+.1f} to {100 * v.inner[1]:+.1f}",
                v.verdict,
            )
        )
    header = ["arm", "against", "seeds", "rise of the correlation", "points", "Holm", "90 %", "verdict"]
    return markdown_table([*(verdicts[0].comparison.where if verdicts else ()), *header], rows)
