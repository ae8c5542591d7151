"""Pages and figures of tables, from made-up runs: what is written, what is left out, and how signs are escaped."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tables import figure, record
from tables.cells import Cell, cells_of
from tables.options import read_options
from tables.reading import read_table
from tables.spec import Given
from tables.writing import decimal

TABLE = """\
title: Made up
seeds: 2
baseline: plain
flags: --epochs 1
report: {metrics: [patch.cosine_abs, weight.cosine_abs], images: 16, draw: [plain, five]}
sources:
  own: {text: "a paper, 5 % & more", link: https://example.org/a_b}
  other: {text: a survey, second_hand: true, note: Of somebody else.}
columns:
  - top1
  - {name: layers, label: "|cos|", value: "report:patch.cosine_abs@mean", digits: 3}
rows:
  plain: {config: configs/digits.yaml, published: {top1: 79.8, source: other}}
  five:
    label: "[a] b_c | <d> *e*"
    group: diverse
    config: configs/digits.yaml
    published: {top1: 1234567.25, source: own}
  last: {config: configs/digits.yaml}
"""


def finding(axes: list[tuple[str, list[str]]], mean: Any) -> dict[str, Any]:
    return {"axes": [{"name": name, "labels": labels} for name, labels in axes], "mean": mean}


@pytest.fixture
def made(tmp_path: Path) -> list[Cell]:
    """Finished runs of 'plain' and 'five', and none of 'last'; 'plain' has a gap in one metric."""
    (tmp_path / "made.yaml").write_text(TABLE)
    table = read_table(tmp_path / "made.yaml")
    cells = cells_of(table, table.rows, tmp_path / "out")
    for cell in (cell for cell in cells if cell.row.name != "last"):
        accuracy = {"plain": 90.0, "five": 91.5}[cell.row.name] + cell.seed
        cell.path.mkdir(parents=True)
        (cell.path / "log.txt").write_text(json.dumps({"epoch": 0, "test_acc1": accuracy}) + "\n")
        (cell.path / "cost.json").write_text(json.dumps({"processes": 1}))
        findings = {"weight.cosine_abs": finding([("layer", ["0"]), ("matrix", ["q", "k"])], [[0.25, 0.75]])}
        gaps = {"patch.cosine_abs": "no patches"}
        if cell.row.name == "five":
            findings["patch.cosine_abs"] = finding([("layer", ["input", "0", "1"])], [9.0, 0.25, 0.5])
            gaps = {}
        about = {"command": "python -m redundancy x --images 16"}
        report = {"about": about, "models": [{"findings": findings, "gaps": gaps}]}
        (cell.path / "report.json").write_text(json.dumps(report))
    return cells


def test_the_page(made: list[Cell]) -> None:
    """The input of block 0 is no block; the difference is 1.5 for both seeds, so it has no interval."""
    page = record.pages(made[0].table, made, "python script/reproduce_table.py made.yaml")["md"]
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines == [
        r"|  | seeds | top-1 (%) | difference | \|cos\| | published top-1 (%) |",
        "|---|--:|--:|--:|--:|--:|",
        "| plain | 2 of 2 | 90.50 ± 0.71 | – | – | 79.8 [1] |",  # noqa: RUF001
        "| *diverse* |  |  |  |  |  |",
        r"| \[a\] b_c \| \<d> \*e\* | 2 of 2 | 92.00 ± 0.71 | +1.50 ° | 0.375 ± 0.000 | 1,234,567.25 [2] |",
        "| last | 0 of 2 | not run | – | not run | – |",  # noqa: RUF001
    ]
    assert "[1] a survey. Not the paper that trained the model. Of somebody else." in page
    assert "[2] [a paper, 5 % & more](https://example.org/a_b)." in page
    assert "```bash\npython script/reproduce_table.py made.yaml\n```" in page


def test_the_latex(made: list[Cell]) -> None:
    """A label that begins with a bracket must not be taken for an argument of the line's end before it."""
    text = record.pages(made[0].table, made, "")["tex"]
    assert (
        r"{}[a] b\_c \textbar{} \textless{}d\textgreater{} *e* & 2 of 2 & 92.00 $\pm$ 0.71 & +1.50 $^\circ$" in text
    )
    assert r"a paper, 5 \% \& more, https://example.org/a\_b." in text and text.isascii()
    assert text.count(r"\begin{tabular}{lrrrrr}") == 1
    assert r" & \begin{tabular}[b]{@{}r@{}}published \\ top-1 (\%)\end{tabular} \\" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_takes_it(made: list[Cell], tmp_path: Path) -> None:
    """In a document without packages."""
    (tmp_path / "made.tex").write_text(record.pages(made[0].table, made, "")["tex"])
    (tmp_path / "page.tex").write_text(
        r"\documentclass{article}\begin{document}\input{made}\input{made}\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "Output written on page.pdf (1 page" in run.stdout, run.stdout


def test_records_do_not_say_where_the_data_is(made: list[Cell], tmp_path: Path) -> None:
    data = str(tmp_path / "my data")
    cell = replace(made[0], given=Given(("--epochs", "2"), {"": data}))
    (cell.path / "args.yaml").write_text(f"# command: main.py --data-path {data!r}\ndata_path: {data}\n")
    record.keep(cell, tmp_path / "kept")
    kept = tmp_path / "kept" / "made" / "plain" / "seed-0"
    assert (kept / "args.yaml").read_text() == "# command: main.py --data-path 'DATA'\ndata_path: DATA\n"
    assert (kept / "log.txt").read_bytes() == (cell.path / "log.txt").read_bytes()


def test_the_csv_is_read_back(made: list[Cell]) -> None:
    pages = record.pages(made[0].table, made, "")
    rows = list(csv.DictReader(io.StringIO(pages["csv"])))
    five = next(row for row in rows if (row["row"], row["column"]) == ("five", "top1"))
    assert (five["label"], five["mean"], five["seeds"]) == ("[a] b_c | <d> *e*", "92.0", "2")
    assert (five["difference"], five["low"], five["pairs"], five["published"]) == (
        "1.5",
        "",
        "2",
        "1234567.25 (own)",
    )
    seeds = list(csv.DictReader(io.StringIO(pages["seeds.csv"])))
    assert [(row["row"], row["seed"], row["top1"]) for row in seeds] == [
        *(("plain", "0", "90.0"), ("plain", "1", "91.0"), ("five", "0", "91.5"), ("five", "1", "92.5"))
    ]


def test_figures_say_of_which_numbers_they_are(made: list[Cell], tmp_path: Path) -> None:
    table = made[0].table
    record.write_pages(table, made, tmp_path / "pages", "")
    for name in ("made.png", "made.layers.png"):
        with Image.open(tmp_path / "pages" / name) as image:
            assert image.info["Description"] == record.fingerprint(table, made)
    before = record.fingerprint(table, made)
    report = made[1].path / "report.json"
    report.write_text(report.read_text().replace("0.25", "0.125"))
    assert record.fingerprint(table, made) != before


def test_a_figure_of_other_numbers_goes(made: list[Cell], tmp_path: Path) -> None:
    """Where there is nothing to draw any more."""
    table = made[0].table
    record.write_pages(table, made, tmp_path / "pages", "")
    for cell in made:
        (cell.path / "cost.json").unlink(missing_ok=True)
    record.write_pages(table, made, tmp_path / "pages", "")
    assert not list((tmp_path / "pages").glob("*.png"))
    assert "not run" in (tmp_path / "pages" / "made.md").read_text()


def test_a_row_keeps_its_colour_where_another_has_a_gap(
    made: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    style = figure.style
    monkeypatch.setattr(figure, "style", lambda place: asked.append(place) or style(place))
    figure.draw_layers(made[0].table, made, tmp_path / "layers.png", "")
    assert asked == [1, 0, 1, 0, 1]  # patches: 'five' alone; weights: both; the legend: both


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [(-0.001, 2, True, "0.00"), (0.0, 1, True, "0.0"), (-1.25, 1, False, "−1.2"), (12345.6, 1, True, "+12,345.6")],  # noqa: RUF001
)
def test_numbers_have_a_real_minus_and_no_negative_zero(value: float, digits: int, sign: bool, text: str) -> None:
    assert decimal(value, digits, sign) == text


def test_tables_without_a_run_are_not_rendered(tmp_path: Path) -> None:
    """Two tables may share a folder of runs; only those of which a row was run are written."""
    (tmp_path / "fashion" / "plain-24" / "seed-0").mkdir(parents=True)
    (there,) = read_options(["--render", str(tmp_path)]).tables
    assert there.name == "fashion_24"
