"""The record of a table: what its runs left, without weights, and the pages that are written from it."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from errors import UserError, reason
from loggers.text import LOG
from tables import writing
from tables.cells import Cell, cells_of
from tables.evidence import ARGS, BAD_END, COST, REPORT, ROOT, origin, read_object
from tables.numbers import read_lines
from tables.spec import Table
from utils import write_atomically

ORIGIN = {
    "revision": "revision",
    "python": "Python",
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "processes": "processes of a run:",
    "processor": "processor:",
    "gpu": "GPU:",
}
FILES = (LOG, ARGS, COST, REPORT, BAD_END)


def keep(cell: Cell, folder: Path) -> None:
    """Copy what a run left that has ended, well or badly, into a folder of records.

    The data's folder is called DATA there: no record says where somebody keeps it.

    Raises:
        UserError: it cannot be written.
    """
    target = ROOT / folder / cell.table.runs / cell.row.name / f"seed-{cell.seed}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if not (cell.path / name).is_file():
                (target / name).unlink(missing_ok=True)
            else:
                content = (cell.path / name).read_bytes()
                for path in sorted(cell.given.data.values(), key=len, reverse=True):
                    content = content.replace(os.fsencode(path), b"DATA")
                write_atomically(target / name, partial(_write, content))
    except OSError as error:
        raise UserError(f"cannot write to --keep {folder}: {reason(error)}") from error


def recorded(table: Table, folder: Path) -> list[Cell]:
    """The cells of a folder of records."""
    return cells_of(table, [row for row in table.rows if row.config], folder)


def pages(table: Table, cells: Sequence[Cell], command: str) -> dict[str, str]:
    """The pages of a table as texts, by their suffixes.

    Args:
        cells: of any state.
        command: that makes the table, for the page.
    """
    layout = writing.lay_out(table, read_lines(table, cells))
    return {
        "md": writing.markdown(layout, command, provenance(cells)),
        "tex": writing.latex(layout),
        "csv": writing.summary_csv(layout),
        "seeds.csv": writing.seeds_csv(layout),
    }


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be written to, before hours are spent.

    Raises:
        UserError: with the reason.
    """
    path = ROOT / folder
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {flag} {folder}: {there} is no folder that can be written to")


def provenance(cells: Sequence[Cell]) -> str:
    """Where the numbers come from, in a sentence: all revisions, versions and machines of the finished runs."""
    origins = [origin(cell.path) for cell in cells if cell.finished]
    parts = []
    for name, words in ORIGIN.items():
        values = dict.fromkeys(each[name] for each in origins if name in each)
        if values:
            parts.append(f"{words} {', '.join(values)}")
    return f"{len(origins)} runs: {'; '.join(parts)}." if parts else ""


def write_pages(
    table: Table, cells: Sequence[Cell], folder: Path, command: str, with_figure: bool = True
) -> list[Path]:
    """Write NAME.md, NAME.tex, NAME.csv, NAME.seeds.csv, and the figures.

    Raises:
        UserError: they cannot be written.
    """
    texts = pages(table, cells, command)
    written = []
    try:
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            path = folder / f"{table.name}.{suffix}"
            write_atomically(ROOT / path, partial(_write, text.encode()))
            written.append(path)
        if with_figure:
            written += _write_figures(table, cells, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {reason(error)}") from error
    return written


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def fingerprint(table: Table, cells: Sequence[Cell]) -> str:
    """Of all numbers that the figures show, to see whether they are those of these runs."""
    texts = pages(table, cells, "")
    reports = [read_object(cell.path / REPORT) for cell in cells if cell.row.name in table.drawn]
    return "sha256 " + hashlib.sha256((texts["seeds.csv"] + texts["csv"] + repr(reports)).encode()).hexdigest()


def _write_figures(table: Table, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """NAME.png, and NAME.layers.png if rows are drawn layer by layer."""
    from tables.figure import draw, draw_layers  # matplotlib takes time

    mark, written = fingerprint(table, cells), []
    for path, drawn in (
        (folder / f"{table.name}.png", partial(draw, table, read_lines(table, cells))),
        (folder / f"{table.name}.layers.png", partial(draw_layers, table, cells)),
    ):
        part = ROOT / path.with_name(f".{path.name}")
        if drawn(part, mark):
            part.replace(ROOT / path)
            written.append(path)
        else:
            (ROOT / path).unlink(missing_ok=True)  # of other numbers
    return written


def described(words: Sequence[str]) -> str:
    """The command that makes a table, as one types it."""
    return shlex.join(["python", "script/reproduce_table.py", *words])
