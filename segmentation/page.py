"""Predictions as one page of HTML: image, truth, prediction and error side by side, and the scores of each class.

The page is redundancy's: no scripts, nothing from elsewhere, all text of others escaped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from errors import shown
from redundancy.presentation.document import about_list, data_uri, document, png, scrolling, text
from redundancy.presentation.wording import counted, number
from segmentation.masks import IGNORED

CSS = Path(__file__).with_name("page.css")
SIDE = 480  # pixels of a picture's longer side, at most
QUALITY = 90  # of JPEG, for photographs
WRONG = (214, 40, 40)
NAME = 60  # letters of an image's name
READING = (
    "Errors are red: labelled pixels whose predicted class is another. What the truth leaves out is clear in both, "
    "and counts in no score."
)


class Shown(NamedTuple):
    """An image and what models make of it.

    Attributes:
        name: of the image.
        image: uint8 [H, W, 3].
        truth: uint8 [H, W], classes or IGNORED.
        predictions: label of a model -> its classes, uint8 [H, W].
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]


class Scores(NamedTuple):
    """Of one model; all numbers are shares of 1.

    Attributes:
        total: name of a score -> its value, e.g. mIoU.
        by_class: name of a score -> its value for each class, [K]; nan where there is none.
    """

    total: Mapping[str, float]
    by_class: Mapping[str, Sequence[float] | np.ndarray]


