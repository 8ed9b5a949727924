"""A plugin of pytest that hides all packages but torch, torchvision, pytest and what these require."""

import re
import sys
from importlib import metadata


def kept(*names):
    """These distributions and all that they require, by their normalised names."""
    found, ahead = set(), list(names)
    while ahead:
        name = re.sub("[-_.]+", "-", ahead.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another system
            continue
        ahead += [re.match(r"[\w.-]+", line).group() for line in required if "extra ==" not in line]
    return found


def hidden(*names):
    """The modules of all other distributions."""
    keep = kept(*names)
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not keep & {re.sub("[-_.]+", "-", owner).lower() for owner in owners}
    }


class Finder:
    """A finder that does not find some modules."""

    def __init__(self, finder, modules):
        self.finder, self.modules = finder, modules

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.modules else self.finder.find_spec(name, path, target)


def pytest_load_initial_conftests():
    """Hide them before anything of the tests is imported."""
    modules = hidden("torch", "torchvision", "pytest", "salnb")  # its extras are none of what it requires
    sys.meta_path[:] = [Finder(finder, modules) for finder in sys.meta_path]
