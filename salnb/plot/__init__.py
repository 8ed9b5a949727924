"""Figures of the book.

Every function returns a `matplotlib.figure.Figure` and shows nothing by itself. Backgrounds are opaque white,
for pages that have a dark mode. This package needs matplotlib and seaborn (`pip install 'salnb[chapters]'`)
and is imported on its own: `from salnb import plot`.
"""

from salnb.plot.curves import show_curves
from salnb.plot.maps import divide_by_maximum, overlay, show_images, show_maps, show_numbers
from salnb.plot.results import VERDICTS, name_of, show_accuracies, show_differences
from salnb.plot.style import DIVERGING, INK, SEQUENTIAL, png, use_style
from salnb.plot.timing import show_batches, show_memory, show_method_costs, show_parts, show_ratios

__all__ = [
    "DIVERGING",
    "INK",
    "SEQUENTIAL",
    "VERDICTS",
    "divide_by_maximum",
    "name_of",
    "overlay",
    "png",
    "show_accuracies",
    "show_batches",
    "show_curves",
    "show_differences",
    "show_images",
    "show_maps",
    "show_memory",
    "show_method_costs",
    "show_numbers",
    "show_parts",
    "show_ratios",
    "use_style",
]
