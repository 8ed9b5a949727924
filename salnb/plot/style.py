"""The look that all figures of the book have in common."""

import io
import sys

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

__all__ = ["DIVERGING", "INK", "SEQUENTIAL", "png", "use_style"]

SEQUENTIAL = "magma"  # perceptually uniform, dark to light
DIVERGING = "RdBu_r"  # white at 0
INK = "#1b1b1b"


def use_style(*, dpi: int = 110) -> None:
    """Set the look of all figures that follow: seaborn's white theme on an opaque white background.

    In a notebook figures become JPEG images: photographs and grainy maps take four times the space as PNG.

    Args:
        dpi: pixels per inch. A figure 8 inches wide is then 880 pixels wide at the default.

    Raises:
        ValueError: `dpi` is not positive.
    """
    if dpi < 1:
        raise ValueError(f"dpi must be at least 1, got {dpi}")
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 90})
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


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file, after which it is closed."""
    figure.savefig(content := io.BytesIO(), dpi=150, bbox_inches="tight")
    plt.close(figure)
    return content.getvalue()
