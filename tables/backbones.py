"""Backbones: the runs on whose weights cells of segmentation start. They are rows of this table, or of another."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from errors import UserError
from options.config import Resolved
from tables.cells import Cell, cells_of
from tables.evidence import ARGS, ROOT
from tables.options import SOURCES, TABLES
from tables.programs import MAIN
from tables.reading import read_table
from tables.spec import Table


def described_by(cell: Cell, cells: Sequence[Cell]) -> Resolved | None:
    """The flags of the run that trains a cell's backbone; None if its row names none.

    Args:
        cells: of the table, those that may train it.
    Raises:
        UserError: no row of that name is known, and no run of it is there.
    """
    if not cell.row.backbone:
        return None
    own = [each for each in cells if each.folder == cell.backbone]
    if own:
        return own[0].args
    if (ROOT / cell.backbone / ARGS).is_file():
        return MAIN.resolve(["--config", str(ROOT / cell.backbone / ARGS)])
    table = table_of(cell)
    if table is None:
        raise _unknown(cell)
    row = replace(table.row(cell.row.backbone), seeds=cell.seed + 1)
    return cells_of(table, [row], cell.folder.parents[2])[-1].args


def check_backbones(cells: Sequence[Cell], output: Path) -> None:
    """Refuse cells whose backbone is neither there nor trained before them.

    Args:
        output: the folder of all runs, as the command line has it.
    Raises:
        UserError: with the command that trains all that are missing of this table.
    """
    own = {cell.folder for cell in cells}
    missing = [cell for cell in cells if not (cell.is_done or cell.has_backbone or cell.backbone in own)]
    if not missing:
        return
    first = missing[0]
    table = table_of(first)
    if table is None:
        raise first.fail(_unknown(first))
    wanted = {cell.row.backbone for cell in missing}
    names = [row.name for row in table.rows if row.name in wanted]
    words = ["python", "script/reproduce_table.py", _called(table), "--only", *names]
    words += ["--seeds", str(1 + max(cell.seed for cell in missing)), "--output", str(output)]
    raise first.fail(
        UserError(f"its backbone is not trained in {first.backbone}. Train it first: {shlex.join(words)}")
    )


def table_of(cell: Cell) -> Table | None:
    """The table that trains a cell's backbone, beside the cell's own or in configs/tables; None if none does."""
    beside = sorted(Path(cell.table.path).absolute().parent.glob("*.yaml"))
    for path in dict.fromkeys([*beside, *sorted(TABLES.glob("*.yaml"))]):
        if path.name == SOURCES:
            continue
        try:
            table = read_table(path)
        except UserError:
            continue  # whatever else lies there
        if table.runs == cell.table.runs and any(
            row.name == cell.row.backbone and row.config and row.program == MAIN.name for row in table.rows
        ):
            return table
    return None


def _unknown(cell: Cell) -> UserError:
    return UserError(
        f"its backbone {cell.row.backbone} is not trained in {cell.backbone}, and no table of configs/tables, nor "
        f"one beside this one, has a row of that name with runs: {cell.table.runs}"
    )


def _called(table: Table) -> str:
    path = Path(table.path).absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
