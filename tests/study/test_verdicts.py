"""Plans and what they decide: the rule by cases, its errors by simulation, and what records say of their plan."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from salnb import results
from salnb.__main__ import main
from salnb.statistics import holm_levels, interval, p_value
from salnb.study import plans, verdicts
from salnb.study.grids import TABLE1_AUGMENTATIONS, UNCHOSEN, trainings
from salnb.study.plans import Arm, Gate, Plan, load_plan, twin_of
from salnb.study.scale import PLANNED, TUNING, load_scale
from salnb.study.weights import choose_balances

PLAN = Plan(
    study="treated",
    question="?",
    decision="!",
    scale={},
    settings={},
    arms={
        "plain": Arm(settings={"gamma": 0}),
        "maps": Arm(settings={}, reference="plain", tuned=True, twin=True, primary=True),
        twin_of("maps"): Arm(settings={"shuffle_pairs": True}, reference="plain", tuned=True, is_twin=True),
        "other": Arm(settings={}, reference="plain", tuned=True),
    },
    balances=(0.1, 0.3),
)


def record(arm, seed, accuracy, *, correlation=0.4, train=0.9, **changes):
    result = {"test_accuracy": accuracy, "test_correlation": correlation, "train_accuracy": train}
    factors = {"data": "digit-scenes", "arm": arm, "seed": seed}
    return {"status": "done", "factors": factors, "result": result, "name": f"{arm}-{seed}"} | changes


def study_of(**arms):
    """Records from accuracies for each seed, with what is special about the arm's runs."""
    return [
        record(name.replace("_", ", "), seed, accuracy, **special)
        for name, (accuracies, special) in arms.items()
        for seed, accuracy in enumerate(accuracies)
    ]


SPREAD = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])
TREATED = {"correlation": 0.5}


def verdict_of(shift, special, *, scale=0.1, twin=0.0):
    """The verdicts on "maps", against its reference and its twin."""
    base = 0.5 + SPREAD[::-1]
    found = verdicts.judge(
        PLAN,
        study_of(
            plain=(base, {}),
            maps=(base + shift + scale * SPREAD, special),
            maps_shuffled=(base + twin - scale * SPREAD, {}),
        ),
    )
    assert [v.against for v in found] == ["plain", "maps, shuffled"]
    assert all(v.primary for v in found)
    return [v.verdict for v in found]


@pytest.mark.parametrize(
    ("shift", "special", "scale", "expected"),
    [
        (0.05, TREATED, 0.1, "helps"),
        (-0.05, TREATED, 0.1, "hurts"),
        (0.001, TREATED, 0.1, "negligible"),
        (0.02, TREATED, 2.0, "cannot tell"),
        (0.0, TREATED, 2.0, "cannot tell"),
        (0.05, {"correlation": 0.449}, 0.1, "not treated"),
        (0.05, {"correlation": 0.451}, 0.1, "helps"),
        (0.05, TREATED | {"train": 0.719}, 0.1, "not treated"),
        (0.05, TREATED | {"train": 0.721}, 0.1, "helps"),
        (-0.05, {}, 0.1, "not treated"),
    ],
)
def test_the_rule(shift, special, scale, expected):
    assert verdict_of(shift, special, scale=scale)[0] == expected


def test_what_the_twin_has_as_well_is_not_due_to_agreement():
    assert verdict_of(0.05, TREATED, twin=0.05) == ["helps", "negligible"]
    assert verdict_of(0.05, TREATED, twin=0.0) == ["helps", "helps"]


def test_an_arm_with_a_failed_run_is_not_treated():
    records = study_of(plain=(0.5 + SPREAD, {}), other=(0.6 + 1.1 * SPREAD, TREATED))
    assert [v.verdict for v in verdicts.judge(PLAN, records)] == ["helps"]
    records[-1] |= {"status": "failed", "error": "NonFiniteError"}
    assert [(v.verdict, v.comparison.n) for v in verdicts.judge(PLAN, records)] == [("not treated", 4)]


def test_nothing_is_said_of_arms_without_records():
    assert verdicts.judge(PLAN, study_of(plain=([0.5], {}))) == []


# --- controls ----------------------------------------------------------------------------------------------


