"""A table's file: what it may hold, and that every mistake in it is one line that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from errors import UserError
from tables.reading import read_table
from tables.spec import KNOWN

ROOT = Path(__file__).parents[1]
TABLES = sorted(path for path in (ROOT / "configs" / "tables").glob("*.yaml") if path.name != "sources.yaml")

TABLE = """\
title: Two rows
seeds: 3
baseline: plain
report: {metrics: [patch.cosine_abs], images: 16}
sources: {paper: {text: a paper}, other: {text: another, second_hand: true, note: somebody else's}}
columns:
  - top1
  - {name: patches, label: cos, value: "report:patch.cosine_abs@last", digits: 3, difference: true}
rows:
  plain: {config: configs/digits.yaml, published: {top1: 79.8, source: other}}
  five:
    label: all five
    config: configs/digits_diverse.yaml
    flags: --lr 1e-3 --model-kwargs 'depth=2'
    seeds: 5
  theirs: {group: others, published: [{top1: 80.5, source: paper}, {top1: 81, source: other}]}
"""

GIVEN = "published: {top1: 79.8, source: other}"
THEIRS = "  theirs: {group: others, published: [{top1: 80.5, source: paper}, {top1: 81, source: other}]}"
ON = "program: segmentation\n    backbone: "
COSINE = 'value: "report:patch.cosine_abs@last"'


def write(folder: Path, text: str, name: str = "two.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_read(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, TABLE))
    assert (table.name, table.runs, table.metrics, table.images) == ("two", "two", ("patch.cosine_abs",), 16)
    assert [column.name for column in table.columns] == ["top1", "patches"]
    assert table.columns[0] == KNOWN["top1"] and table.columns[1].digits == 3
    plain, five, theirs = table.rows
    assert (plain.label, plain.seeds, plain.baseline) == ("plain", 3, "plain")
    assert (
        five.flags == ("--lr", "1e-3", "--model-kwargs", "depth=2") and five.seeds == 5 and five.baseline == "plain"
    )
    assert (theirs.config, theirs.baseline, theirs.group) == ("", "", "others")
    assert [(each.numbers["top1"], each.source) for each in theirs.published] == [(80.5, "paper"), (81, "other")]
    assert table.sources["other"].second_hand
    assert [row.seeds for row in read_table(write(tmp_path, TABLE), seeds=1).rows] == [1, 1, 1]


def test_merged_mappings_and_numbers_without_a_point(tmp_path: Path) -> None:
    """'<<' brings the keys of another row; 1e2 is a number, which YAML takes for a text."""
    text = TABLE.replace("plain: {", "plain: &one {").replace(
        "    config: configs/digits_diverse.yaml\n", "    <<: *one\n"
    )
    table = read_table(write(tmp_path, text.replace("digits: 3", "digits: 3, divide: 1e2")))
    assert table.rows[1].config == "configs/digits.yaml" and table.rows[1].label == "all five"
    assert table.columns[1].divide == 100


def test_a_program_and_a_backbone(tmp_path: Path) -> None:
    """The table's program is that of rows that name none; a backbone need not be a row of the table."""
    text = TABLE.replace("seeds: 3", "program: segmentation").replace("report: {metrics: [patch.cosine_abs], ", "")
    text = text.replace("images: 16}\n", "").replace(f", {COSINE}", "").replace(", difference: true", "")
    text = text.replace("  plain: {", "  plain: {program: main, ").replace(
        "    seeds: 5\n", "    backbone: other\n"
    )
    table = read_table(write(tmp_path, text))
    assert [(row.program, row.backbone) for row in table.rows] == [
        *(("main", ""), ("segmentation", "other"), ("segmentation", ""))
    ]
    assert [column.name for column in table.columns] == ["top1", "patches"]
    assert table.measured == (KNOWN["top1"],)


def test_only_takes_the_baseline_along(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, TABLE))
    assert [row.name for row in table.only(["five"])] == ["plain", "five"]
    assert [row.name for row in table.only([])] == ["plain", "five"]  # the others' is never run
    with pytest.raises(UserError, match=r"has no row fve\. Did you mean five\?"):
        table.only(["fve"])
    with pytest.raises(UserError, match="row theirs has published numbers alone: nothing to run"):
        table.only(["theirs"])


def test_sources_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, "paper: {text: a paper, link: https://example.org}\n", "sources.yaml")
    text = TABLE.replace(TABLE[TABLE.index("sources:") : TABLE.index("columns:")], "sources: sources.yaml\n")
    table = read_table(write(tmp_path, text.replace("other", "paper")))
    assert table.sources["paper"].link == "https://example.org"
    write(tmp_path, "paper: {txt: a paper}\n", "sources.yaml")
    with pytest.raises(
        UserError, match=r"sources\.yaml, line 1: unknown key 'txt' of source paper\. Did you mean text"
    ):
        read_table(tmp_path / "two.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 3", "seed: 3", "line 2: unknown key 'seed' of the table. Did you mean seeds"),
        ("seeds: 3", "seeds: 0", "line 2: seeds of the table must be between 1 and 1000, not 0"),
        ("seeds: 3", "seeds: true", "line 2: seeds of the table must be a whole number, not True"),
        ("seeds: 3", "seeds: '3'", "line 2: seeds of the table must be a whole number, not '3'"),
        ("title: Two rows", "title: ''", "line 1: the table: no title"),
        ("title: Two rows", "title: [a]", "line 1: title of the table must be a text"),
        ("baseline: plain", "baseline: plan", "baseline 'plan' of plain is no row that is run"),
        ("baseline: plain", "baseline: theirs", "baseline 'theirs' of plain is no row that is run"),
        ("baseline: plain", "caption: none", "differences need a baseline"),
        ("[patch.cosine_abs]", "[patch.cosin]", "line 4: --metrics patch.cosin: there is no such metric"),
        ("images: 16", "image: 16", "line 4: unknown key 'image' of report. Did you mean images"),
        ("images: 16", "images: 0", "line 4: images of report must be between 1"),
        ("images: 16", "images: 16, draw: [fve]", "line 4: draw names 'fve', which is no row that is"),
        ("  - top1\n", "  - top\n", "line 6: unknown column 'top': give name, label and value. Did you mean top"),
        ("  - top1\n", "  - top1\n  - top1\n", "two columns are called top1"),
        ("  - top1\n", "  top1: x\n", "is not YAML"),
        (COSINE, "value: report:attn.std@last", "needs attn.std among the metrics"),
        ("digits: 3", "digit: 3", "line 8: unknown key 'digit' of a column. Did you mean digits"),
        ("digits: 3", "divide: 0", "line 8: divide must not be 0"),
        ("digits: 3", "divide: .nan", "line 8: divide of a column must be a number, not nan"),
        (COSINE, 'value: "report:patch.cosine_abs@lst"', "a layer is mean, first, last, input or a block's number"),
        (COSINE, "value: tset_acc1", "line 8: value tset_acc1 is no key of log.txt"),
        ("difference: true", "difference: 1", "line 8: difference of a column must be true or false, not 1"),
        ("  five:\n", "  fi ve:\n", "line 11: 'fi ve' cannot be the name of a folder"),
        ("  five:\n", "  ../five:\n", "cannot be the name of a folder"),
        ("label: all five", "lable: all five", "line 12: unknown key 'lable' of row five. Did you mean label"),
        ("'depth=2'", "'depth=2", "flags of row five cannot be read"),
        ("--lr 1e-3", "--help", "line 14: --help in flags of row five: it asks for help"),
        ("--lr 1e-3", "--seed 1", "line 14: --seed in flags of row five: a cell gets it from its row"),
        ("--lr 1e-3", "--output-dir=x", "line 14: --output-dir=x in flags of row"),
        ("others, published", "others, publish", "unknown key 'publish' of row theirs"),
        ("seeds: 3", "program: segment", "line 2: program of the table must be main or segmentation, not"),
        ("label: all five", "program: 3", "line 12: program of row five must be a text, not 3"),
        ("label: all five", "backbone: plain", "line 11: backbone of five is for rows of segmentation: say"),
        ("label: all five", "program: segmentation", "line 11: the report on five needs images of the kind"),
        ("label: all five", f"{ON}../plain", "line 11: '../plain' cannot be the name of a folder"),
        ("label: all five", f"{ON}theirs", "line 11: backbone theirs of five is no row that main.py trains"),
        ("label: all five", f"{ON}five", "line 11: backbone five of five is no row that main.py trains"),
        ("label: all five", f"{ON}plain", "line 11: five has 5 seeds, its backbone plain 3: each starts"),
        (f"{COSINE}, digits: 3", "digits: 3", "line 8: patches has no value, but published numbers alone: drop"),
        (GIVEN, "published: {top5: 9, source: other}", "line 10: unknown key 'top5'"),
        (GIVEN, "published: {top1: 79.8}", "line 10: published numbers of row plain: no source"),
        (GIVEN, "published: {source: other}", "line 10: published has a source and no number"),
        (GIVEN, "published: {top1: 79.8, source: othr}", "unknown source 'othr'"),
        (GIVEN, "published: 79.8", "line 10: published must be a mapping"),
        (GIVEN, "published: {top1: high, source: other}", "top1 of published numbers"),
        (", note: somebody else's", "", "source other is second-hand: say in a note"),
        (THEIRS, "  theirs: {group: others}", "line 16: row theirs has neither config nor published numbers"),
        ("  theirs:", "  five:", "'five' is given twice"),
        ("columns:", "columns: top1\nrows:", "'rows' is given twice"),
        (TABLE, "- a\n", "is no table: it must hold title, columns and rows"),
        (TABLE, "a: [\n", "is not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    path = write(tmp_path, TABLE.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.yaml: No such file"):
        read_table(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_projects_tables(path: Path) -> None:
    """They can be read, open with their command, and their configs are there; equal rows are equal everywhere."""
    table = read_table(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"script/reproduce_table.py configs/tables/{path.name}" in head and "Result" in head
    assert all((ROOT / row.config).is_file() for row in table.rows if row.config)


def test_rows_of_one_name_are_the_same_runs() -> None:
    """Tables that share their runs must not train two things under one name."""
    seen: dict[tuple[str, str], tuple[str, str, str, tuple[str, ...]]] = {}
    for table in map(read_table, TABLES):
        for row in (row for row in table.rows if row.config):
            of_all = table.flags if row.program == table.program else ()
            what = row.program, row.config, row.backbone, (*of_all, *row.flags)
            assert seen.setdefault((table.runs, row.name), what) == what, (table.path, row.name)


def test_published_numbers_stand_once() -> None:
    """Every source of sources.yaml is cited by a table."""
    sources = yaml.safe_load((ROOT / "configs" / "tables" / "sources.yaml").read_text(encoding="utf-8"))
    cited = {each.source for table in map(read_table, TABLES) for row in table.rows for each in row.published}
    assert cited == set(sources)
