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
from tables.backbones import check_backbones
from tables.cells import Cell, cells_of
from tables.evidence import ROOT, origin
from tables.numbers import read_lines
from tables.options import LONGEST, PROGRAM, Options, read_options
from tables.runner import Runner
from tables.slots import make_slots
from tables.spec import Table
from tables.trials import Size


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
            render(table, options)
        return 0
    for table in options.tables if not options.dry_run else ():
        if is_locked(ROOT / options.output / table.runs):
            raise taken(options.output / table.runs, "--output")
    check_folders(options)
    check_sets(options)
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


def check_folders(options: Options) -> None:
    """Refuse folders that cannot be written to, or that are one another.

    Raises:
        UserError: with the flag.
    """
    record.check_folder(options.output, "--output")
    if options.keep is None:
        return
    record.check_folder(options.keep, "--keep")
    keep, output = ((ROOT / folder).resolve() for folder in (options.keep, options.output))
    if keep == output or keep.is_relative_to(output) or output.is_relative_to(keep):
        raise UserError(f"--keep {options.keep} and --output {options.output} must lie beside each other")


def check_sets(options: Options) -> None:
    """Refuse --data-path SET=DATA of a set that no row has.

    Raises:
        UserError: with the sets of the rows.
    """
    rows = [(table, [row for row in table.rows if row.config]) for table in options.tables]
    cells = [cell for table, some in rows for cell in cells_of(table, some, options.output, options.given)]
    known = sorted({cell.args.data_set for cell in cells})
    for name in options.given.data:
        if name and name not in known:
            raise UserError(f"--data-path {name}=...: no row is of that set, but of {', '.join(known)}; correct it")


def cells_with_runs(table: Table, options: Options) -> list[Cell]:
    """The cells of all rows that are run, each held against what is in its folder."""
    every = cells_of(table, [row for row in table.rows if row.config], options.output, options.given)
    for cell in every:
        cell.check()
    return every


def check(table: Table, options: Options) -> tuple[list[Cell], dict[str, Size]]:
    """The cells that are to run, and the sizes of their models, after all of them were tried."""
    cells_with_runs(table, options)
    cells = cells_of(table, table.only(options.only), options.output, options.given)
    print(f"checking {table.path}: {len({cell.row.name for cell in cells})} rows, {len(cells)} cells", flush=True)
    if not options.dry_run:
        check_backbones(cells, options.output)
    return cells, plan.check(cells, with_data=not options.dry_run, processes=options.processes)


def dry_run(table: Table, cells: Sequence[Cell], sizes: dict[str, Size], options: Options) -> None:
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
    if not cell.has_backbone:
        return f"to run, when its backbone {cell.row.backbone} is finished"
    return f"{cell.epochs} of {cell.args.epochs} epochs done" if cell.epochs else "to run"


def run(table: Table, cells: Sequence[Cell], options: Options) -> int:
    """Run or submit the cells, and write the pages; returns the exit code."""
    every = cells_with_runs(table, options)

    def after_cell(cell: Cell) -> None:
        if options.keep is not None:
            record.keep(cell, options.keep)
        record.write_pages(
            table, every, options.output, typed(table, every, options.seeds, options.given.flags), with_figure=False
        )

    failed: dict[str, str] = {}
    if options.slurm is not None:
        failed = slurm.submit(cells, options.processes, options.slurm)
        cells = [cell for cell in cells if cell.finished]  # what is left is to measure their redundancy
    waiting = [cell for cell in cells if not cell.is_done]
    slots = make_slots(options.jobs, options.processes, waiting[0].args.device) if waiting else []
    runner = Runner(cells, options.processes, slots, after_cell, failed)
    runner.run()
    command = typed(table, every, options.seeds, options.given.flags)
    written = []
    if options.keep is not None:
        for cell in every:
            if cell.finished or cell.why_failed:
                record.keep(cell, options.keep)
        recorded = record.recorded(table, options.keep)
        written += record.write_pages(table, recorded, options.keep, command)
    written = record.write_pages(table, every, options.output, command) + written
    tell(table, every, runner, command, written)
    if runner.stopped:
        return INTERRUPTED if runner.stopped == signal.SIGINT else STOPPED
    return FAILED if runner.failed or runner.trouble else 0


def tell(table: Table, cells: Sequence[Cell], runner: Runner, command: str, written: Sequence[Path]) -> None:
    """Print the table, what failed, and where the files are."""
    print(f"\n{record.pages(table, cells, command)['md']}")
    for name in empty_columns(table, cells):
        print(
            f"note: no run has a number in the column {name}: see the keys of log.txt, or the layers of the report"
        )
    for name, why in runner.failed.items():
        print(f"FAILED {name}: {why}")
    if runner.failed or runner.stopped:
        print("the same command goes on where this one ended")
    print("written: " + ", ".join(map(str, written)), flush=True)


def empty_columns(table: Table, cells: Sequence[Cell]) -> list[str]:
    """The columns in which no finished run has a number."""
    lines = [line for line in read_lines(table, cells) if line.runs]
    return [
        column.name for column in table.measured if lines and not any(line.values[column.name] for line in lines)
    ]


def render(table: Table, options: Options) -> None:
    """Write the pages of a table from its records."""
    cells = cells_with_runs(table, options)
    command = typed(table, cells, options.seeds, options.given.flags)
    written = record.write_pages(table, cells, options.output, command)
    ended = sum(cell.finished for cell in cells)
    print(f"{table.name}: {ended} runs; written: {', '.join(map(str, written))}", flush=True)


def typed(table: Table, cells: Sequence[Cell], seeds: int | None = None, given: Sequence[str] = ()) -> str:
    """The command that makes a table, as one types it in the project's folder.

    Args:
        seeds, given: as they were given, see `Options`.
    """
    path = Path(table.path).absolute()
    words = [str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name]
    sets = dict.fromkeys(cell.args.data_set for cell in cells if cell.args.data_set != "DIGITS")
    for name in sets:
        words += ["--data-path", f"{name}=DATA" if len(sets) > 1 else "DATA"]
    processes = {origin(cell.path).get("processes", "1") for cell in cells if cell.finished}
    if len(processes) == 1 and processes != {"1"}:
        words += ["--nproc", *processes]
    if seeds is not None:
        words += ["--seeds", str(seeds)]
    return record.described([*words, *(["--", *given] if given else [])])
