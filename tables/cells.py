"""A cell: one run of main.py, its folder, and the numbers that it left there."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError, reason
from loggers.text import LOG
from options import config
from options.config import Resolved
from options.flags import Args
from options.parser import dashed, declared
from state.resumption import differences
from tables.spec import LARGEST, OF_COST, OF_REPORT, Column, Row, Table
from utils import write_atomically

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, COST, ARGS, REPORT, BAD_END = "output.txt", "cost.json", "args.yaml", "report.json", "failed.txt"
PROGRESS = re.compile(r"^Epoch (\d+)/\d+ .*?\[(\d+)/(\d+)\].*? ([\d.]+) it/s", re.MULTILINE)
# Flags of the data that `python -m redundancy` takes as main.py does.
OF_DATA = (
    *("data_set", "data_path", "image_key", "target_key", "val_labels", "inat_category", "batch_size"),
    *("num_workers", "fast_resize", "device"),
)


@dataclass(frozen=True)
class Cell:
    """One row with one seed.

    Attributes:
        folder: of the run, relative to the project where it lies inside.
        given: main.py's flags for all cells, from the runner's own command line.
    """

    table: Table
    row: Row
    seed: int
    folder: Path
    given: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def flags(self) -> list[str]:
        """main.py's command line."""
        own = ["--seed", str(self.seed), "--output_dir", str(self.folder), "--resume", "auto"]
        return ["--config", self.row.config, *self.table.flags, *self.row.flags, *self.given, *own]

    @property
    def path(self) -> Path:
        """The folder, wherever this program was started."""
        return ROOT / self.folder

    @cached_property
    def args(self) -> Resolved:
        """The flags, resolved.

        Raises:
            UserError: they cannot be; with the row's line.
        """
        try:
            file = str(ROOT / self.row.config)
            return config.resolve(["--config", file, *self.flags[2:]])
        except UserError as error:
            raise self.fail(error) from error

    def fail(self, error: Exception) -> UserError:
        """An error of this row, with the line where it stands."""
        return UserError(f"{self.table.path}, line {self.row.line}: row {self.row.name}: {error}")

    @property
    def epochs(self) -> int:
        """How many are done."""
        return len(read_log(self.path))

    @property
    def has_ended(self) -> bool:
        """Whether main.py has ended well here, and what it cost is written down."""
        return (self.path / COST).is_file()

    @property
    def finished(self) -> bool:
        """Whether it has ended, and with all epochs that the table asks for."""
        return self.has_ended and self.epochs == self.args.epochs

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
        there = config.resolve(["--config", str(self.path / ARGS)])
        # what is not given is filled in by the run: class names, and how images are prepared
        open_flags = [name for name in declared(Args) if getattr(self.args, name) in (None, [])]
        saved = {
            name: value for name, value in config.plain(there).items() if name not in open_flags or name in LISTS
        }
        for change in differences(saved, self.args):
            flag = f"--{dashed(change.name)}"
            raise UserError(
                f"{self.folder} holds a run with {flag} {change.was}, and {self.table.path} says {change.now}: "
                "move it away, or give another --output"
            )

    def commands(self, processes: int) -> list[str]:
        """What trains this cell, in words that one could type in the project's folder."""
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
        return [*launcher, "main.py", *self.flags]

    def report_command(self, output: Path) -> list[str]:
        """What measures its redundancy."""
        report = read_report(self.path)
        others = (
            report.known if report is not None and report.images == self.table.images else ()
        )  # of other tables
        told = [f"{self.row.name}={self.folder / 'checkpoint.pth'}", "--output", str(output)]
        told += ["--images", str(self.table.images), "--metrics", *dict.fromkeys([*others, *self.table.metrics])]
        told += ["--weights", "raw"]  # whose accuracy test_acc1 is
        defaults = Args()
        for name in OF_DATA:
            value = getattr(self.args, name)
            if value is not None and value != getattr(defaults, name) and name != "batch_size":
                told += [f"--{dashed(name)}"] if value is True else [f"--{dashed(name)}", str(value)]
        return ["python", "-m", "redundancy", *told]


LISTS = ("reg", "measure", "remedy", "model_kwargs", "opt_kwargs")  # of which none given means none


