"""Example images in a page: each with the patch that was chosen, and over it what each model makes of that patch.

An image is stored once, however many maps lie over it. A map is a picture of one pixel per patch, which the browser
enlarges without smoothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from html import escape

import numpy as np
from matplotlib import colormaps
from PIL import Image

from errors import escaped
from redundancy.finding import Assessed, Example
from redundancy.presentation import wording
from redundancy.presentation.document import data_uri, png

SIDE = 224  # pixels of an image's longer side, at most
HEADS = 12  # maps shown of a model
COLORS = colormaps["viridis"]


def by_image(groups: Mapping[str, list[Assessed]]) -> list[dict[str, Example]]:
    """Of each image: label -> what its model makes of it. Of several seeds, the first shows its examples."""
    shown = {label: models[0].examples for label, models in groups.items()}
    count = max(map(len, shown.values()), default=0)
    return [{label: each[k] for label, each in shown.items() if k < len(each)} for k in range(count)]


def cosine_ends(examples: Iterable[Example]) -> tuple[float, float]:
    """The smallest and largest cosine of one image over all models."""
    known = [example.cosine[np.isfinite(example.cosine)] for example in examples if example.cosine is not None]
    values = np.concatenate([np.ravel(each) for each in known]) if known else np.empty(0)
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def largest(head: np.ndarray) -> float:
    """Of a map; never 0."""
    return max(float(np.nan_to_num(head).max(initial=0)), 1e-12)


class Gallery:
    """Writes the examples of a report; keeps the images that it has written."""

    def __init__(self, groups: Mapping[str, list[Assessed]]) -> None:
        self._examples = by_image(groups)
        self._images: dict[bytes, str] = {}

    def render(self) -> str:
        """All images, each with a row for each label; '' if there are none."""
        return "\n".join(self._image(place, rows) for place, rows in enumerate(self._examples))

    def _image(self, place: int, rows: Mapping[str, Example]) -> str:
        ends = cosine_ends(rows.values())
        title = next((example.title for example in rows.values() if example.title), "")
        name = f"Image {place + 1}" + (f": {escape(escaped(title))}" if title else "")
        colors = (
            f"Cosine: from {wording.number(ends[0])} (dark) to {wording.number(ends[1])} (bright), the same for "
            "all models. Heads: from 0 (dark) to the largest value of each map (bright)."
        )
        strips = "\n".join(self._strip(label, example, ends) for label, example in rows.items())
        return f'<section class="example"><h3>{name}</h3>\n<p class="how">{colors}</p>\n{strips}\n</section>'

    def _strip(self, label: str, example: Example, ends: tuple[float, float]) -> str:
        """The image, the cosine to the chosen patch, and the heads, of one model."""
        row, column = example.patch
        where = f"patch in row {row + 1}, column {column + 1}"
        cells = [self._cell(example, None, "the patch", f"The image, with the {where}")]
        if example.cosine is not None:
            values = (example.cosine - ends[0]) / max(ends[1] - ends[0], 1e-12)
            cells.append(self._cell(example, values, "cosine", f"Cosine of each patch to the {where}"))
        heads = [] if example.heads is None else list(example.heads[:HEADS])
        for k, head in enumerate(heads):
            values = head / largest(head)
            cells.append(self._cell(example, values, f"head {k}", f"Attention of the {where} in head {k}"))
        missing = [] if example.cosine is not None else ["the model shows no patches"]
        missing += [] if example.heads is not None else ["the model shows no map between all patches"]
        if example.heads is not None and len(example.heads) > HEADS:
            missing.append(f"{HEADS} of {len(example.heads)} heads")
        note = f'<p class="how">{escape("; ".join(missing))}.</p>' if missing else ""
        name = escape(escaped(label))
        return f'<div class="strip"><h4>{name}</h4><div class="cells">{"".join(cells)}</div>{note}</div>'

    def _cell(self, example: Example, values: np.ndarray | None, name: str, words: str) -> str:
        image, (height, width) = self._stored(example.image)
        rows, columns = example.grid
        high, wide = height / rows, width / columns
        row, column = example.patch
        over = "" if values is None else _map(values, width, height)
        shade = "" if values is None else ' class="grey"'
        frame = f'<rect x="{column * wide:g}" y="{row * high:g}" width="{wide:g}" height="{high:g}"/>'
        return (
            f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">'
            f'<use{shade} href="#{image}"/>{over}{frame}</svg><figcaption>{name}</figcaption></figure>'
        )

    def _stored(self, image: np.ndarray) -> tuple[str, tuple[int, int]]:
        """The id of an image, and its height and width on the page."""
        picture = Image.fromarray(image)
        picture.thumbnail((SIDE, SIDE))
        data = png(picture)
        name = self._images.setdefault(data, f"image-{len(self._images)}")
        return name, (picture.height, picture.width)

    def images(self) -> str:
        """The images that `render` refers to."""
        stored = []
        for data, name in self._images.items():
            width, height = Image.open(io.BytesIO(data)).size
            stored.append(f'<image id="{name}" width="{width}" height="{height}" href="{data_uri(data)}"/>')
        return f'<svg class="store" aria-hidden="true">{"".join(stored)}</svg>' if stored else ""


def _map(values: np.ndarray, width: int, height: int) -> str:
    """Values from 0 to 1 as colours, clear where there is none, over the whole image."""
    pixels = COLORS(np.ma.masked_invalid(values), bytes=True)  # [rows, columns, 4]
    place = f'width="{width}" height="{height}" preserveAspectRatio="none"'
    return f'<image class="map" {place} href="{data_uri(png(Image.fromarray(pixels)))}"/>'
