"""How figures look in a notebook."""

from io import BytesIO

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from salnb import plot
from salnb.plot.style import _drawn


def figure(*, picture):
    pytest.importorskip("IPython")  # draws them in a notebook
    plot.use_style(dpi=50)
    fig, ax = plt.subplots(figsize=(4, 2))
    if picture:
        ax.imshow([[0, 1], [1, 0]])
    else:
        ax.plot([0, 1])
    return fig


def test_lines_become_a_drawing_that_is_the_same_each_time():
    first, second = (_drawn(figure(picture=False), kind="svg") for _ in range(2))
    assert first.startswith("<?xml")
    assert first == second
    assert _drawn(figure(picture=False), kind="jpeg") is None


def test_a_picture_has_more_pixels_than_it_is_shown_with():
    fig = figure(picture=True)
    data, shown = _drawn(fig, kind="jpeg")
    width = Image.open(BytesIO(data)).width
    assert shown["width"] == pytest.approx(width / 2, abs=1)
    assert _drawn(fig, kind="svg") is None
