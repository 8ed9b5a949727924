"""Figures of the book; needs matplotlib and seaborn (`pip install 'salnb[chapters]'`)."""

from salnb.plot.maps import (
    DIVERGING,
    INK,
    SEQUENTIAL,
    divide_by_maximum,
    overlay,
    show_images,
    show_maps,
    show_numbers,
    use_style,
)
from salnb.plot.results import VERDICTS, name_of, show_accuracies, show_differences
from salnb.plot.timing import show_batches, show_memory, show_method_costs, show_parts, show_ratios

__all__ = [
    "DIVERGING",
    "INK",
    "SEQUENTIAL",
    "VERDICTS",
    "divide_by_maximum",
    "name_of",
    "overlay",
    "show_accuracies",
    "show_batches",
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