def interpreter(command: Sequence[str]) -> list[str]:
    """A command as this Python runs it, whatever is on PATH."""
    if command[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    return [sys.executable, *command[1:]]


def cells_of(table: Table, rows: Sequence[Row], output: Path, given: Sequence[str] = ()) -> list[Cell]:
    """The cells of some rows, seed by seed, so that an early end leaves whole comparisons."""
    folder = output / table.runs
    most = max((row.seeds for row in rows), default=0)
    return [
        Cell(table, row, seed, folder / row.name / f"seed-{seed}", tuple(given))
        for seed in range(most)
        for row in rows
        if seed < row.seeds
    ]


# ------------------------------------------------------------------------------------------------------------
# What a run left


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run's log.txt; none if there is no such file.

    Raises:
        UserError: it is no log.
    """
    path = folder / LOG
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no log of main.py: {reason(error)}") from error
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} is no log of main.py: a line is no JSON object")
    return lines


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; remove it, and run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: remove it, and run again")
    return content


@dataclass(frozen=True)
class Measured:
    """A run's redundancy report.

    Attributes:
        findings: by the metrics' names.
        known: the metrics that were measured, or of which the report says why they have no number.
        images: how many were drawn, as its command says.
    """

    findings: Mapping[str, Any]
    known: tuple[str, ...]
    images: int


def read_report(folder: Path) -> Measured | None:
    """What `python -m redundancy` has left for a run; None if nothing.

    Raises:
        UserError: it is damaged.
    """
    path = folder / REPORT
    content = read_object(path)
    if content is None:
        return None
    try:
        model = content["models"][0]
        words = str(content["about"]["command"]).split()
        images = int(words[words.index("--images") + 1])
        return Measured(model["findings"], (*model["findings"], *model["gaps"]), images)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no redundancy report of a table: remove it, and run again") from error


def read_value(column: Column, folder: Path) -> float | None:
    """The number of a finished run in a column; None if it has none, or none that is finite."""
    if column.value in OF_COST:
        value = (read_object(folder / COST) or {}).get(column.value)
    elif column.value.startswith(OF_REPORT):
        value = _of_report(read_report(folder), column.value.removeprefix(OF_REPORT))
    else:
        log = read_log(folder)
        value = log[-1].get(column.value) if log else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return value / column.divide


def _of_report(report: Measured | None, place: str) -> float | None:
    """METRIC@LAYER of a report: 'mean' over the blocks, 'first', 'last', or a layer's name."""
    metric, _, layer = place.partition("@")
    finding = report.findings.get(metric) if report is not None else None
    if finding is None:
        return None
    labels = finding["axes"][0]["labels"] if finding["axes"] else []
    if not layer or not labels:
        return _mean(finding["mean"])
    blocks = [k for k, label in enumerate(labels) if label.isdigit()]
    chosen = {"mean": blocks, "first": blocks[:1], "last": blocks[-1:]}.get(
        layer, [k for k, label in enumerate(labels) if label == layer]
    )
    return _mean([finding["mean"][k] for k in chosen])


def _mean(values: Any) -> float | None:
    """Of all numbers in lists of lists; None if one is a gap, or there are none."""
    flat = [*_flat(values)]
    return statistics.fmean(flat) if flat and None not in flat else None


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list):
        for each in values:
            yield from _flat(each)
    else:
        yield values


def origin(folder: Path) -> dict[str, str]:
    """Where a run's numbers come from: revision and versions, as its args.yaml says them, and the machine."""
    path = folder / ARGS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    said = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    return {**said, **{name: str(value) for name, value in (read_object(folder / COST) or {}).items()}}


# ------------------------------------------------------------------------------------------------------------
# What it cost


def write_cost(cell: Cell, processes: int, machine: Mapping[str, str]) -> None:
    """Say what a run cost, from the progress that it printed; with this the cell is finished."""
    pictures = cell.args.batch_size * cell.args.grad_accum_steps * processes  # of a step
    rates: dict[int, tuple[int, float]] = {}  # of each epoch: its steps, and how many a second
    for text in printed(cell.path):
        for epoch, step, steps, rate in PROGRESS.findall(text):
            if step == steps and float(rate) > 0:
                rates[int(epoch)] = int(steps), float(rate)
    cost: dict[str, Any] = {name: None for name in OF_COST}
    if rates:
        seconds = [steps / rate for steps, rate in rates.values()]
        cost["images_per_second"] = pictures * statistics.median(rate for _, rate in rates.values())
        cost["hours"] = statistics.fmean(seconds) * cell.args.epochs / 3600
    content = json.dumps({**cost, "processes": processes, **machine}, indent=1) + "\n"
    write_atomically(cell.path / COST, lambda file: file.write(content.encode()))


def printed(folder: Path) -> Iterator[str]:
    """What a run has printed, here or in a job."""
    for path in (folder / OUTPUT, *sorted(folder.glob("submitit/*/*_0_log.out"))):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
