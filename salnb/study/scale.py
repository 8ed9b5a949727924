"""How large the studies are: scales, from a smoke test to the paper's own.

Free of torch, so that a mistake is answered at once.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salnb._common import catalog
from salnb._common.yaml_file import number_as_written, read_yaml
from salnb.train.config import Config, as_written

__all__ = ["PLANNED", "STUDY_NAMES", "TUNING", "Scale", "check_known", "load_scale", "scale_as_written"]

# settings of which every study has values of its own
_OF_STUDIES = frozenset({"augmentation", "data", "gamma", "model", "out", "seed"})

# those that have a plan, `results/plans/STUDY.yml`, and before each the choice of its weights if it makes one
PLANNED = ("treated", "treated-again", "few-labels", "shortcut", "table1-again")
TUNING = tuple(f"{study}-tuning" for study in PLANNED if not study.endswith("-again"))
STUDY_NAMES = ("gamma", "table1", "table2", "table3", "open", *TUNING, *PLANNED)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the grids are.

    Attributes:
        name: what the scale is called.
        data: data sets.
        networks: networks.
        seeds: one training run of each kind for each of them.
        gammas: weights of the saliency loss to choose from; the choice is made on the validation split.
        gamma_seeds: seeds of that choice; none of them may be among `seeds`.
        training: settings of `salnb.train.Config` that all runs share.
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
        """Check what the settings of a single run do not tell."""
        of_scale = f"of scale {self.name!r}"
        for name in ("data", "networks", "seeds", "gammas", "gamma_seeds", "variants"):
            _check_list(f"{name} {of_scale}", getattr(self, name), least=name != "variants")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("seeds", "gamma_seeds"):
            if not all(type(seed) is int for seed in getattr(self, name)):
                raise TypeError(f"{name} {of_scale} must be whole numbers, got {getattr(self, name)}")
        if both := set(self.seeds) & set(self.gamma_seeds):
            raise ValueError(f"gamma_seeds {of_scale} must not be among seeds, got {sorted(both)}")
        if not all(type(gamma) in (int, float) and 0 < gamma < math.inf for gamma in self.gammas):
            raise ValueError(f"gammas {of_scale} must be positive numbers, got {self.gammas}")
        for name in ("training", "studies"):
            _check_mapping(f"{name} {of_scale}", getattr(self, name))
        check_known(f"data {of_scale}:", self.data, catalog.DATA)
        settings = [f.name for f in dataclasses.fields(Config)]
        check_known(f"training {of_scale}: setting", self.training, settings)
        if own := _OF_STUDIES & self.training.keys():
            raise ValueError(f"training {of_scale} must leave {', '.join(sorted(own))} to the studies")
        check_known(f"studies {of_scale}: study", self.studies, STUDY_NAMES)
        for study in self.studies:
            self.for_study(study)

    def with_training(self, **settings: Any) -> "Scale":
        """The same with other settings of all runs, whatever a study says of its own."""
        studies = {
            study: {**own, "training": {**own.get("training", {}), **settings}}
            for study, own in self.studies.items()
        }
        return dataclasses.replace(self, training={**self.training, **settings}, studies=studies)

    def for_study(self, study: str) -> "Scale":
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
            what such a file holds below its key `scale`. The files are parameter files of papermill too:
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
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"scale {path} is no file with a mapping named scale: {why}") from error
    if not isinstance(content, Mapping) or "scale" not in content:
        raise ValueError(f"scale {path} is no file with a mapping named scale")
    return _scale(path.stem, scale_as_written(content["scale"]))


def scale_as_written(values: Any) -> Any:
    """What a file says of weights and of the settings of runs, as it is meant; see `as_written`."""
    if not isinstance(values, Mapping):
        return values
    found = dict(values)
    if "gammas" in found:
        found["gammas"] = number_as_written(found["gammas"])
    if isinstance(found.get("training"), Mapping):
        found["training"] = as_written(found["training"])
    if isinstance(found.get("studies"), Mapping):
        found["studies"] = {study: scale_as_written(own) for study, own in found["studies"].items()}
    return found


def _scale(name: str, values: Mapping[str, Any]) -> Scale:
    _check_mapping(f"scale {name!r}", values)
    known = [f.name for f in dataclasses.fields(Scale) if f.name != "name"]
    check_known(f"key of scale {name!r}", values, known)
    if missing := {"data", "networks", "seeds"} - values.keys():
        raise ValueError(f"scale {name!r} lacks {', '.join(sorted(missing))}")
    return Scale(name=name, **values)


def _check_list(what: str, given: Any, *, least: int) -> None:
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not is_list or len(given) < least:
        raise TypeError(f"{what} must be a list, not empty, got {given!r}")
    words = [f"{v:g}" if isinstance(v, float) else repr(v) for v in given]  # as in the names of records
    if len(words) != len(set(words)):
        raise ValueError(f"{what} must not name anything twice, got {given}")


def _check_mapping(what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping, got {given!r}")


def check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise a ValueError, which begins with `what`, unless all names are among the known ones."""
    for name in names:
        if name not in list(known):  # which asks nothing of a name, not even that it can be a key
            raise catalog.unknown(what, name, known)


def _folder() -> Path:
    """The scale files: in an installed package beside its rooms, in a source tree beside the chapters."""
    package = Path(__file__).parent.parent
    installed = package / "scales"
    return installed if installed.exists() else package.parent / "notebooks" / "scales"
