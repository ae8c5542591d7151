"""Before anything runs: every cell is checked as a whole, and what it would cost is estimated."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError
from options.config import plain
from tables.backbones import described_by
from tables.cells import Cell
from tables.evidence import COST, read_object
from tables.spec import Row
from tables.trials import Data, Size

# Flags that say nothing of what is built.
OF_THE_RUN = ("seed", "output_dir", "resume", "config", "backbone", "data_path")


@dataclass(frozen=True)
class Estimate:
    """Of one row.

    Attributes:
        runs: that are left.
        hours: of GPUs, for one run; None where no rate is known.
        basis: where the rate is from.
    """

    row: Row
    runs: int
    size: Size
    hours: float | None
    basis: str


def check(cells: Sequence[Cell], with_data: bool, processes: int = 1) -> dict[str, Size]:
    """Build what every row trains, so that nothing fails that could have been known.

    Args:
        with_data: open the data in any case; else where it is at hand, and take it for the usual set where not.
        processes: of each run.
    Returns:
        The size of each row's model, by the rows' names.
    Raises:
        UserError: flags, data, a model or its terms cannot be, or a folder holds another run; with the row's line.
    """
    for cell in cells:  # all flags, before the first model is built
        cell.args  # noqa: B018 - resolves them
        cell.check()
    opened: dict[str, Data] = {}
    built: dict[str, Size] = {}
    sizes: dict[str, Size] = {}
    for cell in cells:
        if cell.row.name in sizes:
            continue
        program = cell.program
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                args = program.follow(cell.args, described_by(cell, cells))
                key = repr((program.name, [getattr(args, name) for name in program.of_data]))
                if key not in opened:
                    opened[key] = program.open(args, with_data)
                flags = {name: value for name, value in plain(args).items() if name not in OF_THE_RUN}
                what = repr((program.name, opened[key], flags))
                if what not in built:
                    built[what] = program.build(args, opened[key], processes)
        except UserError as error:
            raise cell.fail(error) from error
        sizes[cell.row.name] = built[what]
    return sizes


# ------------------------------------------------------------------------------------------------------------
# Cost


def estimate(cells: Sequence[Cell], sizes: dict[str, Size], images_per_second: float | None) -> list[Estimate]:
    """What each row's run would take.

    A rate that was measured in a finished run of the row is taken; else that of another row, or the one that is
    given for the first row, in proportion to the forward pass's work. Neither evaluation nor terms are counted;
    the latter look at what the model computes anyway.

    Args:
        images_per_second: of one GPU with the first row.
    """
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.row.name, cell)
    known = {name: rate for name in first if (rate := _measured([c for c in cells if c.row.name == name]))}
    if not known and images_per_second and first:
        known = {next(iter(first)): images_per_second}
        basis = "--images-per-second"
    else:
        basis = "a finished run"
    left = Counter(cell.row.name for cell in cells if not cell.finished)
    return [_estimate(cell, left[name], sizes, known, basis) for name, cell in first.items()]


def _estimate(cell: Cell, left: int, sizes: dict[str, Size], known: dict[str, float], basis: str) -> Estimate:
    size = sizes[cell.row.name]
    if not known:
        return Estimate(cell.row, left, size, None, "")
    if cell.row.name in known:
        rate, said = known[cell.row.name], basis
    else:
        other = next(iter(known))
        rate = known[other] * sizes[other].flops / size.flops
        said = f"{basis} of {other}, by the forward pass's work"
    return Estimate(cell.row, left, size, cell.args.epochs * size.images / rate / 3600, said)


def _measured(cells: Sequence[Cell]) -> float | None:
    """Images a second of one process, as a finished run printed it."""
    for cell in cells:
        cost: Any = read_object(cell.path / COST)
        if cost and cost.get("images_per_second"):
            return float(cost["images_per_second"]) / int(cost["processes"])
    return None


def describe(estimates: Sequence[Estimate]) -> str:
    """The estimates, a line for each row, and their sum."""
    lines = [f"{'row':32} {'left':>4} {'parameters':>11} {'GFLOPs':>7} {'GPU hours':>10} {'disk':>8}  rate from"]
    total, disk = 0.0, 0.0
    for each in estimates:
        hours = "unknown" if each.hours is None else f"{each.hours * each.runs:,.1f}"
        total += (each.hours or 0) * each.runs
        disk += each.size.disk * each.runs
        lines.append(
            f"{each.row.name:32} {each.runs:4} {each.size.parameters / 1e6:9.2f} M "
            f"{each.size.flops / 1e9:7.2f} {hours:>10} {each.size.disk * each.runs / 1e9:5.2f} GB  "
            f"{each.basis}".rstrip()
        )
    unknown = sum(each.hours is None for each in estimates)
    hours = "" if unknown == len(estimates) else f"{total:,.1f} GPU hours of training alone, "
    lines.append(f"an estimate: {hours}{disk / 1e9:.2f} GB of checkpoints at most")
    if unknown:
        lines.append(
            f"{unknown} rows of unknown rate: give --images-per-second of one GPU with the first row "
            "(benchmarks/step.py measures it)"
        )
    return "\n".join(lines)
