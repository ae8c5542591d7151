"""How figures look: colours that the colour-blind tell apart, line styles and markers for those who print in grey.

Colours are those of Okabe and Ito (2008). Yellow, invisible on white, is darker here.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from matplotlib import style as rules
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text

from errors import shown

INK = "#1f2933"  # text and axes; where figures are part of a page, the page's own colour of text
FAINT = "#9aa5b1"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#b3a400")
# What they become in a page, whose style sheet knows a brighter blue and yellow for dark screens
PAGE_COLORS = {INK: "currentColor", FAINT: "var(--faint)", "#0072b2": "var(--blue)", "#b3a400": "var(--yellow)"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1.2, 1.2), (5, 1.2, 1.2, 1.2), (7, 1.5))
FONT = "DejaVu Sans"  # comes with matplotlib
LEGEND_LABEL, ROW_LABEL, MAP_LABEL = 36, 24, 20  # letters of a label in a legend, beside a row, over a map
LEGEND_ROW, TITLE_ROW = 0.19, 0.17  # inches
TITLE_WIDTH = 62  # letters
RULES = {
    "font.family": FONT,
    "font.size": 8,
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "figure.titlesize": 8.5,
    "axes.titlesize": 8,
    "axes.titlepad": 4,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.6,
    "hatch.linewidth": 0.6,
    "hatch.color": FAINT,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "redundancy",
    "pdf.fonttype": 42,
}


class Style(NamedTuple):
    """Of one label, the same in all figures."""

    color: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def line(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.color, "dashes": self.dashes} if self.dashes else {"color": self.color}


def style(index: int) -> Style:
    """Of the label at this place of a report."""
    return Style(COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)])


class Drawing(Figure):
    """A figure that notebooks show without pyplot, and that can do without its title and legend."""

    bare_size: tuple[float, float]  # its size then, in inches
    heading: Text | None = None

    def bare(self) -> None:
        """For a page that has headings, one legend for all figures and a background of its own."""
        for legend in list(self.legends):
            legend.remove()
        if self.heading is not None:
            self.heading.set_visible(False)
        self.set_size_inches(*self.bare_size)
        self.patch.set_visible(False)

    def grow(self, height: float) -> None:
        """By so many inches."""
        self.set_size_inches(self.get_figwidth(), self.get_figheight() + height)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Nothing moves any more: it is laid out once, not again for each format."""
        self.draw_without_rendering()
        engine = self.get_layout_engine()
        self.set_layout_engine("none")
        yield
        self.set_layout_engine(engine)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with in_style():
            self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


@contextmanager
def in_style() -> Iterator[None]:
    """Draw and save by the rules above, whatever the user's own are. These are back afterwards."""
    with rules.context(["default", RULES]):
        yield


def new_figure(width: float, height: float) -> Drawing:
    figure = Drawing(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.bare_size = (width, height)
    return figure


def add_title(figure: Drawing, words: str) -> None:
    """Above the figure, which grows by it."""
    lines = textwrap.wrap(words, TITLE_WIDTH)
    figure.heading = figure.suptitle("\n".join(lines), x=0.01, ha="left", parse_math=False)
    figure.grow(TITLE_ROW * len(lines))


def add_legend(figure: Drawing, looks: Mapping[str, Style]) -> None:
    """Below the figure, which grows by it."""
    texts = [drawable(label) for label in looks]
    longest = max(map(len, texts))
    columns = min(len(texts), 1 if longest > 24 else 2 if longest > 12 else 4)
    handles = [Line2D([], [], **look.line, marker=look.marker) for look in looks.values()]
    # a label itself might begin with '_', or be taken for mathematics
    places = [str(place) for place in range(len(texts))]
    legend = figure.legend(handles, places, loc="outside lower center", ncols=columns)
    for text, words in zip(legend.get_texts(), texts, strict=True):
        text.set_parse_math(False)
        text.set_text(words)
    figure.grow(0.1 + LEGEND_ROW * -(-len(texts) // columns))


def say_nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no numbers", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def drawable(text: str, limit: int = LEGEND_LABEL) -> str:
    """A short text in letters of the figures' font; others are escaped, as a box would say less."""
    letters = _letters()
    for shorter in (limit, limit // 2, limit // 4):  # an escape is longer than its letter
        short = shown(text, max(shorter, 9))
        escaped = "".join(char if ord(char) in letters else f"\\u{ord(char):04x}" for char in short)
        if len(escaped) <= limit:
            break
    return escaped


@cache
def _letters() -> frozenset[int]:
    """What the font has."""
    return frozenset(get_font(findfont(FONT)).get_charmap())
