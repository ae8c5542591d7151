"""Reads a table's file, and checks it as a whole. docs/tables.md says what stands in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError, did_you_mean, shown
from options.parser import underscored
from options.yaml_file import EXPONENT, Located, read_yaml
from redundancy.metrics import choose
from tables import HELP, OWN_FLAGS
from tables.programs import MAIN, PROGRAMS, SEGMENTATION
from tables.spec import KNOWN, LARGEST, OF_COST, OF_REPORT, Column, Published, Row, Source, Table

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # also that of a folder
MOST_SEEDS = 1000
LAYER = re.compile(r"mean|first|last|input|\d+")
OF_LOG = re.compile(r"(train|test|ema_test|redundancy)_.+|max_acc|max_miou|n_parameters|epoch")
TABLE_KEYS = (
    *("title", "caption", "runs", "program", "flags", "seeds", "baseline", "report", "sources", "columns", "rows"),
)
ROW_KEYS = ("label", "program", "config", "backbone", "flags", "seeds", "baseline", "group", "published")


@dataclass(frozen=True)
class _Part:
    """A mapping of the file that is being read: takes its values out, and says where one is wrong."""

    path: str
    content: Located
    what: str

    def fail(self, message: str, key: str = "") -> UserError:
        line = self.content.lines.get(key, self.content.line)
        return UserError(f"{self.path}, line {line}: {message}")

    def only(self, known: Iterable[str], needed: Iterable[str] = ()) -> None:
        """Refuse keys that are not known, and the lack of those that are needed."""
        known = [*known]
        for key in self.content:
            if key not in known:
                raise self.fail(
                    f"unknown key {shown(repr(key))} of {self.what}.{did_you_mean(str(key), known)}", str(key)
                )
        for key in needed:
            if self.content.get(key) in (None, "", {}, []):
                raise self.fail(f"{self.what}: no {key}", key)

    def _typed(self, key: str, kind: type | tuple[type, ...], default: Any, words: str) -> Any:
        value = self.content.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(f"{key} of {self.what} must be {words}, not {shown(repr(value))}", key)
        return value

    def text(self, key: str, default: str = "") -> str:
        value: str = self._typed(key, str, default, "a text")
        return " ".join(value.split())

    def switch(self, key: str, default: bool = False) -> bool:
        value: bool = self._typed(key, bool, default, "true or false")
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value: int = self._typed(key, int, default, "a whole number")
        if not low <= value <= high:
            raise self.fail(f"{key} of {self.what} must be between {low} and {high}, not {value}", key)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.content.get(key, default)
        if isinstance(value, str) and EXPONENT.fullmatch(value):
            value = float(value)  # YAML takes 1e6, without a point, for a text
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not abs(value) <= LARGEST:
            raise self.fail(f"{key} of {self.what} must be a number, not {shown(repr(value))}", key)
        return float(value)

    def words(self, key: str) -> tuple[str, ...]:
        """A command line as it is typed, in its words."""
        text = self.text(key)
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise self.fail(f"{key} of {self.what} cannot be read ({error}): {shown(text)}", key) from error

    def texts(self, key: str) -> tuple[str, ...]:
        value: list[Any] = self._typed(key, list, [], "a list of texts")
        if not all(isinstance(each, str) for each in value):
            raise self.fail(f"{key} of {self.what} must be a list of texts, not {shown(repr(value))}", key)
        return tuple(value)

    def name(self, key: str, text: str) -> str:
        if not NAME.fullmatch(text):
            raise self.fail(f"{shown(repr(text))} cannot be the name of a folder: letters, digits, - and _", key)
        return text

    def part(self, key: str, what: str) -> _Part:
        value: Located = self._typed(key, Located, Located(), "a mapping")
        return _Part(self.path, value, what)


def read_table(path: str | Path, seeds: int | None = None) -> Table:
    """Read a table's file.

    Args:
        seeds: of every row; by default what the file says.
    Raises:
        UserError: it cannot be read, or something in it cannot be; with the line.
    """
    path = str(path)
    content = read_yaml(path, located=True)
    if not isinstance(content, Located):
        raise UserError(f"{path} is no table: it must hold title, columns and rows (see docs/tables.md)")
    top = _Part(path, content, "the table")
    top.only(TABLE_KEYS, needed=("title", "columns", "rows"))
    report = top.part("report", "report")
    report.only(("metrics", "images", "draw"), needed=("metrics",) if report.content else ())
    metrics = report.texts("metrics")
    _check_metrics(report, metrics)
    columns = _read_columns(top, metrics)
    sources = _read_sources(top)
    name = top.name("title", Path(path).stem)
    table = Table(
        path=path,
        name=name,
        title=top.text("title"),
        caption=top.text("caption"),
        runs=top.name("runs", top.text("runs", name)),
        flags=_flags(top),
        metrics=metrics,
        images=report.integer("images", 256, 1, 10**9),
        drawn=report.texts("draw"),
        columns=columns,
        rows=(),
        sources=sources,
        program=_program(top, MAIN.name),
    )
    table = replace(table, rows=_read_rows(top, table, seeds))
    ran = [row.name for row in table.rows if row.config]
    for row in table.drawn:
        if row not in ran:
            raise report.fail(
                f"draw names {shown(repr(row))}, which is no row that is run.{did_you_mean(row, ran)}", "draw"
            )
    return table


def _check_metrics(part: _Part, metrics: tuple[str, ...]) -> None:
    try:
        choose(metrics)
    except UserError as error:
        raise part.fail(str(error), "metrics") from error


def _program(part: _Part, default: str) -> str:
    name = part.text("program", default)
    if name not in PROGRAMS:
        hint = did_you_mean(name, PROGRAMS)
        raise part.fail(
            f"program of {part.what} must be {' or '.join(PROGRAMS)}, not {shown(repr(name))}.{hint}", "program"
        )
    return name


def _flags(part: _Part) -> tuple[str, ...]:
    """A program's flags as they are typed, without those that a cell gets from its place."""
    words = part.words("flags")
    for word in words:
        if word in HELP:
            raise part.fail(f"{word} in flags of {part.what}: it asks for help", "flags")
        if word.startswith("--") and underscored(word[2:].partition("=")[0]) in OWN_FLAGS:
            raise part.fail(
                f"{word} in flags of {part.what}: a cell gets it from its row, seed and folder", "flags"
            )
    return words


