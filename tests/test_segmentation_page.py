"""The page of predictions: its pictures pixel by pixel, its tables, that it is sound HTML, and a browser's view."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter

import browser
import numpy as np
import pytest
from PIL import Image
from test_redundancy_page import Page, luminance, needs_chromium

from segmentation.masks import palette
from segmentation.page import SIDE, Scores, Shown, render

HARD = "<b>&\"'\x1b[31m\u202e模型"
CLASSES = ["background", "a & b", HARD, "tree", "sand"]
COLOURS = palette(5)


def shown(labels: tuple[str, ...] = ("plain", "diverse"), size: tuple[int, int] = (9, 12), seed: int = 0) -> Shown:
    random = np.random.default_rng(seed)
    truth = random.choice([0, 1, 2, 255], size).astype(np.uint8)
    image = random.integers(0, 256, (*size, 3), np.uint8)
    predictions = {label: random.choice([0, 1, 2, 3], size).astype(np.uint8) for label in labels}
    return Shown(f"image {seed}", image, truth, predictions)


SCORES = {
    "plain": Scores({"mIoU": 0.43219, "accuracy": 0.7}, {"IoU": [0.1, 0.25, np.nan, 1.0, 0.0]}),
    HARD: Scores({"mIoU": 0.5}, {"IoU": np.linspace(0, 1, 5), "accuracy": [0.5] * 5}),
}
ABOUT = {"data": "DIGITS <100>", "command": "python -m segmentation --x '<y>'"}


def page(*images: Shown, scores: dict[str, Scores] = SCORES) -> str:
    return render("Segmentation of <ADE20K>", images, scores, CLASSES, COLOURS, ABOUT)


def pictures(html: str) -> list[np.ndarray]:
    """All maps of a page, RGBA."""
    links = [attrs["href"] for attrs in Page(html).all("image") if attrs.get("class") == "map"]
    return [np.asarray(decoded(link).convert("RGBA")) for link in links]


def decoded(link: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(link.partition("base64,")[2])))


def coloured(labels: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """What a map should be: the classes' colours, but nothing where it is clear."""
    pixels = np.zeros((*labels.shape, 4), np.uint8)
    for label in range(5):
        pixels[labels == label] = [*COLOURS[label], 255]
    pixels[clear] = 0
    return pixels


def seen(pixels: np.ndarray) -> np.ndarray:
    """Without the colour of clear pixels."""
    return np.where(pixels[..., 3:] > 0, pixels, 0)


def test_pictures_are_the_masks():
    """Truth, and for each model its prediction, both clear where nothing is to be learnt, and its errors in red."""
    each = shown()
    ignored = each.truth == 255
    truth, *drawn = pictures(page(each))
    np.testing.assert_array_equal(seen(truth), coloured(each.truth, ignored))
    for prediction, errors, predicted in zip(drawn[::2], drawn[1::2], each.predictions.values(), strict=True):
        np.testing.assert_array_equal(seen(prediction), coloured(predicted, ignored))
        wrong = [
            (row, column)
            for row, column in np.ndindex(9, 12)
            if each.truth[row, column] != 255 and predicted[row, column] != each.truth[row, column]
        ]
        assert [tuple(place) for place in np.argwhere(errors[..., 3] > 0).tolist()] == wrong
        assert {tuple(errors[place]) for place in wrong} == {(214, 40, 40, 255)}


def test_errors_are_counted():
    each = shown(("one",))
    labelled = each.truth != 255
    share = 100 * np.mean(each.predictions["one"][labelled] != each.truth[labelled])
    assert f"errors, {share:.1f} %" in Page(page(each)).text
    nothing = each._replace(truth=np.full_like(each.truth, 255))
    assert "errors, 0.0 %" in Page(page(nothing)).text


