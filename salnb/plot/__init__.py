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

__all__ = [
    "DIVERGING",
    "INK",
    "SEQUENTIAL",
    "VERDICTS",
    "divide_by_maximum",
    "name_of",
    "overlay",
    "show_accuracies",
    "show_differences",
    "show_images",
    "show_maps",
    "show_numbers",
    "use_style",
]