def _read_columns(top: _Part, metrics: tuple[str, ...]) -> tuple[Column, ...]:
    columns: dict[str, Column] = {}
    listed = top.content["columns"]
    if not isinstance(listed, list):
        raise top.fail("columns must be a list of names and mappings", "columns")
    for entry in listed:
        if isinstance(entry, Located):
            column = _read_column(_Part(top.path, entry, "a column"), metrics)
        elif isinstance(entry, str) and entry in KNOWN:
            column = KNOWN[entry]
        else:
            hint = did_you_mean(str(entry), KNOWN)
            raise top.fail(f"unknown column {shown(repr(entry))}: give name, label and value.{hint}", "columns")
        if column.name in columns:
            raise top.fail(f"two columns are called {column.name}: give one another name", "columns")
        columns[column.name] = column
    return tuple(columns.values())


def _read_column(part: _Part, metrics: tuple[str, ...]) -> Column:
    part.only(("name", "label", "value", "digits", "difference", "divide"), needed=("name",))
    name, value = part.name("name", part.text("name")), part.text("value")
    if value.startswith(OF_REPORT):
        metric, _, layer = value.removeprefix(OF_REPORT).partition("@")
        if metric not in metrics:
            raise part.fail(f"{value} needs {metric} among the metrics of report", "value")
        if layer and not LAYER.fullmatch(layer):
            raise part.fail(f"{value}: a layer is mean, first, last, input or a block's number", "value")
    elif value and not OF_LOG.fullmatch(value) and value not in OF_COST:
        raise part.fail(
            f"value {shown(value)} is no key of log.txt (train_*, test_*, ema_test_*, max_acc, n_parameters), "
            f"max_miou, no report:METRIC@LAYER, and none of {', '.join(OF_COST)}",
            "value",
        )
    if not value and part.switch("difference"):
        raise part.fail(f"{name} has no value, but published numbers alone: drop difference", "difference")
    divide = part.number("divide", 1)
    if not divide:
        raise part.fail("divide must not be 0", "divide")
    label = part.text("label", name)
    return Column(name, label, value, part.integer("digits", 2, 0, 12), part.switch("difference"), divide)


