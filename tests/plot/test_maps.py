"""Figures: what is drawn, with which limits, and what is refused."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from salnb import plot


@pytest.fixture
def photos():
    return torch.rand(3, 3, 12, 16)


@pytest.fixture
def maps():
    return {"one": 7 * torch.rand(3, 1, 12, 16), "other": 0.01 * torch.rand(3, 1, 6, 8)}


def drawn(ax):
    """The array of the topmost picture in an axes."""
    return np.asarray(ax.images[-1].get_array())


def test_importing_the_package_does_not_import_matplotlib():
    import subprocess
    import sys

    code = "import sys, salnb; sys.exit('matplotlib' in sys.modules or 'seaborn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_style_has_an_opaque_white_background():
    plot.use_style(dpi=50)
    assert mpl.rcParams["figure.facecolor"] == "white"
    assert not mpl.rcParams["savefig.transparent"]
    assert plt.figure().dpi == 50


def test_divide_by_maximum_uses_each_maps_own_and_keeps_zeros():
    maps = torch.tensor([[1.0, -4.0], [0.0, 0.0], [10.0, 5.0]]).view(3, 1, 1, 2)
    assert plot.divide_by_maximum(maps).flatten().tolist() == [0.25, -1, 0, 0, 1, 0.5]


def test_show_images_draws_each_image_with_its_title(photos):
    fig = plot.show_images(photos, titles=["a", "b", "c"], columns=2)
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c"]
    np.testing.assert_allclose(drawn(fig.axes[2]), photos[2].permute(1, 2, 0))


def test_show_images_takes_grey_ones():
    assert drawn(plot.show_images(torch.full((1, 1, 4, 4), 0.5)).axes[0]).shape == (4, 4, 3)


@pytest.mark.parametrize("across", ["methods", "photos"])
def test_maps_are_divided_by_their_own_maximum_with_fixed_limits(photos, maps, across):
    fig = plot.show_maps(photos, maps, titles=["a", "b", "c"], across=across)
    assert len(fig.axes) == 3 * (1 + 2) + 1
    panels = [ax for ax in fig.axes[:-1] if drawn(ax).ndim == 2]
    assert len(panels) == 6
    for ax in panels:
        assert drawn(ax).max() == pytest.approx(1)
        assert ax.images[-1].get_clim() == (0, 1)
    assert fig.axes[-1].get_ylabel() == "share of the map's maximum\n(square-root scale)"


def test_across_says_which_way_the_grid_runs(photos, maps):
    rows = plot.show_maps(photos, maps, titles=["a", "b", "c"], across="methods").axes[:-1]
    assert [ax.get_title() for ax in rows] == ["", "one", "other"] + [""] * 6
    assert [ax.get_ylabel() for ax in rows[::3]] == ["a", "b", "c"]
    columns = plot.show_maps(photos, maps, titles=["a", "b", "c"], across="photos").axes[:-1]
    assert [ax.get_title() for ax in columns] == ["a", "b", "c"] + [""] * 6
    assert [ax.get_ylabel() for ax in columns[::3]] == ["", "one", "other"]


def test_signed_maps_are_white_at_zero(photos):
    fig = plot.show_maps(photos, {"slope": torch.randn(3, 1, 12, 16)}, signed=True)
    image = fig.axes[1].images[-1]
    assert image.get_clim() == (-1, 1)
    assert image.cmap(image.norm(0.0)) == pytest.approx((1, 1, 1, 1), abs=0.05)
    assert "square-root" not in fig.axes[-1].get_ylabel()


def test_what_is_not_valid_is_hatched_and_sets_no_scale(photos):
    values = torch.full((3, 1, 12, 16), 0.5)
    values[..., 0, 0] = 8
    valid = values < 1
    fig = plot.show_maps(photos, {"new photo": photos, "map": values}, valid={"map": valid})
    photo, plain, marked = fig.axes[:3]
    assert drawn(plain).shape == (12, 16, 3)
    assert not photo.collections
    assert not plain.collections
    assert marked.collections[0].hatches == ["////"]
    (corner,) = (path.get_extents() for path in marked.collections[0].get_paths())
    np.testing.assert_allclose([corner.xmax, corner.ymax], [1, 1], atol=0.2)
    assert drawn(marked)[0, 0] == 0
    assert drawn(marked)[5, 5] == 1


def test_a_difference_of_maps_can_keep_its_size(photos):
    fig = plot.show_maps(photos, {"difference": torch.full((3, 1, 12, 16), 0.25)}, rescale=False)
    assert drawn(fig.axes[1]).max() == 0.25
    assert fig.axes[1].images[-1].get_clim() == (0, 1)


@pytest.mark.parametrize("across", ["methods", "photos"])
def test_the_maps_of_one_photograph_stand_in_several_rows(photos, maps, across):
    fig = plot.show_maps(photos[:1], {name: one[:1] for name, one in maps.items()}, across=across, columns=2)
    *panels, _ = fig.axes
    fig.draw_without_rendering()
    corners = [ax.get_position().get_points()[0].round(3).tolist() for ax in panels]
    assert len(panels) == 1 + len(maps)
    assert len({x for x, _ in corners}) == 2
    assert len({y for _, y in corners}) == -(-len(panels) // 2)


@pytest.mark.parametrize("columns", [2, 3, 7])
def test_each_photograph_begins_a_row_and_every_panel_has_its_title(photos, columns):
    maps = dict.fromkeys(("one", "two", "three", "four"), photos[:, :1])
    *panels, _ = plot.show_maps(photos, maps, ["a", "b", "c"], columns=columns).axes
    assert [ax.get_title() for ax in panels] == ["", *maps] * 3
    assert [ax.get_ylabel() for ax in panels] == ["a", *[""] * 4, "b", *[""] * 4, "c", *[""] * 4]
    places = [ax.get_subplotspec() for ax in panels]
    rows = -(-5 // columns)
    assert [place.rowspan.start for place in places] == [
        photo * rows + i // columns for photo in range(3) for i in range(5)
    ]
    assert [place.colspan.start for place in places] == [i % columns for i in range(5)] * 3


@pytest.mark.parametrize(
    ("count", "across", "columns", "message"),
    [
        (3, "photos", 2, "one photograph, got 3"),
        (1, "methods", 0, r"must lie in \[1, 10000\], got 0"),
    ],
)
def test_columns_that_do_not_fit_are_refused(photos, count, across, columns, message):
    with pytest.raises(ValueError, match=f"^columns .*{message}"):
        plot.show_maps(photos[:count], {"one": photos[:count, :1]}, across=across, columns=columns)


def test_overlay_lies_over_the_grey_photograph(photos, maps):
    ax = plot.overlay(photos, maps, opacity=0.3).axes[1]
    below, above = ax.images
    assert np.ptp(below.get_array(), axis=2).max() == 0
    assert above.get_alpha() == 0.3
    assert below.get_extent() == above.get_extent()


def test_show_numbers_writes_every_value_and_strikes_cells():
    fig = plot.show_numbers(
        {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([[0.0, 0.5]])},
        struck={"b": torch.tensor([[True, False]])},
    )
    texts = [[text.get_text() for text in ax.texts] for ax in fig.axes]
    assert texts == [["1", "-2"], ["0", "0.5"]]
    assert [len(ax.lines) for ax in fig.axes] == [0, 1]
    limits = {ax.collections[0].get_clim() for ax in fig.axes}
    assert len(limits) == 1


P, M = torch.rand(2, 3, 4, 4), {"m": torch.rand(2, 1, 4, 4)}
REFUSED = {
    "dpi": (lambda: plot.use_style(dpi=0), ValueError, "dpi must be at least 1, got 0"),
    "integers": (lambda: plot.show_images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)), TypeError, "floating"),
    "channels": (lambda: plot.show_images(torch.rand(1, 4, 2, 2)), ValueError, "1 or 3 channels .* got 4"),
    "titles": (lambda: plot.show_images(P, titles=["a"]), ValueError, "titles must be 2 texts.* got 1"),
    "one-title": (lambda: plot.show_images(P, titles="ab"), ValueError, "titles must be 2 texts.* got 'ab'"),
    "columns": (
        lambda: plot.show_images(P, columns=0),
        ValueError,
        r"columns must lie in \[1, 10000\], got 0",
    ),
    "columns-text": (lambda: plot.show_images(P, columns="3"), TypeError, "columns must be a whole number"),
    "size": (lambda: plot.show_images(P, size=-1), ValueError, r"size must lie in \(0, 100\], got -1"),
    "bytes": (lambda: plot.show_images(P * 255), ValueError, r"images must have values in \[0, 1\].* by 255"),
    "bytes-below": (lambda: plot.show_maps(P * 255, M), ValueError, r"images must .* divide them by 255"),
    "bytes-beside": (
        lambda: plot.show_maps(P, {"a": P * 255}),
        ValueError,
        r"maps\['a'\] must have values in",
    ),
    "power-text": (lambda: plot.show_maps(P, M, power="1"), TypeError, "power must be a number"),
    "limit": (lambda: plot.show_numbers({"a": P[0, 0]}, limit=-1), ValueError, r"limit must lie in \(0, "),
    "limit-zero": (
        lambda: plot.show_numbers({"a": P[0, 0]}, limit=0),
        ValueError,
        r"limit must lie in \(0, ",
    ),
    "empty": (
        lambda: plot.show_numbers({"a": P[0, 0, :0]}),
        ValueError,
        r"neither of them zero, got \(0, 4\)",
    ),
    "numpy": (
        lambda: plot.show_numbers({"a": P[0, 0].numpy()}),
        TypeError,
        r"matrices\['a'\] must be a torch",
    ),
    "list": (lambda: plot.show_numbers([P[0, 0]]), TypeError, "matrices must be a dict .* got list"),
    "infinite": (
        lambda: plot.show_numbers({"a": P[0, 0] / 0}),
        ValueError,
        r"matrices\['a'\] must be finite",
    ),
    "struck-list": (
        lambda: plot.show_numbers({"a": P[0, 0]}, struck={"a": [True]}),
        ValueError,
        r"struck\['a'\] must have the title and the shape",
    ),
    "tensor": (lambda: plot.show_maps(P, M["m"]), TypeError, "maps must be a dict .* got Tensor"),
    "no-maps": (lambda: plot.show_maps(P, {}), ValueError, "at least one method"),
    "too-few": (lambda: plot.show_maps(P, {"m": M["m"][:1]}), ValueError, r"shape \(2, 1, H, W\), got \(1, "),
    "negative": (lambda: plot.show_maps(P, {"m": -M["m"]}), ValueError, "negative .* signed=True"),
    "nan": (lambda: plot.show_maps(P, {"m": M["m"] * torch.nan}), ValueError, "must be finite"),
    "valid": (
        lambda: plot.show_maps(P, M, valid={"m": M["m"]}),
        ValueError,
        r"valid\['m'\] must be booleans",
    ),
    "across": (lambda: plot.show_maps(P, M, across="rows"), ValueError, "across must be .* got 'rows'"),
    "power": (lambda: plot.show_maps(P, M, power=0), ValueError, r"power must lie in \(0, 100\], got 0"),
    "opacity": (lambda: plot.overlay(P, M, opacity=2), ValueError, r"opacity must lie in \[0, 1\], got 2"),
    "no-matrix": (lambda: plot.show_numbers({}), ValueError, "at least one matrix"),
    "cube": (lambda: plot.show_numbers({"a": P}), ValueError, r"matrices\['a'\] must have two dimensions"),
    "struck": (lambda: plot.show_numbers({"a": P[0, 0]}, struck={"b": P[0, 0] > 0}), ValueError, "struck"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
