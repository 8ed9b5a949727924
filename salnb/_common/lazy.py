"""Packages whose public names are imported on first use.

Torch takes seconds to load, and a mistyped option is answered before that.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: its name.
        homes: for each module the names that it owns; a module that is public itself owns none.

    >>> from salnb import train
    >>> "fit" in dir(train)
    True
    """
    owners = {name: home for home, names in homes.items() for name in names or (home,)}

    def get(name: str) -> Any:
        if name not in owners:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{owners[name]}")
        return module if owners[name] == name else getattr(module, name)

    return get, lambda: sorted(owners)
