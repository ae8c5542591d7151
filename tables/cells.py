"""A cell: one run of a program, with its flags and its folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError
from options import config
from options.config import Resolved
from options.flags import Args
from options.parser import dashed
from segmentation.settings import Settings
from state.resumption import differences
from tables.evidence import ARGS, BAD_END, COST, ROOT, read_log, read_report, write_cost
from tables.programs import MAIN, PROGRAMS, Program
from tables.spec import Given, Row, Table

WEIGHTS = "checkpoint.pth"  # the last epoch's
# Flags of the data that `python -m redundancy` takes as main.py does, and of how it is read.
OF_DATA = ("data_set", "data_path", "image_key", "target_key", "val_labels", "inat_category", "fast_resize")
OF_READING = ("num_workers", "device")


@dataclass(frozen=True)
class Cell:
    """One row with one seed.

    Attributes:
        folder: of the run, relative to the project where it lies inside.
        given: by the runner's own command line, to all cells.
    """

    table: Table
    row: Row
    seed: int
    folder: Path
    given: Given = Given()  # noqa: RUF009 - it is frozen

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def program(self) -> Program:
        return PROGRAMS[self.row.program]

    @property
    def path(self) -> Path:
        """The folder, wherever this program was started."""
        return ROOT / self.folder

    # --------------------------------------------------------------------------------------------------------
    # Flags

    def _flags(self, *found: str) -> list[str]:
        """The program's command line. The table's flags, and those given, are for the table's own program.

        Args:
            found: what depends on the others.
        """
        is_own = self.row.program == self.table.program
        said = [*(self.table.flags if is_own else ()), *self.row.flags]
        own = ["--seed", str(self.seed), "--output_dir", str(self.folder), "--resume", "auto"]
        return ["--config", self.row.config, *said, *found, *(self.given.flags if is_own else ()), *own]

    @property
    def flags(self) -> list[str]:
        """The program's command line."""
        data = self.given.folder(self.args.data_set)
        found = ["--data-path", data] if data else []
        if self.row.backbone:
            found += ["--backbone", str(self.backbone / WEIGHTS)]
        return self._flags(*found)

    @cached_property
    def args(self) -> Resolved:
        """The flags, resolved.

        Raises:
            UserError: they cannot be; with the row's line.
        """
        try:
            args = self.program.resolve(["--config", str(ROOT / self.row.config), *self._flags()[2:]])
            data = self.given.folder(args.data_set)
            args = replace(args, data_path=data) if data else args
            return self._on_backbone(args) if isinstance(args, Settings) and self.row.backbone else args
        except UserError as error:
            raise self.fail(error) from error

    def _on_backbone(self, args: Settings) -> Settings:
        if args.backbone or args.pretrained:
            flag = "--pretrained" if args.pretrained else f"--backbone {args.backbone}"
            raise UserError(f"{flag} and backbone: {self.row.backbone} both say what it starts from: drop one")
        return replace(args, backbone=str(self.backbone / WEIGHTS))

    def fail(self, error: Exception) -> UserError:
        """An error of this row, with the line where it stands."""
        return UserError(f"{self.table.path}, line {self.row.line}: row {self.row.name}: {error}")

    @property
    def images_of_a_step(self) -> int:
        """Of one process."""
        return self.args.batch_size * self.args.grad_accum_steps

    # --------------------------------------------------------------------------------------------------------
    # Where it stands

    @property
    def backbone(self) -> Path:
        """The folder of the run on whose weights it starts, if its row names one; relative as `folder` is."""
        return self.folder.parents[1] / self.row.backbone / f"seed-{self.seed}"

    @property
    def has_backbone(self) -> bool:
        """Whether that run has ended well, or none is named."""
        return not self.row.backbone or all((ROOT / self.backbone / name).is_file() for name in (COST, WEIGHTS))

    @property
    def epochs(self) -> int:
        """How many are done; an epoch of segmentation lies between two evaluations."""
        return len(read_log(self.path))

    @property
    def has_ended(self) -> bool:
        """Whether its program has ended well here, and what it cost is written down."""
        return (self.path / COST).is_file()

    @property
    def finished(self) -> bool:
        """Whether it has ended, and with all epochs that the table asks for."""
        return self.has_ended and self.epochs == self.args.epochs

    @property
    def is_done(self) -> bool:
        """Whether it is finished, and measured."""
        return self.finished and self.reported

    @property
    def why_failed(self) -> str:
        """Why it ended badly when it was run last; else ''."""
        path = self.path / BAD_END
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""

    @property
    def reported(self) -> bool:
        """Whether there is nothing left to measure."""
        if not self.table.metrics:
            return True
        report = read_report(self.path)
        return report is not None and report.images == self.table.images and not self.missing

    @property
    def missing(self) -> list[str]:
        """The metrics of the table that the report lacks."""
        report = read_report(self.path)
        return [name for name in self.table.metrics if report is None or name not in report.known]

    def check(self) -> None:
        """Refuse a folder that holds another run than this cell's.

        Raises:
            UserError: with the first flag that differs.
        """
        if not (self.path / ARGS).is_file():
            return
        advice = "move it away, or give another --output"
        try:
            there = config.plain(self.program.resolve(["--config", str(self.path / ARGS)]))
        except UserError as error:
            raise UserError(f"{self.folder} holds no run of {self.program.called} ({error}): {advice}") from error
        now = self.args
        if isinstance(now, Settings) and self.row.backbone:  # wherever the runs, or their records, lie
            now = replace(now, backbone=_tail(now.backbone))
            there |= {"backbone": _tail(there["backbone"])}
        defaults = type(now)()
        is_open = [name for name in self.program.filled if getattr(now, name) == getattr(defaults, name)]
        for change in differences({name: there[name] for name in there if name not in is_open}, now):
            flag = f"--{dashed(change.name)}"
            raise UserError(
                f"{self.folder} holds a run with {flag} {change.was}, and {self.table.path} says {change.now}: "
                f"{advice}"
            )

    def close(self, processes: int, machine: Mapping[str, str]) -> None:
        """Write down what the run cost, now that it has ended well."""
        write_cost(self.path, self.images_of_a_step * processes, self.args.epochs, processes, machine)

    # --------------------------------------------------------------------------------------------------------
    # Commands

    def commands(self, processes: int) -> list[str]:
        """What trains this cell, in words that one could type in the project's folder."""
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
        return [*launcher, *self.program.words, *self.flags]

    def report_command(self, output: Path) -> list[str]:
        """What measures its redundancy."""
        report = read_report(self.path)
        others = (
            report.known if report is not None and report.images == self.table.images else ()
        )  # of other tables
        told = [f"{self.row.name}={self.folder / WEIGHTS}", "--output", str(output)]
        told += ["--images", str(self.table.images), "--metrics", *dict.fromkeys([*others, *self.table.metrics])]
        told += ["--weights", "raw"]  # whose accuracy test_acc1 is
        defaults = Args()
        values = {name: getattr(self.args, name) for name in OF_READING}
        for name, value in (self._data_to_measure() | values).items():
            if value is not None and value != getattr(defaults, name):
                told += [f"--{dashed(name)}"] if value is True else [f"--{dashed(name)}", str(value)]
        return ["python", "-m", "redundancy", *told]

    def _data_to_measure(self) -> dict[str, Any]:
        """The flags of the data: its own; of segmentation those that its backbone was trained on, whole images."""
        source = self.args
        if self.row.backbone:
            source = MAIN.resolve(["--config", str(ROOT / self.backbone / ARGS)])
        data = self.given.folder(source.data_set) or source.data_path
        return {name: getattr(source, name) for name in OF_DATA} | {"data_path": data}


def _tail(path: str) -> str:
    """A backbone's place in the folder of all tables: RUNS/ROW/seed-SEED/checkpoint.pth."""
    return "/".join(Path(path).parts[-4:])


def interpreter(command: Sequence[str]) -> list[str]:
    """A command as this Python runs it, whatever is on PATH."""
    if command[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    return [sys.executable, *command[1:]]


def cells_of(table: Table, rows: Sequence[Row], output: Path, given: Given = Given()) -> list[Cell]:  # noqa: B008
    """The cells of some rows, seed by seed, so that an early end leaves whole comparisons."""
    folder = output / table.runs
    most = max((row.seeds for row in rows), default=0)
    return [
        Cell(table, row, seed, folder / row.name / f"seed-{seed}", given)
        for seed in range(most)
        for row in rows
        if seed < row.seeds
    ]
