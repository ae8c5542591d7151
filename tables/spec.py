"""What stands in a table: rows of runs, columns of numbers, and what others published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from errors import UserError, did_you_mean, shown

MAIN = "main"  # the program of a row that names none
OF_REPORT = "report:"
OF_COST = ("images_per_second", "hours")
LARGEST = 1e15  # of a number of a table


@dataclass(frozen=True)
class Column:
    """One number of each run.

    Attributes:
        name: in `published`, and in the CSV file.
        label: its heading.
        value: a key of log.txt, whose last epoch counts; report:METRIC@LAYER; one of `OF_COST`; or '' where only
            others have measured it.
        digits: behind the point.
        difference: whether the difference to the baseline stands beside it.
        divide: what the value is divided by.
    """

    name: str
    label: str
    value: str
    digits: int = 2
    difference: bool = False
    divide: float = 1


NO_SPREAD = ("n_parameters",)  # the same with every seed
KNOWN = {
    column.name: column
    for column in (
        Column("top1", "top-1 (%)", "test_acc1", difference=True),
        Column("top5", "top-5 (%)", "test_acc5"),
        Column("best_top1", "best top-1 (%)", "max_acc"),
        Column("ema_top1", "top-1 of the EMA (%)", "ema_test_acc1"),
        Column("ema_top5", "top-5 of the EMA (%)", "ema_test_acc5"),
        Column("joint_top1", "top-1 of both heads (%)", "test_joint_acc1"),
        Column("miou", "mIoU (%)", "test_miou", difference=True),
        Column("best_miou", "best mIoU (%)", "max_miou"),
        Column("ema_miou", "mIoU of the EMA (%)", "ema_test_miou"),
        Column("macc", "mean accuracy (%)", "test_macc"),
        Column("pixel_acc", "pixels right (%)", "test_pixel_acc"),
        Column("parameters", "parameters (M)", "n_parameters", divide=1e6),
        Column("images_per_second", "images/s", "images_per_second", digits=0),
        Column("hours", "hours", "hours"),
    )
}


@dataclass(frozen=True)
class Given:
    """What the runner's own command line gives to the cells.

    Attributes:
        flags: of the table's program, for its rows.
        data: the folders of data by --data-set; that of '' is for all other sets.
    """

    flags: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)

    def folder(self, data_set: str) -> str:
        """Of a data set; '' if none is given."""
        return self.data.get(data_set, self.data.get("", ""))


@dataclass(frozen=True)
class Source:
    """Where a published number is printed.

    Attributes:
        second_hand: whether that is not the paper whose model it is of.
        note: what one should know beside the number.
    """

    text: str
    link: str = ""
    second_hand: bool = False
    note: str = ""


@dataclass(frozen=True)
class Published:
    """Numbers of others for a row, by the columns' names."""

    numbers: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Row:
    """One way to train, once for each seed.

    Attributes:
        name: of its folder. A row of the same name in another table of the same `runs` is the same runs.
        config: the program's, or '' where only others have run it.
        flags: the program's, which win over the table's.
        line: where it stands in the file.
        program: what its runs are runs of, see `tables.programs`.
        backbone: the row of main.py in the same `runs` on whose weights it starts, seed by seed, or ''.
    """

    name: str
    label: str
    config: str
    flags: tuple[str, ...]
    seeds: int
    baseline: str
    group: str
    published: tuple[Published, ...]
    line: int
    program: str = MAIN
    backbone: str = ""


@dataclass(frozen=True)
class Table:
    """A table's file.

    Attributes:
        name: the file's, without folder and suffix.
        runs: the folder of its cells.
        flags: of every row of the table's program.
        metrics, images: of the redundancy report on each cell; no metrics: none is made.
        drawn: the rows whose report is drawn layer by layer.
        program: of all rows that name no other.
    """

    path: str
    name: str
    title: str
    caption: str
    runs: str
    flags: tuple[str, ...]
    metrics: tuple[str, ...]
    images: int
    drawn: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    sources: Mapping[str, Source] = field(default_factory=dict)
    program: str = MAIN

    @property
    def measured(self) -> tuple[Column, ...]:
        """The columns of which runs have a number; the others hold published ones alone."""
        return tuple(column for column in self.columns if column.value)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def only(self, names: Iterable[str]) -> tuple[Row, ...]:
        """The rows that are to run: all without names, else those, their baselines, and the backbones of all these.

        Raises:
            UserError: there is no row of that name.
        """
        known = {row.name: row for row in self.rows}
        chosen: set[str] = set()
        for name in names:
            if name not in known:
                raise UserError(f"{self.path} has no row {shown(name)}.{did_you_mean(name, known)}")
            if not known[name].config:
                raise UserError(f"{self.path}: row {name} has published numbers alone: nothing to run")
            chosen |= {name, known[name].baseline}
        chosen |= {row.backbone for row in self.rows if row.name in chosen}
        return tuple(row for row in self.rows if row.config and (not chosen or row.name in chosen))
