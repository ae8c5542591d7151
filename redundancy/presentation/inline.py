"""A matplotlib figure as SVG inside a page: in the page's colours and font, with ids of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from itertools import product

from errors import shown
from redundancy.presentation.styles import FONT, MAP_LABEL, PAGE_COLORS, ROW_LABEL, Drawing, drawable, in_style


def svg(figure: Drawing, prefix: str, words: str, labels: Sequence[str]) -> str:
    """The element <svg> of a figure, without its title and legend, which it loses.

    Args:
        prefix: of all ids in it.
        words: for those who cannot see it.
        labels: of the report. A browser has the letters that the figure had to escape.
    """
    figure.bare()
    buffer = io.BytesIO()
    with in_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=100)
    text = buffer.getvalue().decode()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    for label, limit in product(labels, (ROW_LABEL, MAP_LABEL)):
        drawn = escape(drawable(label, limit), quote=False)
        body = body.replace(f">{drawn}<", f">{escape(shown(label, limit))}<")
    return _head(text, words) + _named(_coloured(_rounded(body)), prefix)


def _head(text: str, words: str) -> str:
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None  # matplotlib always writes one
    return f'<svg class="figure" viewBox="{box[1]}" role="img" aria-label="{escape(words)}">'


def _coloured(body: str) -> str:
    """What was drawn in ink takes the colour of the page's text, and so on."""
    for color, ours in PAGE_COLORS.items():
        body = body.replace(color, ours)
    return re.sub(rf"'{FONT}'[^;\"]*", "var(--sans)", body)


def _rounded(body: str) -> str:
    """Two decimals of a point are enough for places; texts stay as they are."""

    def shorter(tag: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), tag[0])

    return re.sub(r"<[^>]*>", shorter, body)


def _named(body: str, prefix: str) -> str:
    """Only what is referred to keeps its id, with the prefix."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)([^)"]+)', rf"\g<1>{prefix}-\g<2>", body)
    return re.sub(r"\n\s*", "\n", body.replace("xlink:href", "href"))
