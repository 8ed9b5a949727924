"""The experiments as grids of training runs: Tables 1 to 3, and what the paper leaves open.

A grid is a list of `Training`: what is varied (the factors), and the settings of one run. `Scale` says how
large a grid is, from a smoke test to the paper's own. Free of torch, so that a mistake is answered at once.
"""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from salnb._common import catalog
from salnb.train.config import PRACTICAL, Config

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
TABLE3_STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {"augmentation": "identity", "alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "class+invariance": {"augmentation": "affine", "alpha": 1 / 2, "beta": 1 / 2, "gamma": 0.0},
    "all three": {"augmentation": "affine", "alpha": 1 / 3, "beta": 1 / 3, "gamma": 1 / 3},
}

# the methods that the study of open questions compares with the vanilla gradient
OPEN_METHODS = ("deconvnet", "guided_backprop", "smoothgrad", "grad_cam", "guided_grad_cam")

# the name of the full training set, in the study of open questions
WHOLE = "all images"

# settings that change what the loss measures, and with it how strong a weight is
_UNITS = frozenset({"normalize", "distance", "pool", "method", "samples"})


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the grids are.

    Attributes:
        name: what the scale is called.
        data: data sets.
        networks: networks.
        seeds: one training of each kind for each of them.
        gammas: weights of the saliency loss to choose from; the choice is made on the validation split.
        gamma_seeds: seeds of that choice; none of them may be among `seeds`.
        training: settings of `salnb.train.Config` that all trainings share.
        variants: the names of the changes, and of the smaller training sets, that the study of open questions
            tries beside its default; none named: all of them.
        studies: for some of the studies, other values of the above.

    Raises:
        TypeError, ValueError: a value is not allowed; the message names it.
    """

    name: str
    data: tuple[str, ...]
    networks: tuple[str, ...]
    seeds: tuple[int, ...]
    gammas: tuple[float, ...] = (1.0,)
    gamma_seeds: tuple[int, ...] = (1000,)
    training: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    studies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the settings of a single training do not tell."""
        for name in ("data", "networks", "seeds", "gammas", "gamma_seeds", "variants"):
            values = getattr(self, name)
            if (
                isinstance(values, str)
                or not isinstance(values, Sequence)
                or not (values or name == "variants")
            ):
                raise TypeError(f"{name} of scale {self.name!r} must be a list, not empty, got {values!r}")
            if len(values) != len(set(map(repr, values))):
                raise ValueError(f"{name} of scale {self.name!r} must not name anything twice, got {values}")
            object.__setattr__(self, name, tuple(values))
        for name in ("training", "studies"):
            _check_mapping(f"{name} of scale {self.name!r}", getattr(self, name))
        if both := set(self.seeds) & set(self.gamma_seeds):
            raise ValueError(
                f"gamma_seeds of scale {self.name!r} must not be among seeds, got {sorted(both)}"
            )
        if not all(isinstance(gamma, int | float) and gamma > 0 for gamma in self.gammas):
            raise ValueError(f"gammas of scale {self.name!r} must be positive numbers, got {self.gammas}")
        for given in self.data:
            if given not in catalog.DATA:
                raise catalog.unknown(f"data of scale {self.name!r}:", given, catalog.DATA)
        known = [f.name for f in dataclasses.fields(Config)]
        for name in self.training:
            if name not in known:
                raise catalog.unknown(f"training of scale {self.name!r}: setting", name, known)
        for study in self.studies:
            if study not in STUDIES:
                raise catalog.unknown(f"studies of scale {self.name!r}: study", study, STUDIES)
            self.of(study)

    def with_training(self, **settings: Any) -> "Scale":
        """The same with other settings of all trainings, whatever a study says of its own."""
        studies = {
            study: {**own, "training": {**own.get("training", {}), **settings}}
            for study, own in self.studies.items()
        }
        return dataclasses.replace(self, training={**self.training, **settings}, studies=studies)

    def of(self, study: str) -> "Scale":
        """The scale of one study."""
        where = f"{study} of scale {self.name!r}"
        own = self.studies.get(study, {})
        _check_mapping(where, own)
        _check_mapping(f"training of {where}", own.get("training", {}))
        if "studies" in own:
            raise ValueError(f"{where} must not have studies of its own")
        training = {**self.training, **own.get("training", {})}
        return _scale(self.name, {**self.to_dict(), "studies": {}, **own, "training": training})

    def to_dict(self) -> dict[str, Any]:
        """What a scale file says, without the name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}


def load_scale(scale: str | Path | Mapping[str, Any]) -> Scale:
    """A scale by its name, from a YAML file, or from its values.

    Args:
        scale: a name ("smoke", "laptop", "laptop-strong", "gpu", "colab", "paper"), the path of a file, or
            what such a file holds below its key ``scale``. The files are parameter files of papermill too:
            they set the one parameter `scale` of the chapters.

    Raises:
        ValueError: there is no such scale, or the file is not one.
        TypeError: a value is of the wrong type.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    if isinstance(scale, Mapping):
        return _scale("given", scale)
    files = {path.stem: path for path in sorted(_folder().glob("*.yml"))}
    path = files.get(str(scale), Path(scale))
    if path.suffix not in (".yml", ".yaml"):
        raise catalog.unknown("scale", str(scale), [*files, "FILE.yml"])
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs the package {error.name}: pip install 'salnb[train]'"
        ) from error
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))["scale"]
    except (OSError, UnicodeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"scale {path} is no file with a mapping named scale: {error}") from error
    return _scale(path.stem, values)


