"""Packages that only some parts need: found or imported, or the error says how to install them."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

__all__ = ["package_folder", "require"]


def require(module: str, extra: str | None = None, *, what: str = "this") -> Any:
    """Import a module that may not be installed.

    Args:
        module: its full name.
        extra: the extra of salnb that brings it; None: its package is installed by its own name.
        what: what it is needed for, in words.

    Raises:
        ModuleNotFoundError: it, or a package that it needs in turn, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name, extra, what, module) from error


def package_folder(package: str, extra: str | None = None, *, what: str = "this") -> Path:
    """The folder of a package that is not imported, as some load every framework they know; see `require`."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _missing(package, extra, what, package)
    return Path(spec.origin).parent


def _missing(package: str | None, extra: str | None, what: str, module: str) -> ModuleNotFoundError:
    install = f"'salnb[{extra}]'" if extra else module.split(".")[0]
    return ModuleNotFoundError(f"{what} needs the package {package}: pip install {install}")
