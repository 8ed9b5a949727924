"""The experiments as grids of training runs: Tables 1 to 3, and what the paper leaves open.

A grid is a list of `Training`: what is varied (the factors), and the settings of one run. What a study
compares is listed here: whatever is registered besides takes no part. Free of torch, so that a mistake is
answered at once.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from salnb._common import catalog
from salnb.study.plans import Plan, load_plan, twin_of
from salnb.study.scale import PLANNED, TUNING, Scale, check_known
from salnb.train.config import PRACTICAL, Config

__all__ = [
    "ALL_IMAGES",
    "OPEN_METHODS",
    "REFERENCES",
    "STUDIES",
    "TABLE1_AUGMENTATIONS",
    "TABLE3_STRATEGIES",
    "UNCHOSEN",
    "Training",
    "trainings",
]

# the nine augmentations of Table 1, in the paper's order
TABLE1_AUGMENTATIONS = (
    "horizontal_flip",
    "vertical_flip",
    "rescale",
    "contrast",
    "rotation",
    "combined",
    "mixup",
    "cutout",
    "augmix",
)

# the rows of Table 3: which augmentation, and the weights of the three losses
_PAPERS_STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {"augmentation": "identity", "alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "class+invariance": {"augmentation": "affine", "alpha": 1 / 2, "beta": 1 / 2, "gamma": 0.0},
    "all three": {"augmentation": "affine", "alpha": 1 / 3, "beta": 1 / 3, "gamma": 1 / 3},
}
# beside them those whose eq. 6 is relative to the distance of different images, which the paper does not say
TABLE3_STRATEGIES = _PAPERS_STRATEGIES | {
    f"{name}, relative": {**settings, "layer_relative": True}
    for name, settings in _PAPERS_STRATEGIES.items()
    if settings["beta"]
}

# the methods that the study of open questions compares with the vanilla gradient
OPEN_METHODS = ("deconvnet", "guided_backprop", "smoothgrad", "grad_cam", "guided_grad_cam")

# the name of the full training set, in the study of open questions
ALL_IMAGES = "all images"

# settings that change what the loss measures, and with it how strong a weight is
_UNITS = frozenset({"normalize", "distance", "pool", "method", "samples"})


class Training(NamedTuple):
    """One training run of a study.

    Attributes:
        study: the study's name.
        factors: what is varied, in words; "seed" is always among them.
        settings: of `salnb.train.Config`, without the folder.
    """

    study: str
    factors: dict[str, Any]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The factors in one word, for the names of files."""
        words = [f"seed{v}" if k == "seed" else str(v) for k, v in self.factors.items()]
        return "-".join("".join(c if c.isalnum() or c in "_.=+" else "_" for c in word) for word in words)

    def config(self, runs: str | Path) -> Config:
        """The settings of the run, in a folder of its own below `runs`.

        The folder is named after the settings: two studies whose settings are equal share one run.
        """
        config = Config(out="run", **self.settings)
        settings = {name: value for name, value in config.to_dict().items() if name not in PRACTICAL}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return dataclasses.replace(config, out=str(Path(runs) / digest))


# from the settings of a run with a weight, to the weight that makes another one's term as strong
Match = Callable[[Mapping[str, Any], Mapping[str, Any]], float]
Gammas = Mapping[str, float]
# the factors of runs and their settings, both without the seed; a network that is no factor is the first
Cells = Iterator[tuple[dict[str, Any], dict[str, Any]]]
# in place of both, where only the other settings matter
UNCHOSEN: tuple[Gammas, Match] = (defaultdict(lambda: 1.0), lambda settings, changed: 1.0)


def trainings(study: str, scale: Scale, gammas: Gammas, match: Match) -> list[Training]:
    """The training runs of a study, seed by seed, so that a study that is stopped early is balanced.

    Args:
        study: a key of `STUDIES`.
        scale: how large.
        gammas: the weight of the saliency loss for each data set; see `salnb.study.choose_gammas`.
        match: from the settings of a run and others that differ in the unit of the saliency loss, to
            the weight with which the latter is as strong; see `salnb.study.match_weight`.

    Raises:
        ValueError: the study is unknown, or settings are not allowed together.
    """
    check_known("study", [study], STUDIES)
    scale, found = scale.for_study(study), []
    cells = list(STUDIES[study](scale, gammas, match))  # once, as weights take time to match
    for seed in scale.gamma_seeds if study in ("gamma", *TUNING) else scale.seeds:
        for factors, settings in cells:
            where = {"data": factors["data"], "model": factors.get("network", scale.networks[0])}
            settings = {**scale.training, **where, **settings, "seed": seed}
            if not settings.get("gamma", 1.0):  # a reference has nothing to balance
                settings.pop("balance", None)
            found.append(Training(study, {**factors, "seed": seed}, settings))
            _config(scale, settings)
    return found