def _scale(name: str, values: Mapping[str, Any]) -> Scale:
    _check_mapping(f"scale {name!r}", values)
    known = [f.name for f in dataclasses.fields(Scale) if f.name != "name"]
    for key in values:
        if key not in known:
            raise catalog.unknown(f"key of scale {name!r}", key, known)
    if missing := {"data", "networks", "seeds"} - values.keys():
        raise ValueError(f"scale {name!r} lacks {', '.join(sorted(missing))}")
    return Scale(name=name, **values)


def _check_mapping(what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping, got {given!r}")


def _folder() -> Path:
    """The scale files: in an installed package beside this module, in a source tree beside the chapters."""
    installed = Path(__file__).parent.parent / "scales"
    return installed if installed.exists() else Path(__file__).parent.parent.parent / "notebooks" / "scales"


class Training(NamedTuple):
    """One training of a study.

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

        The folder is named after the settings: trainings of two studies that are the same share one run.
        """
        settings = {
            k: v for k, v in Config(out="run", **self.settings).to_dict().items() if k not in PRACTICAL
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return Config(out=str(Path(runs) / digest), **self.settings)


# from the settings of a training with a weight, to the weight that makes another one's term as strong
Match = Callable[[Mapping[str, Any], Mapping[str, Any]], float]
Gammas = Mapping[str, float]
# in place of both, where only the other settings matter
UNCHOSEN: tuple[Gammas, Match] = (defaultdict(lambda: 1.0), lambda settings, changed: 1.0)


def trainings(study: str, scale: Scale, gammas: Gammas, match: Match) -> list[Training]:
    """The trainings of a study, seed by seed, so that a study that is stopped early is balanced.

    Args:
        study: a key of `STUDIES`.
        scale: how large.
        gammas: the weight of the saliency loss for each data set; see `salnb.study.choose_gammas`.
        match: from the settings of a training and others that differ in the unit of the saliency loss, to
            the weight with which the latter is as strong; see `salnb.study.match_weight`.

    Raises:
        ValueError: the study is unknown, or settings are not allowed together.
    """
    if study not in STUDIES:
        raise catalog.unknown("study", study, STUDIES)
    scale = scale.of(study)
    cells = list(STUDIES[study](scale, gammas, match))  # once, as weights take time to match
    found = [
        Training(study, {**factors, "seed": seed}, {**scale.training, **settings, "seed": seed})
        for seed in (scale.gamma_seeds if study == "gamma" else scale.seeds)
        for factors, settings in cells
    ]
    for training in found:
        training.config("runs")
    return found


Cells = Iterator[tuple[dict[str, Any], dict[str, Any]]]


def _gamma(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    """The weights to choose from, on the network and the augmentation that come first."""
    for data in scale.data:
        for gamma in (0.0, *map(float, scale.gammas)):
            factors = {"data": data, "network": scale.networks[0], "gamma": f"{gamma:g}"}
            yield (
                factors,
                {"data": data, "model": scale.networks[0], "augmentation": "affine", "gamma": gamma},
            )


def _with_and_without(scale: Scale, gammas: Gammas, augmentations: Sequence[str]) -> Cells:
    for data in scale.data:
        for network in scale.networks:
            for augmentation in augmentations:
                for strategy, gamma in {"reference": 0.0, "saliency": gammas[data]}.items():
                    factors = {"data": data, "network": network, "augmentation": augmentation}
                    settings = {"data": data, "model": network, "augmentation": augmentation, "gamma": gamma}
                    yield {**factors, "strategy": strategy}, settings


def _table1(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    return _with_and_without(scale, gammas, TABLE1_AUGMENTATIONS)


def _table2(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    return _with_and_without(scale, gammas, ("simclr",))


def _table3(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    for data in scale.data:
        for network in scale.networks:
            for strategy, settings in TABLE3_STRATEGIES.items():
                factors = {"data": data, "network": network, "strategy": strategy}
                yield factors, {"data": data, "model": network, **settings}


def _open(scale: Scale, gammas: Gammas, match: Match) -> Cells:
    """One factor at a time around a default; each is compared with its reference, which has no such term."""
    for data in scale.data:
        shared = {"data": data, "model": scale.networks[0], "augmentation": "affine"}
        whole = {**scale.training, **shared, "gamma": gammas[data]}
        sizes, variants = _training_sets(whole), _variants(whole)
        wanted = [WHOLE, *(scale.variants or (*sizes, *variants))]
        for variant in wanted:
            if variant not in sizes and variant not in variants:
                raise catalog.unknown(
                    f"variants of scale {scale.name!r}: variant", variant, [*sizes, *variants]
                )
        for images in dict.fromkeys(name for name in wanted if name in sizes):
            fewer = sizes[images]
            yield _open_factors(data, images, "reference"), {**shared, **fewer, "gamma": 0.0}
            yield _open_factors(data, images, "default"), {**shared, **fewer, "gamma": gammas[data]}
        for variant in (name for name in wanted if name in variants):
            changes = variants[variant]
            if Config(out="run", **{**whole, **changes}) == Config(out="run", **whole):
                continue  # that is the default here
            settings = {**shared, "gamma": gammas[data], **changes}
            if _UNITS & changes.keys():
                settings["gamma"] = match(whole, {**whole, **changes})
            yield _open_factors(data, WHOLE, variant), settings


def _open_factors(data: str, images: str, variant: str) -> dict[str, Any]:
    return {"data": data, "images": images, "variant": variant}


def _training_sets(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All images, a quarter and a tenth of them, with as many steps."""
    count, epochs = _training_images(settings), settings.get("epochs", 30)
    sizes: dict[str, dict[str, Any]] = {WHOLE: {}}
    for part in (4, 10):
        if count // part >= settings.get("batch_size", 64):
            sizes[f"1 in {part}"] = {"train_images": count // part, "epochs": epochs * part}
    return sizes


def _variants(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    steps = settings.get("epochs", 30) * (_training_images(settings) // settings.get("batch_size", 64))
    gamma = settings["gamma"]
    variants: dict[str, dict[str, Any]] = {
        f"gamma × {factor:g}": {"gamma": factor * gamma} for factor in (0.1, 0.3, 3, 10, 100)
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


def _training_images(settings: Mapping[str, Any]) -> int:
    found = settings.get("train_images") or catalog.DATA[settings["data"]].training_images
    if found is None:
        raise ValueError(f"train_images must be given in the study of open questions for {settings['data']}")
    return found


# for each study: the factor whose values are compared, with which of them, and by what
REFERENCES = {
    "gamma": ("gamma", "0", "validation_accuracy"),
    "table1": ("strategy", "reference", "test_accuracy"),
    "table2": ("strategy", "reference", "test_accuracy"),
    "table3": ("strategy", "none", "test_accuracy"),
    "open": ("variant", "reference", "test_accuracy"),
}

STUDIES: dict[str, Callable[[Scale, Gammas, Match], Cells]] = {
    "gamma": _gamma,
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "open": _open,
}