def with_control(shift, special=None):
    """The verdicts of a plan that says something only if "other", which need not agree, helps."""
    arms = PLAN.arms | {"other": dataclasses.replace(PLAN.arms["other"], gated=False)}
    plan = dataclasses.replace(PLAN, arms=arms, valid_if="other")
    records = study_of(
        plain=(0.5 + SPREAD[::-1], {}),
        maps=(0.55 + SPREAD[::-1] + 0.1 * SPREAD, TREATED),
        other=(0.5 + SPREAD[::-1] + shift + 0.1 * SPREAD, special or {}),
    )
    return {v.comparison.what: v.verdict for v in verdicts.judge(plan, records)}


def test_a_task_is_invalid_unless_the_positive_control_helps():
    assert with_control(0.05) == {"maps": "helps", "other": "helps"}
    assert with_control(0.0) == {"maps": "task invalid", "other": "negligible"}
    assert with_control(-0.05) == {"maps": "task invalid", "other": "hurts"}


def test_a_control_without_a_gate_must_not_collapse():
    assert with_control(0.05, {"correlation": -1.0})["other"] == "helps"
    assert with_control(0.05, {"train": 0.5}) == {"maps": "task invalid", "other": "not treated"}


def test_without_its_control_nothing_is_said():
    plan = dataclasses.replace(PLAN, valid_if="other")
    records = study_of(plain=(0.5 + SPREAD, {}), maps=(0.6 + 1.1 * SPREAD, TREATED))
    assert [v.verdict for v in verdicts.judge(plan, records)] == ["task invalid"]


# --- Holm's procedure --------------------------------------------------------------------------------------


def rejected_by_holm(p_values, alpha=0.05):
    """From the definition: the smallest first, each at alpha over those that are left, until one is not."""
    rejected = [False] * len(p_values)
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] >= alpha / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def test_adjusted_intervals_leave_out_zero_where_holm_rejects():
    generator = np.random.default_rng(0)
    for _ in range(200):
        samples = generator.normal(generator.choice([0.0, 0.02], 4)[:, None], 0.02, (4, 8))
        pairs = [[(0.5, 0.5 + d) for d in row] for row in samples]
        p_values = [p_value(each) for each in pairs]
        levels = holm_levels(p_values)
        for each, level, rejected in zip(pairs, levels, rejected_by_holm(p_values), strict=True):
            low, high = interval(each, 1 - level)
            assert (low > 0 or high < 0) == rejected


