"""The report's page: what it says, that it is sound HTML, and how a browser shows it."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import assessed
import browser
import numpy as np
import pytest
from assessed import HARD_LABELS, model, one_metric, report
from PIL import Image

from errors import escaped
from redundancy.finding import Assessed, Example, Finding
from redundancy.metrics.registry import METRICS
from redundancy.presentation import page, wording

EMPTY = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page, taken apart; fails where an element is not closed, or another one is."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def rendered(first):
    pictures = {name: first.pictures(name) for name in wording.names(first.models)}
    return page.render(first.groups(), first.about, pictures)


@pytest.fixture(autouse=True)
def metrics():
    with assessed.registered():
        yield


@pytest.fixture(scope="module")
def hard():
    """The page of eight labels that hold all that a label may hold."""
    with assessed.registered():
        return rendered(assessed.hard_report())


# ------------------------------------------------------------------------------------------------------------
# HTML


def test_the_page_is_sound(hard):
    found = Page(hard)
    ids = Counter(attrs["id"] for _, attrs in found.elements if "id" in attrs)
    assert set(ids.values()) == {1}
    targets = [attrs["href"] for tag, attrs in found.elements if attrs.get("href", "").startswith("#")]
    targets += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", hard)]
    targets += [f"#{attrs['aria-labelledby']}" for _, attrs in found.elements if "aria-labelledby" in attrs]
    assert len(targets) > 100 and {target[1:] for target in targets} <= set(ids)
    assert found.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")


def test_headings_go_down_step_by_step(hard):
    levels = [int(tag[1]) for tag, _ in Page(hard).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_pictures_have_words(hard):
    """Or are hidden from those who would need them."""
    figures = Page(hard).all("svg")
    assert len(figures) > 20
    for attrs in figures:
        assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])


def test_nothing_comes_from_elsewhere(hard):
    found = Page(hard)
    assert not found.all("script") and not found.all("iframe") and not found.all("img")
    links = [attrs[key] for _, attrs in found.elements for key in ("src", "href", "xlink:href") if key in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in hard and not re.search(r"url\((?!#)", hard)
    assert not any(key.startswith("on") for _, attrs in found.elements for key in attrs)


def test_labels_are_text(hard):
    text = Page(hard).text
    for label in HARD_LABELS:
        assert " ".join(escaped(label).split()) in text, label
    assert "\u202e" not in hard and "\x1b" not in hard


# ------------------------------------------------------------------------------------------------------------
# What it says


def test_it_says_how_each_number_is_made(hard):
    articles = dict(re.findall(r'<article class="metric[^"]*" id="metric-([^"]*)"(.*?)</article>', hard, re.DOTALL))
    assert set(articles) == {*METRICS, "patch.cosine-abs+all"}
    for name, metric in METRICS.items():
        text = Page(f"<p{articles[name]}</p>").text
        assert metric.text.title.rstrip(".") in text and metric.text.remarks in text
        assert " ".join(metric.text.equation.split()) in text
        for key, words in metric.text.sections.items():
            assert f"{key} {words}" in text
        assert (f"Redundant the {metric.redundant} end." in text) == bool(metric.redundant)
    assert "shows no maps between all patches" in articles["attn.entropy"]
    assert "16 images in one batch." in articles["patch.cka"]


def test_it_says_where_it_comes_from():
    text = Page(rendered(report(model("a"), model("b", seed=1)))).text
    assert text.startswith("Redundancy in a and b Redundancy in a and b How alike")
    for key, value in assessed.ABOUT.items():
        assert f"{key} {value}" in text
    assert "parameters 22,050,664" in text and "timm:b" in text
    assert "a : shows no maps between all patches ( attn.entropy )" in text


@pytest.mark.parametrize(
    ("name", "change", "mark"),
    [
        ("patch.cosine_abs", +1, "more"),
        ("patch.cosine_abs", -1, "less"),
        ("attn.entropy", +1, "less"),
        ("attn.entropy", -1, "more"),
        ("output.top1", +1, ""),
        ("patch.cosine_abs", 0, None),
    ],
)
def test_clear_differences_are_marked(name, change, mark):
    """Entropy is low where attention is redundant."""
    rng = np.random.default_rng(0)
    values = rng.normal(5, 0.1, 20), rng.normal(5 + change, 0.1, 20)
    findings = [
        Finding((), np.array(each.mean()), None, 20, float(each.mean()), 0.1 / 20**0.5, each) for each in values
    ]
    text = rendered(report(*(one_metric(label, each, name) for label, each in zip("ab", findings, strict=True))))
    cell = re.findall(r'<td class="number">.*?</td>', text)[-1]
    found = re.search(r'<b class="difference (\w*)">', cell)
    assert (found and found[1]) == mark
    if mark:
        assert f'aria-label="{mark} redundant"' in cell


def test_texts_of_figures_are_as_drawn():
    """Places are rounded, numbers are not."""
    mean = 1e-4 * np.arange(1, 14)
    finding = Finding((assessed.layers(12),), mean, np.full(13, 1e-5), 16)
    first = report(one_metric("a", finding, "patch.norm_ratio"))
    ticks = [tick.get_text() for tick in first.plot("patch.norm_ratio").axes[0].get_yticklabels()]
    figure = re.search(r'<svg class="figure".*?</svg>', rendered(first), re.DOTALL)[0]
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
    assert len(ticks) > 3 and {"0.0002", "0.0004"} <= set(ticks) & set(shown)


def test_figures_take_the_pages_colours(hard):
    figures = "".join(re.findall(r'<svg class="figure".*?</svg>', hard, re.DOTALL))
    assert "currentColor" in figures and "var(--blue)" in figures
    assert "#000000" not in figures and "#ffffff" not in figures
    assert "Mean absolute cosine" not in re.sub('aria-label="[^"]*"', "", figures)  # the page's heading says it
    assert "模型" in figures and "DejaVu" not in figures


# ------------------------------------------------------------------------------------------------------------
# Examples


def pixels(link):
    return np.array(Image.open(io.BytesIO(base64.b64decode(link.removeprefix("data:image/png;base64,")))))


def test_examples_show_each_models_maps():
    image = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    cosine = np.array([[0.0, 0.5, 1.0], [-1.0, np.nan, 0.5]])
    first = Example(image, "cat & dog", (2, 3), (1, 2), cosine, np.eye(2, 3)[None] / 4)
    second = Example(image, "cat & dog", (2, 3), (1, 2), cosine / 2)
    text = rendered(report(*(Assessed(label, {}, {}, {}, [each]) for label, each in (("a", first), ("b", second)))))
    found = Page(text)
    assert "Image 1: cat & dog" in found.text and "from −1 (dark) to 1 (bright)" in found.text  # noqa: RUF001
    assert "the model shows no map between all patches." in found.text
    stored, *maps = found.all("image")
    np.testing.assert_array_equal(pixels(stored["href"]), image)  # once for both
    assert [attrs["aria-label"] for attrs in found.all("svg") if "viewbox" in attrs and "role" in attrs] == [
        "The image, with the patch in row 2, column 3",
        "Cosine of each patch to the patch in row 2, column 3",
        "Attention of the patch in row 2, column 3 in head 0",
        "The image, with the patch in row 2, column 3",
        "Cosine of each patch to the patch in row 2, column 3",
    ]
    assert len(found.all("use")) == 5
    frame = {key: float(value) for key, value in found.all("rect")[0].items()}
    assert frame == pytest.approx({"x": 2 * 64 / 3, "y": 20, "width": 64 / 3, "height": 20}, rel=1e-4)
    colors = [pixels(attrs["href"]) for attrs in maps]
    assert [each.shape for each in colors] == [(2, 3, 4)] * 3
    assert colors[0][1, 1, 3] == 0 and colors[0][0, 0, 3] == 255  # a gap is clear
    np.testing.assert_array_equal(colors[0][0, 1], colors[2][0, 2])  # 0.5 in both: one scale
    bright = colors[0][0, 2]
    np.testing.assert_array_equal(colors[1][0, 0], bright)  # a head's largest value
    np.testing.assert_array_equal(colors[1][1, 1], bright)


# ------------------------------------------------------------------------------------------------------------
# In a browser

needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium or google-chrome")


def luminance(color):
    channels = np.array([int(each) for each in re.findall(r"\d+", color)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(tmp_path, hard, width, dark):
    (tmp_path / "report.html").write_text(hard, encoding="utf-8")
    seen = browser.measure(tmp_path / "report.html", tmp_path, width, dark=dark)
    assert seen["inner"] == width and seen["dark"] == dark
    assert seen["scroll"] <= width and seen["tooWide"] == []
    paper, ink = luminance(seen["paper"]), luminance(seen["ink"])
    assert (paper < ink) == dark
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 10


@needs_chromium
def test_the_page_asks_for_nothing_and_complains_of_nothing(tmp_path, hard):
    (tmp_path / "report.html").write_text(hard, encoding="utf-8")
    seen = browser.look(tmp_path / "report.html", tmp_path)
    assert "Redundancy in" in seen.dom
    assert seen.urls == [] and seen.console == []


@needs_chromium
def test_the_browser_notices(tmp_path):
    """What the two tests above look for: it is found where it is."""
    bad = """<!DOCTYPE html><meta http-equiv="x" content="y">
<p style="width: 2000px">wide</p><img src="http://example.com/x.png">
<script>console.log("hello"); missing()</script>"""
    (tmp_path / "bad.html").write_text(bad)
    seen = browser.look(tmp_path / "bad.html", tmp_path)
    assert seen.urls == ["http://example.com/x.png"]
    assert any("hello" in line for line in seen.console) and any("missing" in line for line in seen.console)
    wide = browser.measure(tmp_path / "bad.html", tmp_path, 390)
    assert wide["scroll"] > 1900 and any("wide" in each for each in wide["tooWide"])
