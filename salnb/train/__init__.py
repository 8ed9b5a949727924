"""Training runs: the settings (`Config`), and what makes a run of them (`fit`)."""

from typing import TYPE_CHECKING

from salnb._common.lazy import lazy_names

if TYPE_CHECKING:
    from salnb.train.config import Config
    from salnb.train.loop import fit
    from salnb.train.run import Interrupted, NonFiniteError

__all__ = ["Config", "Interrupted", "NonFiniteError", "fit"]

__getattr__, __dir__ = lazy_names(
    __name__, {"config": ("Config",), "loop": ("fit",), "run": ("Interrupted", "NonFiniteError")}
)