def render(
    title: str,
    images: Sequence[Shown],
    scores: Mapping[str, Scores],
    classes: Sequence[str],
    palette: np.ndarray,
    about: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        title: e.g. 'Segmentation of DIGITS'.
        images: that are shown.
        scores: label of a model -> its scores, over the whole set.
        classes: K names.
        palette: uint8 [K, 3].
        about: what it is and how it was made, name -> value.
    """
    gallery = _Gallery(classes, palette)
    drawn = "\n".join(gallery.draw(place, each) for place, each in enumerate(images, 1))
    sections = {
        "scores": ("Scores", _totals(scores)),
        "images": ("Images", f'<p class="how">{READING}</p>\n{drawn}' if drawn else ""),
        "classes": ("Classes", _by_class(scores, gallery)),
        "provenance": ("Provenance", about_list(about)),
    }
    lede = f"{len(classes)} classes; {counted(len(images), 'image')} shown."
    css = CSS.read_text(encoding="utf-8")
    return document(text(title), f'<p class="lede">{lede}</p>', sections, gallery.stored(), css)


# ------------------------------------------------------------------------------------------------------------
# Tables


def _totals(scores: Mapping[str, Scores]) -> str:
    """A row for each model."""
    names = list(dict.fromkeys(name for each in scores.values() for name in each.total))
    if not names:
        return ""
    heads = "".join(f'<th scope="col" class="number">{text(name)} (%)</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{text(label)}</th>'
        + "".join(_percent(each.total.get(name, np.nan)) for name in names)
        + "</tr>"
        for label, each in scores.items()
    )
    head = f'<tr><th scope="col">Model</th>{heads}</tr>'
    return scrolling(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>", "Scores")


def _by_class(scores: Mapping[str, Scores], gallery: _Gallery) -> str:
    """A row for each class, a column for each model and score."""
    columns = [(label, name, values) for label, each in scores.items() for name, values in each.by_class.items()]
    if not columns:
        return ""
    heads = "".join(
        f'<th scope="col" class="number">{text(label)}: {text(name)} (%)</th>' for label, name, _ in columns
    )
    rows = "".join(
        f'<tr><th scope="row">{gallery.named(k)}</th>'
        + "".join(_percent(float(values[k])) for _, _, values in columns)
        + "</tr>"
        for k in range(len(gallery.classes))
    )
    head = f'<tr><th scope="col">Class</th>{heads}</tr>'
    return scrolling(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>", "Scores of each class")


def _percent(value: float) -> str:
    return f'<td class="number">{number(100 * value, 1)}</td>'


# ------------------------------------------------------------------------------------------------------------
# Pictures


class _Gallery:
    """Draws images; keeps them, each once, for the parts of the page that refer to them."""

    def __init__(self, classes: Sequence[str], palette: np.ndarray) -> None:
        self.classes = classes
        self.palette = palette
        self._images: list[str] = []

    def named(self, label: int) -> str:
        """A class's colour and name."""
        colour = "#{:02x}{:02x}{:02x}".format(*self.palette[label].tolist())
        return f'<span class="chip" style="background:{colour}"></span>{text(self.classes[label])}'

    def draw(self, place: int, each: Shown) -> str:
        """The row of one image, and below it the classes that occur in it."""
        name = text(shown(each.name, NAME))
        picture = Image.fromarray(each.image)
        picture.thumbnail((SIDE, SIDE))
        size, photo = picture.size, self._store(picture)
        labelled = each.truth != IGNORED
        cells = [
            _cell(size, f'<use href="#{photo}"/>', "image", f"Image {place}"),
            _cell(size, self._map(each.truth, size), "truth", "The true classes"),
        ]
        for label, predicted in each.predictions.items():
            whose = f"{label}: " if len(each.predictions) > 1 else ""
            wrong = (predicted != each.truth) & labelled
            caption = f"{whose}errors, {number(100 * float(wrong.sum() / max(1, labelled.sum())), 1)} %"
            drawn = self._map(np.where(labelled, predicted, IGNORED), size)
            red = f'<use class="under" href="#{photo}"/>{_errors(wrong, size)}'
            cells.append(_cell(size, drawn, f"{whose}prediction", f"The classes that {label} predicts"))
            cells.append(_cell(size, red, caption, f"Where {label} is wrong"))
        found = np.unique(np.stack([each.truth, *each.predictions.values()]))
        legend = "".join(f"<li>{self.named(int(label))}</li>" for label in found if label < len(self.classes))
        return (
            f'<article class="example"><h3>Image {place}: {name}</h3>\n<div class="pictures">{"".join(cells)}</div>'
            f'<ul class="classes" aria-label="Classes">{legend}</ul></article>'
        )

    def _store(self, picture: Image.Image) -> str:
        """The id by which others refer to it."""
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
        name = f"image-{len(self._images)}"
        place = f'id="{name}" width="{picture.width}" height="{picture.height}"'
        self._images.append(f'<image {place} href="{data_uri(buffer.getvalue(), "jpeg")}"/>')
        return name

    def _map(self, labels: np.ndarray, size: tuple[int, int]) -> str:
        """Classes in their colours; clear where they are IGNORED."""
        return _overlay(labels, self.palette, IGNORED, size)

    def stored(self) -> str:
        """The images that `draw` refers to."""
        return f'<svg class="store" aria-hidden="true">{"".join(self._images)}</svg>' if self._images else ""


def _cell(size: tuple[int, int], drawn: str, caption: str, words: str) -> str:
    """One picture of a row."""
    box = f'viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{text(words)}"'
    return f"<figure><svg {box}>{drawn}</svg><figcaption>{text(caption)}</figcaption></figure>"


def _errors(wrong: np.ndarray, size: tuple[int, int]) -> str:
    """Red where something is wrong, clear elsewhere."""
    return _overlay(wrong.astype(np.uint8), np.array([(0, 0, 0), WRONG], np.uint8), 0, size)


def _overlay(labels: np.ndarray, palette: np.ndarray, clear: int, size: tuple[int, int]) -> str:
    """Numbers [H, W] as a picture of the palette's colours; the number `clear` is transparent."""
    picture = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    picture.putpalette(np.concatenate([palette, np.zeros((256 - len(palette), 3), np.uint8)]).tobytes())
    address = data_uri(png(picture, transparency=clear))
    return f'<image class="map" width="{size[0]}" height="{size[1]}" href="{address}"/>'
