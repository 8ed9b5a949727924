"""The look that all figures of the book have in common."""

import io
import sys
from functools import partial
from typing import Any, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

__all__ = ["DIVERGING", "INK", "SEQUENTIAL", "as_text", "png", "use_style"]

SEQUENTIAL = "magma"  # perceptually uniform, dark to light
DIVERGING = "RdBu_r"  # white at 0
INK = "#1b1b1b"
_FINER: Final = 2.0  # pixels of a picture in a notebook for each that it is shown with, for sharp screens


def use_style(*, dpi: int = 110) -> None:
    """Set the look of all figures that follow: seaborn's white theme on an opaque white background.

    In a notebook a figure of lines and text becomes an SVG image, sharp at any size; one with pictures a JPEG
    image with more pixels than it is shown with, as photographs and grainy maps take four times the space as
    PNG.

    Args:
        dpi: pixels per inch as shown. A figure 8 inches wide is then 880 pixels wide at the default.

    Raises:
        ValueError: `dpi` is not positive.
    """
    if dpi < 1:
        raise ValueError(f"dpi must be at least 1, got {dpi}")
    module = sys.modules.get("IPython")
    if module is not None and (ipython := module.get_ipython()) is not None:
        _show_in_notebook(ipython)
    sns.set_theme(
        context="notebook",
        style="ticks",
        font_scale=0.85,
        rc={
            "figure.dpi": dpi,
            "savefig.dpi": dpi,
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "image.cmap": SEQUENTIAL,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.labelcolor": INK,
        },
    )
    mpl.rcParams["svg.hashsalt"] = "salnb"  # the same figure, the same file


def as_text(name: str) -> str:
    """A name in which no dollar begins a formula."""
    return name.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file, after which it is closed."""
    figure.savefig(content := io.BytesIO(), dpi=150, bbox_inches="tight")
    plt.close(figure)
    return content.getvalue()


def _show_in_notebook(ipython: Any) -> None:
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")  # and no other: the two below take turns
    formatters = ipython.display_formatter.formatters
    for mime, kind in (("image/svg+xml", "svg"), ("image/jpeg", "jpeg")):
        formatters[mime].for_type(Figure, partial(_drawn, kind=kind))


def _drawn(figure: Figure, *, kind: str) -> Any:
    """The figure as an image of this kind; None if the other kind suits it better."""
    from IPython.core.pylabtools import print_figure

    has_pictures = any(ax.images for ax in figure.axes)
    if has_pictures != (kind == "jpeg"):
        return None
    if kind == "svg":
        return print_figure(figure, "svg", metadata={"Date": None})
    data = print_figure(figure, "jpeg", dpi=_FINER * figure.dpi, pil_kwargs={"quality": 55})
    return data, {"width": round(_jpeg_width(data) / _FINER)}


def _jpeg_width(data: bytes) -> int:
    from io import BytesIO

    from PIL import Image

    return Image.open(BytesIO(data)).width
