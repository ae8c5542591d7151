"""Example images as figures for papers: a row for each label, the maps of the chosen patch over the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from redundancy.finding import Assessed, Example
from redundancy.presentation.figures import WIDTH, Picture
from redundancy.presentation.pictures import by_image, cosine_ends, largest
from redundancy.presentation.styles import ROW_LABEL, Drawing, drawable, in_style, new_figure

HEADS = 6  # a paper's column has room for so many


def draw(groups: Mapping[str, list[Assessed]]) -> Iterator[Picture]:
    """A figure for each image."""
    for place, rows in enumerate(by_image(groups), 1):
        with in_style():
            yield Picture(f"example.{place}", "", f"Image {place}", _draw(rows))


def _draw(rows: Mapping[str, Example]) -> Drawing:
    heads = max(0 if example.heads is None else len(example.heads) for example in rows.values())
    columns = 2 + min(heads, HEADS)
    height, width = next(iter(rows.values())).image.shape[:2]
    figure = new_figure(WIDTH, 0.15 + len(rows) * (0.2 + WIDTH / columns * height / width))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    ends = cosine_ends(rows.values())
    for axes, name in zip(grid[-1], ("patch", "cosine", *(f"head {k}" for k in range(heads))), strict=False):
        axes.text(0.5, -0.04, name, transform=axes.transAxes, ha="center", va="top", fontsize=7)
    for line, (label, example) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        line[0].set_title("", loc="left").set_parse_math(False)
        line[0].set_title(drawable(label, ROW_LABEL), loc="left")
        _show(line[0], example, None, ends)
        if example.cosine is not None:
            _show(line[1], example, example.cosine, ends)
        for axes, head in zip(line[2:], () if example.heads is None else example.heads, strict=False):
            _show(axes, example, head, (0.0, largest(head)))
    return figure


def _show(axes: Axes, example: Example, over: np.ndarray | None, ends: tuple[float, float]) -> None:
    """The image with its chosen patch, in grey below a map."""
    height, width = example.image.shape[:2]
    extent = (0, width, height, 0)
    if over is None:
        axes.imshow(example.image, extent=extent)
    else:
        axes.imshow(example.image.mean(axis=-1), cmap="gray", vmin=0, vmax=255, extent=extent)
        axes.imshow(over, vmin=ends[0], vmax=ends[1], extent=extent, alpha=0.72, interpolation="nearest")
    (rows, columns), (row, column) = example.grid, example.patch
    size = width / columns, height / rows
    for color, line in (("black", 1.8), ("white", 0.9)):
        axes.add_patch(
            Rectangle((column * size[0], row * size[1]), *size, fill=False, edgecolor=color, linewidth=line)
        )
