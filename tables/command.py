"""script/reproduce_table.py: for each table check, run or submit, and write the pages."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, shown
from program import FAILED, INTERRUPTED, STOPPED
from state.lock import Lock, is_locked, taken
from tables import plan, record, slurm
from tables.cells import ROOT, Cell, cells_of
from tables.options import LONGEST, PROGRAM, Options, read_options
from tables.runner import Runner, make_slots
from tables.spec import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    try:
        return work(read_options(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(shown(f"{PROGRAM}: error: {error}", LONGEST), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


def work(options: Options) -> int:
    """All tables, one after the other; returns the exit code."""
    if options.render:
        for table in options.tables:
            render(table, options.output)
        return 0
    for table in options.tables if not options.dry_run else ():
        if is_locked(ROOT / options.output / table.runs):
            raise taken(options.output / table.runs, "--output")
    checked = [(table, *check(table, options)) for table in options.tables]
    worst = 0
    for table, cells, sizes in checked:
        if options.dry_run:
            dry_run(table, cells, sizes, options)
            continue
        with Lock(ROOT / options.output / table.runs, "--output"):
            code = run(table, cells, options)
        if code in (STOPPED, INTERRUPTED):
            return code
        worst = max(worst, code)
    return worst


def check(table: Table, options: Options) -> tuple[list[Cell], dict[str, plan.Size]]:
    """The cells that are to run, and the sizes of their models, after all of them were tried."""
    cells = cells_of(table, table.only(options.only), options.output, options.given)
    print(f"checking {table.path}: {len({cell.row.name for cell in cells})} rows, {len(cells)} cells", flush=True)
    return cells, plan.check(cells, with_data=not options.dry_run)


def dry_run(table: Table, cells: Sequence[Cell], sizes: dict[str, plan.Size], options: Options) -> None:
    """Print the commands, what is done of each, and what the rest may cost."""
    for cell in cells:
        print(f"\n# {cell.name}: {_where_it_stands(cell)}\n{_command(cell, options)}")
    print(f"\n{table.title}\n{plan.describe(plan.estimate(cells, sizes, options.images_per_second))}\n")


def _command(cell: Cell, options: Options) -> str:
    if options.slurm is None:
        return shlex.join(cell.commands(options.processes))
    return shlex.join(slurm.submission(cell, options.processes, shlex.split(options.slurm)))


def _where_it_stands(cell: Cell) -> str:
    if cell.finished:
        return "finished"
    if is_locked(cell.path):
        return "running"
    return f"{cell.epochs} of {cell.args.epochs} epochs done" if cell.epochs else "to run"


def run(table: Table, cells: Sequence[Cell], options: Options) -> int:
    """Run or submit the cells, and write the pages; returns the exit code."""
    every = cells_of(table, [row for row in table.rows if row.config], options.output, options.given)
    command = typed(table, every)

    def after_cell(cell: Cell) -> None:
        if options.keep is not None:
            record.keep(cell, options.keep)
        record.write_pages(table, every, options.output, command, with_figure=False)

    if options.slurm is not None:
        failed = slurm.submit(cells, options.processes, options.slurm)
        cells = [cell for cell in cells if cell.finished]  # what is left is to measure their redundancy
    else:
        failed = {}
    slots = make_slots(options.jobs, options.processes, cells[0].args.device if cells else "cpu")
    runner = Runner(cells, options.processes, slots, after_cell, failed)
    runner.run()
    for cell in every:
        if options.keep is not None and (cell.finished or cell.why_failed):
            record.keep(cell, options.keep)
    written = record.write_pages(table, every, options.output, command)
    if options.keep is not None:
        written += record.write_pages(table, record.recorded(table, options.keep), options.keep, command)
    tell(table, every, runner, command, written)
    if runner.stopped:
        return INTERRUPTED if runner.stopped == signal.SIGINT else STOPPED
    return FAILED if runner.failed else 0


def tell(table: Table, cells: Sequence[Cell], runner: Runner, command: str, written: Sequence[Path]) -> None:
    """Print the table, what failed, and where the files are."""
    print(f"\n{record.pages(table, cells, command)['md']}")
    for name, why in runner.failed.items():
        print(f"FAILED {name}: {why}")
    if runner.failed or runner.stopped:
        print("the same command goes on where this one ended")
    print("written: " + ", ".join(map(str, written)), flush=True)


def render(table: Table, folder: Path) -> None:
    """Write the pages of a table from its records."""
    cells = record.recorded(table, folder)
    written = record.write_pages(table, cells, folder, typed(table, cells))
    ended = sum(cell.has_ended for cell in cells)
    print(f"{table.name}: {ended} runs; written: {', '.join(map(str, written))}", flush=True)


def typed(table: Table, cells: Sequence[Cell]) -> str:
    """The command that makes a table, as one types it in the project's folder."""
    path = Path(table.path).absolute()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    needs_data = any(cell.args.data_set != "DIGITS" for cell in cells)
    return record.described([str(shown), *(["--data-path", "DATA"] if needs_data else [])])
