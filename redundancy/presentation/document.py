"""A page of HTML by itself: no scripts, nothing from elsewhere; for light and dark, phones and paper.

All text that comes from outside goes through `text`, which escapes it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from errors import escaped
from redundancy.presentation import wording

CSS = Path(__file__).with_name("page.css")


def document(
    title: str, lede: str, sections: Mapping[str, tuple[str, str]], images: str = "", css: str = ""
) -> str:
    """The page.

    Args:
        title: HTML.
        lede: HTML, below the title.
        sections: anchor -> heading and HTML; one without HTML is left out.
        images: an element that holds what others refer to.
        css: rules besides those of page.css.
    """
    present = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<li><a href="#{name}">{head}</a></li>' for name, (head, _) in present.items())
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{head}</h2>\n{content}\n</section>'
        for name, (head, content) in present.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{CSS.read_text(encoding="utf-8")}{css}</style>
</head>
<body>
{images}
<header><h1>{title}</h1>
{lede}
<nav aria-label="Contents"><ul>{links}</ul></nav></header>
<main>
{body}
</main>
</body>
</html>
"""


def text(words: Any) -> str:
    """A text of others: harmless in HTML, and without what would turn its direction or hide."""
    if isinstance(words, float):
        words = wording.number(words)
    return escape(escaped(f"{words:,}" if isinstance(words, int) else str(words)))


def scrolling(table: str, words: str) -> str:
    """A box in which a wide table scrolls, also by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{words}">{table}</div>'


def about_list(about: Mapping[str, Any]) -> str:
    """Names and what they are; commands as they are typed."""
    lines = []
    for key, value in about.items():
        words = f"<pre>{text(value)}</pre>" if key == "command" else text(value)
        lines.append(f"<div><dt>{text(key)}</dt><dd>{words}</dd></div>")
    return f'<dl class="about">{"".join(lines)}</dl>' if lines else ""


def png(picture: Image.Image, **options: Any) -> bytes:
    """A picture as the bytes of a PNG file, with Pillow's options for one."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    """The bytes of an image file as an address."""
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
