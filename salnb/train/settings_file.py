"""The settings of a training run in a file; free of torch, so that a mistake is answered at once."""

import dataclasses
import os
from typing import Any

from salnb._common import catalog
from salnb._common.yaml_file import read_yaml
from salnb.train.config import Config, as_written

__all__ = ["read_settings"]


def read_settings(file: str) -> dict[str, Any]:
    """The settings of `Config` that a file in YAML, or a run's config.json, has.

    Raises:
        ValueError: it cannot be read, holds something else, or names a setting twice.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    try:
        settings = read_yaml(file, what="config")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"config {file} cannot be read: {why}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {file} must hold settings by their names, got {type(settings).__name__}")
    names = [str(name).replace("-", "_") for name in settings]
    known = [field.name for field in dataclasses.fields(Config)]
    for name in names:
        if name not in known:
            raise catalog.unknown(f"config {file}:", name, known)
        if names.count(name) > 1:
            raise ValueError(f"config {file} names {name} twice, with - and with _")
    return as_written(dict(zip(names, map(_at_home, settings.values()), strict=True)))


def _at_home(value: Any) -> Any:
    """A path that begins with ~ as a shell would have it, which does not look into files."""
    return os.path.expanduser(value) if isinstance(value, str) else value
