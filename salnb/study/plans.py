"""Plans: what a study asks, and how it will be answered, written down before its first training run.

A plan is a file `results/plans/STUDY.yml`, in the form that `Plan` has, and is committed before there is a
record; each record names that commit. Nothing is tuned after it, and a plan that changes is a new file.

Free of torch, so that a mistake is answered at once.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salnb import results
from salnb._common import catalog
from salnb._common.yaml_file import number_as_written, read_yaml
from salnb.study.scale import PLANNED, Scale, load_scale, scale_as_written
from salnb.train.config import as_written

__all__ = ["Arm", "Gate", "Plan", "identity", "load_plan", "twin_of"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What an arm must have reached for its accuracy to say anything about agreement.

    Attributes:
        metric: of the runs' results, how far the maps agree.
        rise: by how much its mean must lie above the reference's.
        accuracy: the least training accuracy, as a share of the reference's.
    """

    metric: str = "test_correlation"
    rise: float = 0.05
    accuracy: float = 0.8


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train, and what it is compared with.

    Attributes:
        settings: of `salnb.train.Config`, beside those that all runs share.
        reference: name of the arm that it is compared with; None: it is one that others are compared with.
        tuned: whether its `balance` is chosen among those of the plan, on the tuning seeds.
        twin: whether there is an arm "NAME, shuffled" with the same settings and pairs of different images.
        primary: whether the plan's question is answered by this arm.
        gated: whether its maps have to agree; a control that is not about agreement only must not collapse.
        is_twin: whether it is such an arm itself.
    """

    settings: Mapping[str, Any]
    reference: str | None = None
    tuned: bool = False
    twin: bool = False
    primary: bool = False
    gated: bool = True
    is_twin: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study asks, and how it will be answered.

    Attributes:
        study: its name.
        question: in words.
        decision: the rule, in words; `salnb.study.verdicts` is the same in code.
        scale: as in a scale file: data, networks, settings, seeds, and `gamma_seeds` to choose shares by.
        settings: of `salnb.train.Config`, that all arms have at any scale.
        arms: by name, each with these settings; the twins are among them.
        metric: of the runs' results, what is compared.
        augmentations: with which every arm is run; the primary comparisons are of the means over them. None
            named: the one of the settings.
        balances: to choose from for the arms that are tuned: the largest with which no run collapses.
        gate: what an arm must have reached.
        negligible: a difference this small, or smaller, does not matter.
        valid_if: the arm, a positive control, that has to help if the others are to say anything; None: none.
    """

    study: str
    question: str
    decision: str
    scale: Mapping[str, Any]
    settings: Mapping[str, Any]
    arms: Mapping[str, Arm]
    metric: str = "test_accuracy"
    augmentations: tuple[str, ...] = ()
    balances: tuple[float, ...] = ()
    gate: Gate = field(default_factory=Gate)
    negligible: float = 0.01
    valid_if: str | None = None

    def candidates(self) -> dict[str, tuple[float, ...]]:
        """The shares to choose from, for each arm that is tuned; a single 0 for each of their references."""
        tuned = {name: arm for name, arm in self.arms.items() if arm.tuned and not arm.is_twin}
        references = dict.fromkeys((str(arm.reference) for arm in tuned.values()), (0.0,))
        return {**references, **dict.fromkeys(tuned, self.balances)}

    def own_scale(self) -> Scale:
        """The scale that the plan is for."""
        return dataclasses.replace(load_scale(self.scale), name="plan")


def twin_of(name: str) -> str:
    """The name of an arm's twin, whose pairs are of different images."""
    return f"{name}, shuffled"


@functools.cache
def load_plan(study: str) -> Plan:
    """The plan of a study.

    Args:
        study: one of `salnb.study.scale.PLANNED`.

    Raises:
        ValueError: there is none, or it names what there is not.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    if study not in PLANNED:
        raise catalog.unknown("plan", study, PLANNED)
    try:
        return _plan(study, read_yaml(_path(study), what="a plan"))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"plan of {study}, {_path(study)}: {why}") from error


def _plan(study: str, values: Any) -> Plan:
    if not isinstance(values, dict):
        raise ValueError(f"a mapping is expected, got {type(values).__name__}")
    arms = {
        name: Arm(**{**arm, "settings": as_written({**values["settings"], **arm["settings"]})})
        for name, arm in values.pop("arms").items()
    }
    for name, arm in arms.items():
        if arm.reference is not None and arm.reference not in arms:
            raise catalog.unknown(f"reference of {name!r}", arm.reference, arms)
    twins = {
        twin_of(name): dataclasses.replace(
            arm, settings={**arm.settings, "shuffle_pairs": True}, twin=False, primary=False, is_twin=True
        )
        for name, arm in arms.items()
        if arm.twin
    }
    if (control := values.get("valid_if")) is not None and control not in arms:
        raise catalog.unknown("valid_if", control, arms)
    numbers = {name: number_as_written(values[name]) for name in ("balances", "negligible") if name in values}
    values = {**values, **numbers, "scale": scale_as_written(values["scale"])}
    gate = Gate(**{name: number_as_written(value) for name, value in values.pop("gate", {}).items()})
    several: dict[str, Any] = {name: tuple(values.pop(name, ())) for name in ("balances", "augmentations")}
    return Plan(study=study, arms={**arms, **twins}, gate=gate, **several, **values)


def identity(study: str) -> dict[str, Any]:
    """What a record says of its plan: the file's name, its SHA-256 and the commit that last changed it.

    The commit is None in an installed package.

    Raises:
        ValueError: in a source tree, the plan as it is has not been committed.
        OSError, RuntimeError: git is not installed, or fails.
    """
    path = _path(study)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": f"results/plans/{path.name}", "sha256": digest, "commit": results.last_commit(path)}


def _path(study: str) -> Path:
    return results.published() / "plans" / f"{study}.yml"
