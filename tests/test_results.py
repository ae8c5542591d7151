"""results/: the pages are those of the records beside them, and the records are those of the tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from options.paths import PATHS
from tables import record
from tables.cells import Cell
from tables.command import typed
from tables.numbers import read_lines
from tables.reading import read_table
from tables.spec import Table
from tables.writing import lay_out

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
TABLES = [
    path
    for path in sorted((ROOT / "configs" / "tables").glob("*.yaml"))
    if path.name != "sources.yaml" and (RESULTS / f"{path.stem}.md").is_file()
]
MOST_BYTES = 20_000_000


@pytest.fixture(params=TABLES, ids=lambda path: path.stem)
def table(request: pytest.FixtureRequest) -> Table:
    return read_table(str(request.param.relative_to(ROOT)))


def recorded(table: Table) -> list[Cell]:
    return record.recorded(table, Path("results"))


def test_there_are_results() -> None:
    assert {"digits", "digits_measures", "digits_remedies"} <= {path.stem for path in TABLES}


def test_pages_are_current(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python script/reproduce_table.py --render results` would change nothing."""
    monkeypatch.chdir(ROOT)
    for suffix, text in record.pages(table, recorded(table), typed(table, recorded(table))).items():
        assert (RESULTS / f"{table.name}.{suffix}").read_text(encoding="utf-8") == text, suffix


def test_figures_are_current(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """They say of which numbers they are."""
    monkeypatch.chdir(ROOT)
    figures = [f"{table.name}.png", *([f"{table.name}.layers.png"] if table.drawn else [])]
    for name in figures:
        with Image.open(RESULTS / name) as image:
            assert image.info["Description"] == record.fingerprint(table, recorded(table)), name


def test_records_are_whole_runs_of_the_tables(table: Table) -> None:
    """Equal flags, all epochs; what did not end is not there."""
    cells = [cell for cell in recorded(table) if cell.path.exists()]
    assert cells
    for cell in cells:
        cell.check()
        assert cell.has_ended != bool(cell.why_failed), cell.name
        assert not cell.has_ended or (cell.finished and cell.reported), cell.name


def test_the_folder_is_small_and_holds_no_weights() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.suffix for path in files} <= {".txt", ".yaml", ".json", ".md", ".tex", ".csv", ".png"}


def test_no_record_says_where_somebody_works() -> None:
    """No path in a run's flags or command is an absolute one, and no page names this folder."""
    for path in RESULTS.rglob("args.yaml"):
        text = path.read_text(encoding="utf-8")
        flags = yaml.safe_load(text)
        command = next(line for line in text.splitlines() if line.startswith("# command: "))
        named = [*(str(flags.get(name) or "") for name in PATHS), *command.split()]
        assert not [word for word in named if Path(word).is_absolute()], path
    for path in RESULTS.glob("*.md"):
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path


SHOWN = (
    "top-1 (%)",
    "patch |cos|, last block",
    "effective rank of patches",
    "head |cos|, block 0",
    "|cos| in W_q, W_k, W_v",
)


def readme_lines() -> list[str]:
    """The README's table: some rows and columns of results/digits.md, with their differences."""
    table = read_table("configs/tables/digits.yaml")
    layout = lay_out(table, read_lines(table, recorded(table)))
    heads = layout.heads()
    own = [heads.index(head) for head in SHOWN]
    places = sorted({*own, *(place + 1 for place in own if heads[place + 1] == "difference")})
    lines = [
        heads,
        *([line.row.label, *layout.cells(line)] for line in layout.lines if line.row.name in table.drawn),
    ]
    return ["| " + " | ".join(cells[place].replace("|", r"\|") for place in (0, *places)) + " |" for cells in lines]


def test_the_readme_says_what_is_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in readme_lines() if line not in readme] == []
