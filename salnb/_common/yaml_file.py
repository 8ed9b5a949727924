"""Settings in files of YAML, of which nothing is taken for what it was not meant to be."""

import re
from pathlib import Path
from typing import Any

from salnb._common.packages import require

__all__ = ["number_as_written", "read_yaml"]

_WRITTEN_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# 010 is eight to YAML, and 1:30 is ninety
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9_.]+(:[0-9_.]+)+)")


def read_yaml(path: str | Path, *, what: str = "this") -> Any:
    """What a file says, in plain values.

    Args:
        path: the file.
        what: needs the package that reads it, for the error where it is not installed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, names a key twice, or has a number that YAML reads in another base.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    yaml = require("yaml", "train", what=what)

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.value in found:
                    raise ValueError(f"{key.value} is named twice, again in line {key.start_mark.line + 1}")
                found |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
            return super().construct_mapping(node, deep)

    def construct_number(loader: Any, node: Any) -> Any:
        if _ODD_NUMBER.fullmatch(node.value):
            line = node.start_mark.line + 1
            raise ValueError(f"{node.value} in line {line} is another number to YAML: write it in decimals")
        kind = node.tag.rpartition(":")[2]
        return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct_number)
    text = Path(path).read_text(encoding="utf-8")
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # syntax, tags, dates, keys: the parser has many
        raise ValueError(" ".join(str(error).split())) from error


def number_as_written(value: Any) -> Any:
    """A number that YAML took for a word, as it does `1e-3`, which has no point; also those of a list.

    >>> number_as_written(["1e-3", 2, "two"])
    [0.001, 2, 'two']
    """
    if isinstance(value, list):
        return [number_as_written(each) for each in value]
    return float(value) if isinstance(value, str) and _WRITTEN_NUMBER.fullmatch(value) else value