def test_photographs_are_stored_once_and_not_larger_than_needed():
    each = shown(size=(1200, 900))
    html = page(each, shown(size=(20, 30), seed=1))
    stored = [attrs for attrs in Page(html).all("image") if "id" in attrs]
    assert [decoded(attrs["href"]).size for attrs in stored] == [(SIDE * 3 // 4, SIDE), (30, 20)]
    assert [drawn.shape[:2] for drawn in pictures(html)] == [(SIDE, SIDE * 3 // 4)] * 5 + [(20, 30)] * 5
    small = np.asarray(decoded(stored[1]["href"]), int)
    assert np.abs(small - shown(size=(20, 30), seed=1).image).mean() < 12  # noise, as JPEG
    assert len(Page(html).all("use")) == 2 * 3


def test_the_legend_has_the_classes_that_occur():
    """In truth or predictions, with their colours; 255 is none."""
    found = Page(page(shown()))
    legend = re.search(r'<ul class="classes".*?</ul>', page(shown()))[0]
    assert re.findall("background:(#......)", legend) == ["#000000", "#800000", "#008000", "#808000"]
    assert "tree" in Page(legend).text and "sand" not in Page(legend).text
    assert "sand" in found.text  # in the table


def test_scores():
    """In percent; a dash where a class occurs nowhere, or a model has no such score."""
    html = page(shown())
    totals, classes = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert re.findall('<td class="number">(.*?)</td>', totals) == ["43.2", "70.0", "50.0", "–"]  # noqa: RUF001
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", classes)
    cells = [re.findall('<td class="number">(.*?)</td>', row) for row in rows]
    assert cells == [
        ["10.0", "0.0", "50.0"],
        ["25.0", "25.0", "50.0"],
        ["–", "50.0", "50.0"],  # noqa: RUF001
        ["100.0", "75.0", "50.0"],
        ["0.0", "100.0", "50.0"],
    ]


def test_names_are_text():
    """Of classes, models, images and of what is said about them."""
    each = shown()._replace(name=HARD, predictions={HARD: shown().predictions["plain"]})
    html = page(each)
    found = Page(html)
    for words in (
        r"<b>&\"'\x1b[31m\u202e模型".replace('\\"', '"'),
        "<ADE20K>",
        "DIGITS <100>",
        "--x '<y>'",
        "a & b",
    ):
        assert words in found.text, words
    assert "\x1b" not in html and "\u202e" not in html
    assert not found.all("script") and not found.all("b")


def test_the_page_is_sound():
    html = page(shown(), shown(seed=1))
    found = Page(html)
    ids = Counter(attrs["id"] for _, attrs in found.elements if "id" in attrs)
    assert set(ids.values()) == {1}
    targets = [attrs["href"] for _, attrs in found.elements if attrs.get("href", "").startswith("#")]
    assert len(targets) > 8 and {target[1:] for target in targets} <= set(ids)
    assert all(attrs.get("aria-hidden") or attrs["aria-label"] for attrs in found.all("svg"))
    links = [attrs["href"] for _, attrs in found.elements if "href" in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in html and "@import" not in html


def test_what_there_is_not_has_no_heading():
    found = Page(page(scores={}))
    assert "Images" not in found.text and "Scores" not in found.text and "Provenance" in found.text


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_overflows(tmp_path, width, dark):
    (tmp_path / "page.html").write_text(page(shown(), shown(size=(40, 200), seed=1)), encoding="utf-8")
    found = browser.measure(tmp_path / "page.html", tmp_path, width, dark=dark)
    assert found["inner"] == width and found["dark"] == dark
    assert found["scroll"] <= width and found["tooWide"] == []
    paper, ink = luminance(found["paper"]), luminance(found["ink"])
    assert (paper < ink) == dark


@needs_chromium
def test_the_page_asks_for_nothing_and_complains_of_nothing(tmp_path):
    (tmp_path / "page.html").write_text(page(shown()), encoding="utf-8")
    found = browser.look(tmp_path / "page.html", tmp_path)
    assert "Segmentation of" in found.dom
    assert found.urls == [] and found.console == []
