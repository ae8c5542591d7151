"""From finished runs to the numbers of a table: means, differences, and what others published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tables.cells import Cell
from tables.evidence import read_value
from tables.spec import Column, Published, Row, Table
from tables.statistics import Difference, Summary, paired, summarise


@dataclass(frozen=True)
class Line:
    """A row with its numbers, by the columns' names.

    Attributes:
        values: by seed, of the runs that have one.
        summaries: None where nothing ran.
        differences: to the baseline; of the baseline itself, and of what did not run, None.
        runs: finished ones.
        failed: those that ended badly.
    """

    row: Row
    values: dict[str, dict[int, float]]
    summaries: dict[str, Summary | None]
    differences: dict[str, Difference | None]
    runs: int
    failed: int

    def published(self, column: Column) -> list[tuple[float, Published]]:
        """What others published in a column, in the order of the file."""
        return [(each.numbers[column.name], each) for each in self.row.published if column.name in each.numbers]


def read_lines(table: Table, cells: Sequence[Cell]) -> list[Line]:
    """All rows of a table, with the numbers of those cells that are finished.

    Args:
        cells: of any rows.
    """
    finished = {row.name: [c for c in cells if c.row.name == row.name and c.finished] for row in table.rows}
    failed = Counter(cell.row.name for cell in cells if cell.why_failed)
    values = {
        name: {column.name: _by_seed(column, own) for column in table.columns} for name, own in finished.items()
    }
    return [_line(table, row, values, len(finished[row.name]), failed[row.name]) for row in table.rows]


def _by_seed(column: Column, cells: Sequence[Cell]) -> dict[int, float]:
    found = {cell.seed: read_value(column, cell.path) for cell in cells}
    return {seed: value for seed, value in found.items() if value is not None}


def _line(table: Table, row: Row, values: dict[str, dict[str, dict[int, float]]], runs: int, failed: int) -> Line:
    own = values[row.name]
    compared = row.baseline and row.baseline != row.name
    differences = {
        column.name: paired(own[column.name], values[row.baseline][column.name])
        if compared and column.difference
        else None
        for column in table.columns
    }
    summaries = {name: summarise([*numbers.values()]) for name, numbers in own.items()}
    return Line(row, own, summaries, differences, runs, failed)