def test_p_values_are_those_of_a_paired_t_test():
    from scipy import stats

    pairs = [(0.5, 0.6), (0.4, 0.43), (0.6, 0.61), (0.3, 0.37)]
    expected = stats.ttest_rel(*zip(*[(ours, theirs) for theirs, ours in pairs], strict=True))
    assert p_value(pairs) == pytest.approx(expected.pvalue)
    assert interval(pairs, 0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert p_value([(0.5, 0.6)] * 3) == p_value([(0.5, 0.6)]) == 1
    assert holm_levels([]) == []


# --- by simulation -----------------------------------------------------------------------------------------


def simulated(generator, effect, *, seeds=8, deviation=0.02):
    """The verdicts on "maps" where each arm differs from the reference by `effect` on average."""
    base = generator.normal(0.5, 0.05, seeds)
    arms = {
        name: (base + shift + generator.normal(0, deviation, seeds), TREATED)
        for name, shift in (("maps", effect), ("maps_shuffled", 0.0))
    }
    return [v.verdict for v in verdicts.judge(PLAN, study_of(plain=(base, {}), **arms))]


def share(effect, what, runs=400, **options):
    generator = np.random.default_rng(1)
    return np.mean([what(simulated(generator, effect, **options)) for _ in range(runs)])


def claims(found):
    return bool({"helps", "hurts"} & set(found))


def test_without_an_effect_a_claim_is_as_rare_as_promised():
    assert share(0.0, claims) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_a_large_effect_is_found_and_a_relevant_one_rarely_called_negligible():
    assert share(0.06, lambda found: found[0] == "helps") > 0.95
    assert share(0.01, lambda found: found[0] == "negligible", deviation=0.01) <= 0.05 + 0.033
    assert share(0.0, lambda found: found[0] == "negligible", deviation=0.005) > 0.9


# --- several augmentations ---------------------------------------------------------------------------------

SEVERAL = dataclasses.replace(
    PLAN,
    augmentations=("rotation", "contrast"),
    arms={"plain": PLAN.arms["plain"], "maps": Arm(settings={}, reference="plain", primary=True)},
)


def of_several(seed, augmentation, arm, accuracy, **changes):
    one = record(arm, seed, accuracy, **changes)
    data, *others = one["factors"].items()
    return one | {"factors": dict([data, ("augmentation", augmentation), *others])}


def several(last="done"):
    """Three seeds of both arms; contrast gains two points and agrees, rotation loses one and does not."""
    shifts = {"contrast": (0.02, 0.55), "rotation": (-0.01, 0.4)}
    made = []
    for seed in range(3):
        for name, (shift, agreed) in shifts.items():
            level = 0.5 + 0.01 * seed
            made.append(of_several(seed, name, "plain", level))
            made.append(of_several(seed, name, "maps", level + shift + 0.001 * seed, correlation=agreed))
    return [*made[:-1], made[-1] | {"status": last}]


def test_the_primary_comparison_is_of_the_means_over_the_augmentations():
    pooled, *single = verdicts.judge(SEVERAL, several())
    assert pooled.comparison.where == {"data": "digit-scenes", "augmentation": verdicts.POOLED}
    assert pooled.primary
    assert not any(v.primary for v in single)
    assert pooled.rise == pytest.approx(0.075)  # the mean of 0.15 and 0
    assert pooled.comparison.differences == pytest.approx([0.005, 0.006, 0.007])
    assert pooled.verdict == "helps"
    found = {v.comparison.where["augmentation"]: (v.treated, v.comparison.difference) for v in single}
    assert found == {
        "contrast": (True, pytest.approx(0.021)),
        "rotation": (False, pytest.approx(-0.009)),
    }
    # alone, so at the level of one test
    assert pooled.comparison.low == pytest.approx(interval(pooled.comparison.pairs)[0])


def test_a_seed_that_lacks_an_augmentation_is_not_in_the_mean():
    pooled, *_ = verdicts.judge(SEVERAL, several()[:-1])
    assert pooled.comparison.n == 2


def test_a_run_that_failed_spoils_the_gate_of_the_mean():
    pooled, *_ = verdicts.judge(SEVERAL, several("failed"))
    assert (pooled.comparison.n, pooled.verdict) == (2, "not treated")


def test_a_plan_with_augmentations_runs_each_arm_with_each_of_them():
    plan = load_plan("table1-again")
    assert plan.augmentations == TABLE1_AUGMENTATIONS
    planned = trainings("table1-again", plan.own_scale(), *UNCHOSEN)
    first = planned[: 9 * len(plan.arms)]
    assert {t.factors["seed"] for t in first} == {plan.scale["seeds"][0]}
    assert {(t.factors["augmentation"], t.factors["arm"]) for t in first} == set(
        itertools.product(plan.augmentations, plan.arms)
    )
    assert all(t.settings["augmentation"] == t.factors["augmentation"] for t in planned)


# --- tables ------------------------------------------------------------------------------------------------


def test_tables_say_how_far_maps_agree_first():
    records = study_of(plain=(0.5 + SPREAD, {}), maps=(0.6 + 1.1 * SPREAD, TREATED))
    table = verdicts.agreement_table(records, "arm").splitlines()
    assert table[0].startswith("| data | arm | seeds | correlation | of 4×4 blocks |")
    assert "| digit-scenes | maps | 5 | 0.500 | – |" in table[3]
    assert verdicts.agreement_table([r | {"result": {"test_accuracy": 1.0}} for r in records], "arm") == ""
    rows = verdicts.markdown(verdicts.judge(PLAN, records)).splitlines()
    assert len(rows) == 3
    assert re.search(r"\*\*maps\*\* \| plain \| 5 \| \+0.100 \| \+10.0 \| .* \| helps \|", rows[2])


# --- the choice of a share ---------------------------------------------------------------------------------


def tuning(**accuracies):
    return [
        {
            "status": "done" if accuracy else "failed",
            "factors": {"arm": arm, "balance": balance, "seed": seed},
            "result": {"train_accuracy": accuracy},
        }
        for arm, by_balance in {"plain": {"0": [0.5, 0.6]}, **accuracies}.items()
        for balance, values in by_balance.items()
        for seed, accuracy in enumerate(values)
    ]


def test_the_largest_share_with_which_no_run_collapses_is_chosen():
    records = tuning(
        maps={"0.1": [0.5, 0.5], "0.3": [0.5, 0.47]},  # 0.48 is 0.8 of the reference's
        other={"0.1": [0.41, 0.6], "0.3": [0.41, 0.49]},
    )
    assert choose_balances(PLAN, records) == {"maps": 0.1, "other": 0.3}
    records = tuning(maps={"0.1": [0.1, 0.1], "0.3": [0.9, None]}, other={"0.1": [1, 1], "0.3": [1, 1]})
    assert choose_balances(PLAN, records) == {"maps": 0.1, "other": 0.3}


# --- the plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", PLANNED)
def test_every_plan_is_sound(study):
    plan = load_plan(study)
    scale = plan.own_scale()
    assert scale.name == "plan"
    assert scale.training["test_scenes"] >= 10_000
    assert scale.training["precision"] == "32"
    assert any(arm.primary for arm in plan.arms.values())
    planned = trainings(study, scale, *UNCHOSEN)
    assert {t.factors["seed"] for t in planned} == set(scale.seeds)
    choice = f"{study}-tuning"
    assert (choice in TUNING) == any(arm.tuned for arm in plan.arms.values())
    if choice in TUNING:
        seeds = {t.factors["seed"] for t in trainings(choice, scale, *UNCHOSEN)}
        assert seeds.isdisjoint(scale.seeds)
    settings = {t.factors["arm"]: {k: v for k, v in t.settings.items() if k != "seed"} for t in planned}
    for name, arm in plan.arms.items():
        if arm.twin:
            assert settings[twin_of(name)] == settings[name] | {"shuffle_pairs": True}


@pytest.mark.parametrize("scale", ["plan", "smoke", "gpu"])
def test_the_plan_of_shortcut_is_about_its_own_data_at_any_scale(scale):
    plan = load_plan("shortcut")
    scale = plan.own_scale() if scale == "plan" else load_scale(scale)
    for study in ("shortcut", "shortcut-tuning"):
        planned = trainings(study, scale, *UNCHOSEN)
        assert {t.factors["data"] for t in planned} == {"digit-scenes-shortcut"}
        assert {t.settings["data"] for t in planned} == {"digit-scenes-shortcut"}
    assert plan.arms[plan.valid_if].settings["right_reasons"]


def test_a_twin_has_the_share_of_its_arm():
    plan = load_plan("treated")
    chosen = {name: 0.01 * i for i, name in enumerate(plan.candidates(), 1)}
    planned = trainings("treated", plan.own_scale(), chosen, UNCHOSEN[1])
    shares = {t.factors["arm"]: t.settings.get("balance") for t in planned}
    for name, arm in plan.arms.items():
        if arm.twin:
            assert shares[name] == shares[twin_of(name)] == chosen[name]
    assert shares["silu"] is None


def test_a_record_names_the_commit_of_its_plan(monkeypatch, tmp_path):
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "treated.yml").write_text("x")
    monkeypatch.setattr(results, "published", lambda: tmp_path)
    monkeypatch.setattr(results, "last_commit", lambda path: f"of {path.name}")
    found = plans.identity("treated")
    assert found["file"] == "results/plans/treated.yml"
    assert found["commit"] == "of treated.yml"
    assert found["sha256"] == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"plan 'treatd' is unknown.*did you mean 'treated'"):
        load_plan("treatd")
    assert main(["study", "gamma", "--scale", "plan", "--out", "x"]) == 2


@pytest.mark.usefixtures("few_scenes")
def test_a_study_with_a_plan_runs_from_its_choice_to_its_verdicts(tmp_path, capsys, monkeypatch):
    plan = load_plan("treated")
    arms = {name: plan.arms[name] for name in ("silu", "silu zscore", twin_of("silu zscore"))}
    small = dataclasses.replace(plan, arms=arms, balances=(0.1,), gate=Gate(rise=-2.0, accuracy=0.0))
    for module in ("grids", "runner"):
        monkeypatch.setattr(f"salnb.study.{module}.load_plan", lambda study: small)
    monkeypatch.setattr("salnb.__main__.load_plan", lambda study: small)
    assert main(["study", "treated", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("correlation") < out.index("verdict")
    assert len(list((tmp_path / "treated").glob("*.json"))) == 6
    assert len(list((tmp_path / "treated-tuning").glob("*.json"))) == 2
    record = results.read_record(next((tmp_path / "treated").glob("*silu_zscore-seed0.json")))
    assert record["result"]["config"]["balance"] == 0.1
    assert "plan" not in record
