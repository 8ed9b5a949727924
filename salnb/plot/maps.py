"""Images, maps beside and over them, and small matrices with their numbers.

Maps are divided by their own maximum and drawn with fixed colour limits, so that a colour means the same
share of the maximum in every panel of a figure and in every figure of the book; one colour bar says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from salnb._common.checks import check_finite, check_images
from salnb.plot.style import DIVERGING, INK, SEQUENTIAL

__all__ = ["divide_by_maximum", "overlay", "show_images", "show_maps", "show_numbers"]


def divide_by_maximum(maps: Tensor) -> Tensor:
    """Each map divided by its own largest absolute value; a map of zeros stays as it is.

    Args:
        maps: (N, 1, H, W), in any unit.

    Returns:
        (N, 1, H, W) without unit, in [-1, 1]; in [0, 1] where no value is negative.

    >>> import torch
    >>> divide_by_maximum(torch.tensor([[[[1.0, 4.0]]], [[[0.0, 0.0]]]])).flatten().tolist()
    [0.25, 1.0, 0.0, 0.0]
    """
    maximum = maps.abs().amax((1, 2, 3), keepdim=True)
    return maps / maximum.where(maximum > 0, 1)


def show_images(
    images: Tensor, titles: Sequence[str] | None = None, *, columns: int = 5, size: float = 1.5
) -> Figure:
    """Images in rows, each with its title above.

    Args:
        images: (N, 3, H, W) in colour or (N, 1, H, W) in grey; values in [0, 1], others are clipped.
        titles: N texts.
        columns: images per row, at least 1.
        size: width of an image in inches.

    Returns:
        A figure with one axes per image.

    Raises:
        TypeError, ValueError: `images` are not as described, `titles` are not N, `columns` is below 1.

    >>> import torch
    >>> len(show_images(torch.rand(3, 3, 8, 8), titles=["a", "b", "c"]).axes)
    3
    """
    titles = _check_pictures(images, titles)
    fig, axes = _panels(len(images), columns, size, images.shape[-2] / images.shape[-1])
    for ax, image, title in zip(axes, images, titles, strict=True):
        _draw_image(ax, image)
        ax.set_title(title, fontsize="small")
    return fig


def show_maps(
    images: Tensor,
    maps: Mapping[str, Tensor],
    titles: Sequence[str] | None = None,
    *,
    across: str = "methods",
    power: float = 0.5,
    signed: bool = False,
    opacity: float | None = None,
    size: float = 1.4,
    valid: Mapping[str, Tensor] | None = None,
    rescale: bool = True,
    columns: int | None = None,
) -> Figure:
    """Photographs beside their maps: a grid of photographs × methods with one colour bar.

    Each map is divided by its own maximum and drawn with the colour limits 0 and 1 (-1 and 1 if signed).

    Args:
        images: (N, 3, H, W) or (N, 1, H, W), values in [0, 1].
        maps: for each method's name, its maps (N, 1, h, w). They may be of another size than the images.
            Further photographs, of the images' size (N, 3, H, W), are drawn as such.
        titles: N texts, the names of the photographs.
        across: "methods" gives each photograph a row and each method a column; "photos" the other way round.
        power: the colour follows the value to this power; 0.5, a square root, shows the faint parts of maps
            whose maximum is a single pixel, 1 is linear. Signed maps are always linear.
        signed: maps have values of both signs, and the colours are white at 0.
        opacity: of maps that lie over the photograph in grey, from 0 (only the photograph) to 1 (only the
            map); None draws no photograph below them.
        size: width of a panel in inches.
        valid: for some of the names, booleans (N, 1, h, w): where one is false, the panel is hatched in
            grey, and the maximum does not count it.
        rescale: False draws maps as they are, so that a difference of maps keeps its size.
        columns: panels in a row, each with its title. Every photograph begins a new row and takes as many as
            it needs; None gives it one. With across="photos" for one photograph only.

    Returns:
        A figure with N × (1 + number of methods) axes, and one for the colour bar.

    Raises:
        TypeError, ValueError: an argument is not as described, `images`, `maps`, `valid` and `titles` do not
            fit each other, or a map has negative values without `signed`.

    >>> import torch
    >>> photos = torch.rand(2, 3, 8, 8)
    >>> len(show_maps(photos, {"brightness": photos.mean(1, keepdim=True)}).axes)
    5
    """
    titles, valid = _check_pictures(images, titles), valid or {}
    _check_maps(maps, len(images), signed, valid)
    _check_look(across, power, opacity)
    power, photos_across = 1.0 if signed else power, across == "photos"
    if columns is not None and len(images) > 1 and photos_across:
        raise ValueError(f"columns is for across='methods' or one photograph, got {len(images)} across")
    height, width = images.shape[-2:]
    per_photo, wrapped = 1 + len(maps), columns is not None
    n_columns = columns if columns is not None else len(images) if photos_across else per_photo
    blocks = len(images) if wrapped else 1
    fig, axes = _panels(len(images) * per_photo, n_columns, size, height / width, blocks=blocks)
    # photographs × methods
    grid = axes.reshape(per_photo, -1).T if photos_across else axes.reshape(-1, per_photo)
    for ax, title, image in zip(grid[:, 0], titles, images, strict=True):
        _draw_image(ax, image)
        (ax.set_title if photos_across else ax.set_ylabel)(title, fontsize="small")
    norm, cmap = (Normalize(-1, 1), DIVERGING) if signed else (PowerNorm(power, 0, 1), SEQUENTIAL)
    for column, (name, values) in zip(grid.T[1:], maps.items(), strict=True):
        for ax in column if wrapped else column[:1]:
            (ax.set_ylabel if photos_across else ax.set_title)(name, fontsize="small")
        shown = valid.get(name, torch.ones_like(values[:, :1], dtype=torch.bool))
        values, is_map = values.detach().where(shown, 0), values.shape[1] == 1
        values = divide_by_maximum(values) if is_map and rescale else values
        for ax, image, value, real in zip(column, images, values, shown, strict=True):
            if not is_map or opacity is not None:
                _draw_image(ax, image.mean(0, keepdim=True) if is_map else value)
            if is_map:
                ax.imshow(_to_numpy(value[0]), cmap, norm, alpha=opacity, extent=(0, width, height, 0))
            if not real.all():
                mask = _to_numpy(~real[0]).repeat(4, axis=0).repeat(4, axis=1)  # edges of pixels are steps
                style: dict[str, Any] = {"colors": "#b4b4b4", "hatches": ["////"]}
                ax.contourf(mask, [0.5, 1.5], extent=(0, width, 0, height), **style)
    _colour_bar(fig, axes, ScalarMappable(norm, cmap), power, opacity)
    return fig


def overlay(
    images: Tensor,
    maps: Mapping[str, Tensor],
    titles: Sequence[str] | None = None,
    *,
    across: str = "methods",
    power: float = 1.0,
    opacity: float = 0.6,
    size: float = 1.6,
) -> Figure:
    """Photographs, and their maps laid over them in grey: `show_maps` with an opacity, and linear colours.

    All arguments, what is returned and what is raised: see `show_maps`.
    """
    return show_maps(images, maps, titles, across=across, power=power, opacity=opacity, size=size)


def show_numbers(
    matrices: Mapping[str, Tensor],
    *,
    columns: int | None = None,
    struck: Mapping[str, Tensor] | None = None,
    limit: float | None = None,
    size: float = 1.8,
) -> Figure:
    """Small matrices with their numbers written into the cells, to follow a calculation by hand.

    Args:
        matrices: for each title, a matrix (H, W).
        columns: matrices per row; None puts all in one row.
        struck: for some of the titles, a boolean matrix (H, W): cells that are crossed out.
        limit: the value at which colours end, the same for all; None is the largest absolute value of all.
        size: width of a matrix in inches.

    Returns:
        A figure with one axes per matrix. It needs no colour bar, since every cell tells its value.

    Raises:
        ValueError: there is no matrix, one is not two-dimensional, `struck` has another title or shape,
            or `columns` is below 1.
    """
    if not matrices:
        raise ValueError("matrices must hold at least one matrix, got none")
    for title, matrix in matrices.items():
        if matrix.ndim != 2:
            raise ValueError(f"matrices[{title!r}] must have two dimensions, got {tuple(matrix.shape)}")
    for title, cells in (struck or {}).items():
        if title not in matrices or cells.shape != matrices[title].shape:
            raise ValueError(f"struck[{title!r}] must have the title and the shape of one of the matrices")
    columns = len(matrices) if columns is None else columns
    height, width = next(iter(matrices.values())).shape
    fig, axes = _panels(len(matrices), columns, size, height / width)
    limit = limit or max(float(matrix.abs().max()) for matrix in matrices.values()) or 1.0
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        _draw_numbers(ax, matrix, limit, (struck or {}).get(title))
        ax.set_title(title, fontsize="small")
    return fig


def _check_look(across: str, power: float, opacity: float | None) -> None:
    if across not in ("methods", "photos"):
        raise ValueError(f"across must be 'methods' or 'photos', got {across!r}")
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")
    if opacity is not None and not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity}")


def _panels(count: int, columns: int, size: float, aspect: float, *, blocks: int = 1) -> tuple[Figure, Any]:
    """So many bare axes in rows of `columns`, each `size` inches wide; each of `blocks` begins a new row."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    per_block = count // blocks
    n_rows, n_columns = blocks * -(-per_block // columns), min(columns, per_block)
    inches = (size * n_columns + 0.8, (size * aspect + 0.18) * n_rows + 0.2)
    fig, axes = plt.subplots(n_rows, n_columns, squeeze=False, layout="compressed", figsize=inches)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        sns.despine(ax=ax, left=True, bottom=True)
    axes = axes.reshape(blocks, -1)
    for ax in axes[:, per_block:].flat:
        ax.remove()
    return fig, axes[:, :per_block].flatten()


def _draw_image(ax: Axes, image: Tensor) -> None:
    picture = _to_numpy(image.detach().clamp(0, 1)).transpose(1, 2, 0)
    extent = (0, picture.shape[1], picture.shape[0], 0)
    ax.imshow(picture.repeat(3, axis=2) if picture.shape[2] == 1 else picture, extent=extent)


def _draw_numbers(ax: Axes, matrix: Tensor, limit: float, struck: Tensor | None) -> None:
    sns.heatmap(
        _to_numpy(matrix.detach()),
        ax=ax,
        cmap=DIVERGING,
        vmin=-2.4 * limit,  # pale colours, so that the numbers can be read, inverted in the dark as well
        vmax=2.4 * limit,
        annot=True,
        fmt="g",
        annot_kws={"color": INK, "fontsize": "medium"},
        cbar=False,
        square=True,
        linewidths=1,
        linecolor="#8a8a8a",
        xticklabels=False,
        yticklabels=False,
    )
    if struck is not None:
        for row, column in struck.nonzero().tolist():
            ax.plot([column + 0.12, column + 0.88], [row + 0.88, row + 0.12], color=INK, linewidth=1.2)


def _colour_bar(fig: Figure, axes: Any, colours: ScalarMappable, power: float, opacity: float | None) -> None:
    shrink = min(1.0, 2.2 / axes[0].get_gridspec().nrows)
    bar = fig.colorbar(colours, ax=axes, shrink=shrink, aspect=18, pad=0.02, alpha=opacity)
    scale = {0.5: "\n(square-root scale)", 1.0: ""}.get(power, f"\n(scale of power {power:g})")
    bar.set_label(f"share of the map's maximum{scale}", fontsize="small")
    signed = colours.norm.vmin == -1
    bar.set_ticks([-1, 0, 1] if signed else [0, 0.1, 0.25, 0.5, 1] if power < 1 else [0, 0.5, 1])
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _check_pictures(images: Tensor, titles: Sequence[str] | None) -> Sequence[str]:
    """Raise unless images can be drawn; gives their titles."""
    check_images(images)
    check_finite(images, name="images")
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels to be drawn, got {images.shape[1]}")
    if titles is None:
        return [""] * len(images)
    if isinstance(titles, str) or len(titles) != len(images):
        got = repr(titles) if isinstance(titles, str) else len(titles)
        raise ValueError(f"titles must be {len(images)} texts, one per image, got {got}")
    return titles


def _check_maps(maps: Mapping[str, Tensor], n: int, signed: bool, valid: Mapping[str, Tensor]) -> None:
    if not isinstance(maps, Mapping):
        raise TypeError(f"maps must be a dict from names to tensors (N, 1, H, W), got {type(maps).__name__}")
    if not maps:
        raise ValueError("maps must hold the maps of at least one method, got none")
    for name, values in maps.items():
        check_images(values, name=f"maps[{name!r}]")
        check_finite(values, name=f"maps[{name!r}]")
        if values.shape[:2] not in ((n, 1), (n, 3)):
            raise ValueError(f"maps[{name!r}] must have shape ({n}, 1, H, W), got {tuple(values.shape)}")
        if not signed and (values < 0).any():
            raise ValueError(f"maps[{name!r}] has negative values: pass signed=True, or take absolute values")
    for name, mask in valid.items():
        if name not in maps or mask.dtype is not torch.bool or mask.shape != maps[name][:, :1].shape:
            raise ValueError(f"valid[{name!r}] must be booleans of the size of the maps of that name")
