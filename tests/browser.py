"""A page in headless Chromium: how wide it is, what it asks for and what it complains about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import NamedTuple

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
OF_A_PAGE = 101845102  # Chromium's number for requests of pages; it has others for its own

# Chromium makes no window of 390 pixels, but a frame of any width. What is in it tells its parent how wide it is
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<script>addEventListener("message", message => document.body.dataset.probe = JSON.stringify(message.data))</script>
<body style="margin:0"><iframe src="{page}" style="border:0; width:{width}px; height:800px"></iframe>"""
PROBE = """<script>addEventListener("load", () => parent.postMessage({
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  tooWide: [...document.querySelectorAll("body *")].filter(
    each => !each.closest(".scroll, .legend") && each.getBoundingClientRect().right > innerWidth + 1
  ).map(each => each.outerHTML.slice(0, 80)),
}, "*"))</script>"""


class Seen(NamedTuple):
    """What Chromium has seen of a page.

    Attributes:
        dom: what became of it.
        urls: that it asked for.
        console: its messages.
    """

    dom: str
    urls: list[str]
    console: list[str]


def look(page: Path, folder: Path, *, dark: bool = False) -> Seen:
    """Open a page, in an empty profile in the folder."""
    log = folder / "net.json"
    flags = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--window-size=1400,900"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, *QUIET.split(), *flags, "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
    urls = re.findall(rf'"traffic_annotation":{OF_A_PAGE},"url":"([^"]*)"', log.read_text())
    return Seen(run.stdout, urls, console)


def measure(page: Path, folder: Path, width: int, *, dark: bool = False) -> dict:
    """What PROBE says of a copy of a page that is shown this wide. The page's own policy would not let it in."""
    text, count = re.subn(r"<meta http-equiv[^\n]*", PROBE, page.read_text(encoding="utf-8"))
    assert count == 1
    (folder / "copy.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(page="copy.html", width=width))
    seen = look(folder / "frame.html", folder, dark=dark)
    found = re.search(r'data-probe="([^"]*)"', seen.dom)
    assert found, seen
    return json.loads(unescape(found[1]))