def _read_sources(top: _Part) -> dict[str, Source]:
    given = top.content.get("sources", Located())
    path = top.path
    if isinstance(given, str):
        path = str(Path(top.path).parent / given)
        given = read_yaml(path, "sources", located=True)
    if not isinstance(given, Located):
        raise top.fail("sources must be a mapping, or the name of a file that holds one", "sources")
    sources = {}
    for name in given:
        outer = _Part(path, given, "sources")
        part = outer.part(name, f"source {name}")
        part.only(("text", "link", "second_hand", "note"), needed=("text",))
        second_hand, note = part.switch("second_hand"), part.text("note")
        if second_hand and not note:
            raise part.fail(f"source {name} is second-hand: say in a note whose number it is", "second_hand")
        sources[str(name)] = Source(part.text("text"), part.text("link"), second_hand, note)
    return sources


def _read_rows(top: _Part, table: Table, seeds: int | None) -> tuple[Row, ...]:
    rows = top.part("rows", "rows")
    of_all = top.integer("seeds", 1, 1, MOST_SEEDS)
    baseline = top.text("baseline")
    found = [_read_row(rows, str(name), table, of_all, baseline) for name in rows.content]
    if seeds is not None:
        found = [replace(row, seeds=seeds) for row in found]
    known = {row.name: row for row in found}
    for row in found:
        if row.baseline and (row.baseline not in known or not known[row.baseline].config):
            raise rows.fail(f"baseline {shown(repr(row.baseline))} of {row.name} is no row that is run", row.name)
        _check_backbone(rows, row, known, table)
    if (
        not any(row.baseline for row in found)
        and any(column.difference for column in table.columns)
        and len(found) > 1
    ):
        raise top.fail("differences need a baseline: name its row, or leave columns without difference", "columns")
    return tuple(found)


def _check_backbone(rows: _Part, row: Row, known: Mapping[str, Row], table: Table) -> None:
    """Refuse a backbone that trains nothing to start on; one that is no row here is looked for in its folder."""
    if row.backbone and row.program != SEGMENTATION.name:
        raise rows.fail(
            f"backbone of {row.name} is for rows of segmentation: say program: segmentation, or give main.py's "
            "--finetune in flags",
            row.name,
        )
    if table.metrics and row.config and row.program == SEGMENTATION.name and not row.backbone:
        raise rows.fail(
            f"the report on {row.name} needs images of the kind that its backbone was trained on: say backbone: "
            "ROW, or drop report",
            row.name,
        )
    there = known.get(row.backbone)
    if there is None:
        return
    if there.program != MAIN.name or not there.config:
        raise rows.fail(f"backbone {row.backbone} of {row.name} is no row that main.py trains", row.name)
    if there.seeds < row.seeds:
        raise rows.fail(
            f"{row.name} has {row.seeds} seeds, its backbone {row.backbone} {there.seeds}: each starts on its own",
            row.name,
        )


def _read_row(rows: _Part, name: str, table: Table, seeds: int, baseline: str) -> Row:
    part = rows.part(name, f"row {name}")
    part.only(ROW_KEYS)
    if not (part.content.get("config") or part.content.get("published")):
        raise rows.fail(f"row {name} has neither config nor published numbers", name)
    config, backbone = part.text("config"), part.text("backbone")
    return Row(
        name=rows.name(name, name),
        label=part.text("label") or name,
        config=config,
        flags=_flags(part),
        seeds=part.integer("seeds", seeds, 1, MOST_SEEDS),
        baseline=part.text("baseline", baseline) if config else "",
        group=part.text("group"),
        published=_read_published(part, table),
        program=_program(part, table.program),
        backbone=rows.name(name, backbone) if backbone else "",
        line=rows.content.lines[name],
    )


def _read_published(row: _Part, table: Table) -> tuple[Published, ...]:
    given = row.content.get("published", [])
    found = []
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, Located):
            raise row.fail("published must be a mapping of columns to numbers, with their source", "published")
        part = _Part(row.path, entry, f"published numbers of {row.what}")
        columns = [column.name for column in table.columns]
        part.only([*columns, "source"], needed=("source",))
        source = part.text("source")
        if source not in table.sources:
            hint = did_you_mean(source, table.sources)
            raise part.fail(f"unknown source {shown(repr(source))}: it must stand in sources.{hint}", "source")
        numbers = {name: part.number(name, 0) for name in columns if name in entry}
        if not numbers:
            raise part.fail("published has a source and no number", "source")
        found.append(Published(numbers, source))
    return tuple(found)