def _config(scale: Scale, settings: Mapping[str, Any]) -> Config:
    try:
        return Config(out="run", **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training of scale {scale.name!r}: {error}") from error


def _gamma(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    """The weights to choose from, on the network and the augmentation that come first."""
    for data, gamma in itertools.product(scale.data, (0.0, *map(float, scale.gammas))):
        factors = {"data": data, "network": scale.networks[0], "gamma": f"{gamma:g}"}
        yield factors, {"augmentation": "affine", "gamma": gamma}


def _with_and_without(augmentations: Sequence[str], scale: Scale, gammas: Gammas, match: Match) -> Cells:
    for data, network, augmentation in itertools.product(scale.data, scale.networks, augmentations):
        for strategy, gamma in {"reference": 0.0, "saliency": gammas[data]}.items():
            factors = {"data": data, "network": network, "augmentation": augmentation, "strategy": strategy}
            yield factors, {"augmentation": augmentation, "gamma": gamma}


def _table3(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    for data, network, strategy in itertools.product(scale.data, scale.networks, TABLE3_STRATEGIES):
        yield {"data": data, "network": network, "strategy": strategy}, TABLE3_STRATEGIES[strategy]


def _open(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    """One factor at a time around a default; each is compared with its reference, which has no such term."""
    for data in scale.data:
        own = {"data": data, "model": scale.networks[0], "augmentation": "affine", "gamma": gammas[data]}
        whole = {**scale.training, **own}
        default = _config(scale, whole)
        sizes, variants = _training_sets(default), _variants(default)
        wanted = [ALL_IMAGES, *(scale.variants or (*sizes, *variants))]
        check_known(f"variants of scale {scale.name!r}: variant", wanted, [*sizes, *variants])
        for images in dict.fromkeys(name for name in wanted if name in sizes):
            for variant, gamma in {"reference": 0.0, "default": gammas[data]}.items():
                factors = {"data": data, "images": images, "variant": variant}
                yield factors, {**whole, **sizes[images], "gamma": gamma}
        for variant in (name for name in wanted if name in variants):
            settings = {**whole, **variants[variant]}
            if _config(scale, settings) == default:
                continue  # that is the default here
            if _UNITS & variants[variant].keys() and not default.balance:
                settings["gamma"] = match(whole, settings)
            yield {"data": data, "images": ALL_IMAGES, "variant": variant}, settings


def _training_sets(default: Config) -> dict[str, dict[str, Any]]:
    """All images, a quarter and a tenth of them, with as many steps."""
    count = _training_images(default)
    sizes: dict[str, dict[str, Any]] = {ALL_IMAGES: {}}
    for part in (4, 10):
        if count // part >= default.batch_size:
            sizes[f"1 in {part}"] = {"train_images": count // part, "epochs": default.epochs * part}
    return sizes


def _variants(default: Config) -> dict[str, dict[str, Any]]:
    steps = default.epochs * (_training_images(default) // default.batch_size)
    variants: dict[str, dict[str, Any]] = {
        f"gamma × {factor:g}": {"gamma": factor * default.gamma} for factor in (0.1, 0.3, 3, 10, 100)
    }
    variants |= {f"normalize={how}": {"normalize": how} for how in ("zscore", "l2", "sum", "none")}
    variants |= {f"distance={how}": {"distance": how} for how in ("l1", "cosine")}
    variants |= {f"pool={size}": {"pool": size} for size in (2, 4)}
    variants |= {f"warmup {share:.0%}": {"warmup": round(share * steps)} for share in (0.25, 0.5)}
    variants |= {f"every={k}": {"every": k} for k in (2, 4)}
    variants["originals fixed"] = {"detach_original": True}
    for method in OPEN_METHODS:
        variants[method] = {"method": method} | ({"samples": 4} if catalog.METHODS[method].repeats else {})
    return variants


def _training_images(config: Config) -> int:
    found = config.train_images or catalog.DATA[config.data].training_images
    if found is None:
        raise ValueError(f"train_images must be given in the study of open questions for {config.data}")
    return found


def _planned(study: str, scale: Scale, gammas: Gammas, match: Match) -> Cells:
    """The arms of a plan; `gammas` has the share of the gradient of each that is tuned."""
    plan = load_plan(study)
    varied = [{"augmentation": name} for name in plan.augmentations] or [{}]
    for data, augmented, (name, arm) in itertools.product(_data(plan, scale), varied, plan.arms.items()):
        tuned = {"balance": gammas[name.removesuffix(twin_of(""))]} if arm.tuned else {}
        yield {"data": data, **augmented, "arm": name}, {**arm.settings, **augmented, **tuned}


def _data(plan: Plan, scale: Scale) -> tuple[str, ...]:
    """The data sets of a plan: the one that its question is about, at any scale, or those of the scale."""
    return (plan.settings["data"],) if "data" in plan.settings else scale.data


def _tuning(study: str, scale: Scale, gammas: Gammas, match: Match) -> Cells:
    """Each arm that is tuned with each share of the gradient, beside the references."""
    plan = load_plan(study)
    for name, balances in plan.candidates().items():
        for balance in balances:
            factors = {"data": _data(plan, scale)[0], "arm": name, "balance": f"{balance:g}"}
            share = {"balance": balance} if balance else {}
            yield factors, {**plan.arms[name].settings, **share}


# for each study: the factor whose values are compared, with which of them, and by what
REFERENCES = {
    "gamma": ("gamma", "0", "validation_accuracy"),
    "table1": ("strategy", "reference", "test_accuracy"),
    "table2": ("strategy", "reference", "test_accuracy"),
    "table3": ("strategy", "none", "test_accuracy"),
    "open": ("variant", "reference", "test_accuracy"),
    **dict.fromkeys(TUNING, ("balance", "0", "validation_accuracy")),
    **dict.fromkeys(("treated", "treated-again"), ("arm", "silu", "test_accuracy")),
    "few-labels": ("arm", "labels", "test_accuracy"),
    "shortcut": ("arm", "reference", "test_worst_group_accuracy"),
    "table1-again": ("arm", "reference", "test_accuracy"),
}

STUDIES: dict[str, Callable[[Scale, Gammas, Match], Cells]] = {
    "gamma": _gamma,
    "table1": functools.partial(_with_and_without, TABLE1_AUGMENTATIONS),
    "table2": functools.partial(_with_and_without, ("simclr",)),
    "table3": _table3,
    "open": _open,
    **{name: functools.partial(_tuning, name.removesuffix("-tuning")) for name in TUNING},
    **{study: functools.partial(_planned, study) for study in PLANNED},
}
