"""The command line of script/reproduce_table.py. Nothing is imported here that takes time, before it is needed."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError, shown
from options.parser import Formatter, Parser, underscored
from options.paths import check_path, expand
from tables import HELP, OWN_FLAGS

if TYPE_CHECKING:
    from tables.spec import Given, Table

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "configs" / "tables"
SOURCES = "sources.yaml"
SET = re.compile(r"[A-Z][A-Z0-9]+|tar|(wds|hfds|torch)/.+")  # a value of --data-set
MOST = 1000  # seeds, runs at a time, processes
LONGEST = 4000  # characters of a message
PROGRAM = "reproduce_table.py"


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        tables: as they are read.
        output: the folder of runs and pages; that of the records with `render`.
        keep: where records are copied to, or None.
        seeds: of every row, if they are given.
        render: write pages from records, and run nothing.
        given: to the cells.
    """

    tables: list[Table]
    output: Path
    keep: Path | None
    seeds: int | None
    render: bool
    only: list[str]
    processes: int
    jobs: int
    dry_run: bool
    slurm: str | None
    images_per_second: float | None
    given: Given


def get_args_parser() -> Parser:
    """The parser, without a program's flags."""
    parser = Parser(
        prog=PROGRAM,
        usage="reproduce_table.py TABLE.yaml [...] [FLAGS] [-- FLAGS of the table's program for every run]",
        description="Train a table's runs, side by side and after any interruption, and write what came out.",
        epilog="docs/tables.md says what stands in a table's file",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE.yaml", help="of configs/tables, or one's own")
    parser.add_argument(
        *("--data-path", "--data_path"),
        action="append",
        default=[],
        metavar="DATA",
        help="folder of the data, for every run; of several data sets (repeatable) ADE20K=DATA, for runs with "
        "--data-set ADE20K",
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes of each run, one for each GPU")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="runs side by side on this machine")
    parser.add_argument(
        "--seeds", type=int, default=None, metavar="N", help="of every row; by default what the table says"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="run these rows alone, and their baselines"
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print the commands, and estimate time and disk; run nothing",
    )
    parser.add_argument(
        *("--images-per-second", "--images_per_second"),
        type=float,
        default=None,
        metavar="X",
        help="with --dry-run: of one GPU with the first row, where no run of the table has measured it",
    )
    parser.add_argument(
        "--slurm",
        default=None,
        metavar="FLAGS",
        help="submit every run as a job, by script/run_with_submitit.py with these flags, in one word: "
        '--slurm "--partition gpu --timeout 2880"; the same command later writes what is finished',
    )
    parser.add_argument(
        "--output", default="experiment/tables", metavar="FOLDER", help="of the runs and of the pages"
    )
    parser.add_argument(
        "--keep",
        default="",
        metavar="FOLDER",
        help="copy what each finished run left, without weights, and the pages",
    )
    parser.add_argument(
        "--render",
        default="",
        metavar="FOLDER",
        help="run nothing: write the pages from the records that --keep has left there; without TABLE of all "
        "tables that have some",
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[Namespace, tuple[str, ...]]:
    """The command line's own flags, and those of a program behind --.

    Raises:
        UserError: a flag is unknown, or its value cannot be.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    said, given = get_args_parser().parse_args(words[:end]), tuple(words[end + 1 :])
    for word in given:
        if word in HELP:
            raise UserError(f"{word} behind -- asks a program for help: call it alone")
        if word.startswith("--") and underscored(word[2:].partition("=")[0]) in OWN_FLAGS:
            raise UserError(
                f"{word} behind --: every run gets it from its row, its seed and this command's own flags"
            )
    for name, value, least in (("nproc", said.nproc, 1), ("jobs", said.jobs, 1), ("seeds", said.seeds, 1)):
        if value is not None and not least <= value <= MOST:
            raise UserError(f"--{name} must be between {least} and {MOST}, not {value}")
    if said.images_per_second is not None and not 0 < said.images_per_second < math.inf:
        raise UserError(f"--images-per-second must be above 0, and finite, not {said.images_per_second:g}")
    if not said.output:
        raise UserError("--output must name a folder")
    try:
        shlex.split(said.slurm or "")
    except ValueError as error:
        raise UserError(f"--slurm cannot be read ({error}): {shown(said.slurm)}") from error
    if said.slurm is not None and said.jobs != 1:
        raise UserError("--jobs is for runs on this machine; SLURM decides how many of its jobs run: drop one")
    if said.images_per_second is not None and not said.dry_run:
        raise UserError("--images-per-second is for --dry-run: drop it")
    ran = {"--keep": said.keep, "--only": said.only, "--dry-run": said.dry_run, "--slurm": said.slurm is not None}
    for flag in (flag for flag, value in ran.items() if said.render and value):
        raise UserError(f"{flag} is for runs, and --render runs nothing: drop one")
    return said, given


def read_options(argv: Sequence[str]) -> Options:
    """Read the command line, and the tables.

    Raises:
        UserError: something in them cannot be.
    """
    from tables.reading import read_table  # torch takes time
    from tables.spec import Given

    said, given = parse(argv)
    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"tables need {' and '.join(missing)}: pip install -r requirements-quickstart.txt")
    render = bool(said.render)
    if render and not Path(expand(said.render, "--render")).is_dir():
        raise UserError(f"--render {said.render} is no folder")
    paths = said.tables or (_recorded(said.render) if render else ())
    tables = [read_table(_found(path), said.seeds) for path in paths]
    if not tables:
        raise UserError("which table? e.g. python script/reproduce_table.py configs/tables/digits.yaml --jobs 2")
    return Options(
        tables=tables,
        output=_inside(said.render or said.output, "--render" if render else "--output"),
        keep=_inside(said.keep, "--keep") if said.keep else None,
        seeds=said.seeds,
        render=render,
        only=said.only,
        processes=said.nproc,
        jobs=said.jobs,
        dry_run=said.dry_run,
        slurm=said.slurm,
        images_per_second=said.images_per_second,
        given=Given(given, _folders(said.data_path)),
    )


def _folders(texts: Sequence[str]) -> dict[str, str]:
    """The folders of data by their sets; that of '' is for all others.

    Raises:
        UserError: a set is given twice, or without a folder.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (equals and SET.fullmatch(name)):
            name, path = "", text
        if name in found:
            raise UserError(f"--data-path is given twice{f' for {name}' if name else ''}: keep one, or SET=DATA")
        if not path:
            raise UserError("--data-path must name a folder")
        path = expand(path, "--data-path")
        check_path("--data-path", path)
        found[name] = str(_absolute(path))
    return found


def answer_at_once(argv: Sequence[str] | None = None) -> None:
    """Answer --help and what is mistyped, before anything is imported that takes time.

    Raises:
        SystemExit: it is answered.
    """
    try:
        parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(shown(f"{PROGRAM}: error: {error}", LONGEST), file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _found(path: str) -> str:
    """A table's file: from here, or from the project's folder."""
    path = expand(path, "TABLE")
    check_path("TABLE", path)
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def _recorded(folder: str) -> list[str]:
    """The tables of configs/tables of which a folder of records has runs."""
    from tables.reading import read_table

    found = []
    for path in sorted(TABLES.glob("*.yaml")):
        table = read_table(path) if path.name != SOURCES else None
        if table and any((Path(folder) / table.runs / row.name).is_dir() for row in table.rows):
            found.append(str(path))
    return found


def _absolute(path: str) -> Path:
    return Path(path).absolute()


def _inside(path: str, flag: str) -> Path:
    """A folder, relative to the project where it lies inside: no record says where somebody keeps the project."""
    path = expand(path, flag)
    check_path(flag, path)
    absolute = _absolute(path)
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute
