"""Augmentations that know their way back (Sections 3.1 and 4 of the paper).

Each draws per sample, changes images and labels, and brings the saliency maps of both images into one frame.
"""

# ruff: noqa: F403, F405  each module says in its `__all__` what is shown here

from collections.abc import Callable

from salnb._common import catalog
from salnb.augment import augmix, base, geometric, mixing, photometric, sequential
from salnb.augment.augmix import *
from salnb.augment.base import *
from salnb.augment.geometric import *
from salnb.augment.mixing import *
from salnb.augment.photometric import *
from salnb.augment.sequential import *

__all__ = ["AUGMENTATIONS"]
__all__ += augmix.__all__
__all__ += base.__all__
__all__ += geometric.__all__
__all__ += mixing.__all__
__all__ += photometric.__all__
__all__ += sequential.__all__

# an augmentation's name is that of its class, in lower case and with underscores wherever they help
_CLASSES = {name.lower(): globals()[name] for name in __all__ if name != "AUGMENTATIONS"}
AUGMENTATIONS: dict[str, Callable[[], Augmentation]] = {
    name: _CLASSES[name.replace("_", "")] for name in catalog.AUGMENTATIONS
}
