"""The report: its JSON, tables and files. Its page, figures and statistics have files of their own."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import assessed
import numpy as np
import pytest
from assessed import Report, model, one_metric, report, single
from PIL import Image
from scipy import stats

from errors import UserError
from redundancy.finding import Assessed, Axis, Finding
from redundancy.metrics.registry import METRICS
from redundancy.presentation import page, tables, wording

NAN = float("nan")
LAYERS = Axis("layer", ("input", "0", "1"))


@pytest.fixture(autouse=True)
def metrics():
    with assessed.registered():
        yield


# ------------------------------------------------------------------------------------------------------------
# Reports, and their JSON


def test_models_of_one_label_are_seeds():
    groups = report(model("a"), model("b"), model("a", seed=1)).groups()
    assert [(label, len(models)) for label, models in groups.items()] == [("a", 2), ("b", 1)]


def test_models_of_other_depth_are_no_seeds():
    groups = report(model("a"), model("a", depth=6), model("a", seed=1), model("a", depth=3)).groups()
    assert {label: len(models) for label, models in groups.items()} == {"a": 2, "a (2)": 1, "a (3)": 1}


def test_reports_are_joined():
    first, second = report(model("a")), report(model("b"))
    second.about |= {"command": "another", "host": "h"}
    both = first + second
    assert [each.label for each in both.models] == ["a", "b"]
    assert both.about == first.about | {"host": "h"}
    assert len(first.models) == 1


def forbidden(name):
    raise AssertionError(f"{name} in JSON")


def test_json_has_every_number_and_no_nan():
    first = assessed.hard_report()
    extra = Finding((LAYERS,), np.array([np.inf, 0.1 + 0.2, NAN]), np.array([NAN, 1e-300, -0.0]), 3)
    about = {"accuracy": NAN, "n": np.int64(3)}
    first.models.append(Assessed("x", about, {"patch.cka": extra}, {"attn.std": "none"}))
    text = first.to_json()
    json.loads(text, parse_constant=forbidden)
    again = Report.from_json(text)
    assert again.about == first.about and again.to_json() == text
    for a, b in zip(first.models, again.models, strict=True):
        assert (a.label, a.gaps, list(a.findings)) == (b.label, b.gaps, list(b.findings))
        for name, finding in a.findings.items():
            same(finding, b.findings[name])
    assert again.models[-1].about == {"accuracy": None, "n": 3}


def same(a, b):
    assert (a.axes, a.count, a.note) == (b.axes, b.count, b.note)
    np.testing.assert_array_equal([b.summary, b.summary_error], [a.summary, a.summary_error])
    np.testing.assert_array_equal(b.mean, np.where(np.isfinite(a.mean), a.mean, NAN), strict=True)
    assert (a.error is None) == (b.error is None)
    if a.error is not None:
        np.testing.assert_array_equal(b.error, a.error, strict=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', ""])
def test_other_json_is_refused(text):
    with pytest.raises(UserError, match=r"this is no report\.json"):
        Report.from_json(text)


# ------------------------------------------------------------------------------------------------------------
# Tables


def test_the_table_is_aligned_and_marks_clear_differences():
    models = {"a": [1, 2, 3], "b|": [11, 12, 14], "c": [2, 1, 3]}
    lines = report(*(one_metric(label, single(values)) for label, values in models.items())).table().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1 and len(table) == 3
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:4] == ["patch.cosine_abs", "2.00 ± 0.58", "12.33 ± 0.88", "2.00 ± 0.58"]
    assert cells[4:] == ["+10.33 ± 0.33 *", "+0.00 ± 0.58"]
    assert r"b\|" in table[0]
    assert lines[-1].startswith("± is the standard error over images") and "paired" in lines[-1]


def test_numbers_csv_has_every_number():
    first = assessed.hard_report()
    rows = list(csv.DictReader(io.StringIO(tables.numbers_csv(first.groups()))))
    seen = 0
    for label, models in first.groups().items():
        for seed, each in enumerate(models, 1):
            mine = [row for row in rows if row["label"] == label and row["seed"] == str(seed)]
            for name, finding in each.findings.items():
                found = [row for row in mine if row["metric"] == name]
                values = np.array([float(row["mean"] or "nan") for row in found]).reshape(finding.mean.shape)
                np.testing.assert_array_equal(values, finding.mean)
                seen += len(found)
            (gap,) = (row for row in mine if row["gap"])
            assert (gap["metric"], gap["gap"], gap["mean"]) == ("attn.entropy", *each.gaps.values(), "")
            seen += 1
    assert seen == len(rows)


def test_numbers_csv_says_where_each_number_is():
    rows = csv.DictReader(io.StringIO(tables.numbers_csv(report(model("a")).groups())))
    found = {(row["metric"], row["layer"], row["layer_2"], row["matrix"], row["component"]): row for row in rows}
    findings = model("a").findings
    assert float(found["patch.cka", "3", "input", "", ""]["mean"]) == findings["patch.cka"].mean[4, 0]
    assert float(found["weight.spectrum", "2", "", "v", "7"]["mean"]) == findings["weight.spectrum"].mean[2, 2, 6]
    assert found["output.top1", "", "", "", ""]["error"] == "0.02"


def test_summary_csv_says_what_errors_are_taken_over():
    first = report(model("a"), model("b", seed=1, level=0.2), *(model("c", seed=k) for k in (2, 3)))
    table = csv.DictReader(io.StringIO(tables.summary_csv(first.groups())))
    rows = {(row["metric"], row["label"]): row for row in table}
    a, b = (each.findings["patch.cosine_abs"].per_image for each in first.models[:2])
    of_b = rows["patch.cosine_abs", "b"]
    statistic = float(of_b["difference"]) / float(of_b["difference_error"])
    assert statistic == pytest.approx(stats.ttest_rel(b, a).statistic)
    assert (of_b["value_over"], of_b["difference_over"], of_b["clear"]) == ("images", "images", "1")
    assert rows["patch.cosine_abs", "c"]["value_over"] == "seeds"
    assert rows["patch.cosine_abs", "c"]["difference_error"] == ""
    assert rows["attn.entropy", "a"]["gap"] == "shows no maps between all patches"


def test_latex_is_plain():
    text = tables.latex(assessed.hard_report().groups())
    assert text.isascii()
    lines = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {15}  # metric, 8 labels, 7 differences
    for char in "%#~":
        assert not re.search(rf"(?<!\\){char}", text.partition("\n")[2]), char
    assert r"a\_b \$x\$ 100\% \#1 \{c\} \textasciitilde{}\textasciicircum{}\textbackslash{} \textbar{}d" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert r"\texttt{patch.cosine\_abs}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path):
    table = tables.latex(assessed.hard_report().groups())
    (tmp_path / "a.tex").write_text(rf"\documentclass{{article}}\begin{{document}}{table}\end{{document}}")
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_powers_of_ten_in_latex():
    finding = replace(single([1, 2]), summary=1.25e-9, summary_error=3.1e-10)
    text = tables.latex(report(one_metric("a", finding)).groups())
    assert r"$1.25 \cdot 10^{-9} \pm 3.1 \cdot 10^{-10}$" in text


# ------------------------------------------------------------------------------------------------------------
# Files


FILES = ["figures", "numbers.csv", "report.html", "report.json", "summary.csv", "summary.tex"]


def small():
    """Quick to save."""
    finding = assessed.finding((assessed.layers(3),), np.random.default_rng(0))
    return report(one_metric("a", finding))


def test_a_saved_report(tmp_path):
    first = report(model("a", examples=1), model("b", seed=1, examples=1))
    first.save(tmp_path / "new" / "out")
    assert [each.name for each in tmp_path.glob("new/*")] == ["out"]
    folder = tmp_path / "new" / "out"
    assert sorted(each.name for each in folder.iterdir()) == FILES
    assert (folder / "report.json").read_text(encoding="utf-8") == first.to_json()
    figures = {each.stem for each in (folder / "figures").iterdir()}
    spectra = {f"weight.spectrum.{layer}" for layer in ("first", "middle", "last")}
    drawn = set(METRICS) - {"attn.entropy", "weight.spectrum"} | spectra
    assert figures == drawn | {"patch.cosine-abs+all", "example.1"}
    for figure in figures:
        stem = str(folder / "figures" / figure)
        assert ElementTree.parse(f"{stem}.svg").getroot().tag.endswith("svg")
        assert Path(f"{stem}.pdf").read_bytes().startswith(b"%PDF-")
        with Image.open(f"{stem}.png") as image:
            assert 850 <= image.width <= 1500


def test_a_measure_has_other_files_than_a_metric():
    assert wording.file_name("patch.cosine:abs") != wording.file_name("patch.cosine_abs") == "patch.cosine_abs"
    assert wording.file_name("patch.contrastive:tau=0.1@first:last") == "patch.contrastive-tau-0.1+first-last"


def test_the_same_report_has_the_same_bytes(tmp_path):
    first = model("m", depth=2, examples=1)
    kinds = ("patch.cosine_abs", "patch.cka", "weight.condition", "output.top1")
    first = replace(first, findings={name: first.findings[name] for name in kinds})
    for name in ("a", "b"):
        report(first).save(tmp_path / name)
    files = [each.relative_to(tmp_path / "a") for each in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 5 + 3 * 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("there", ["folder", "file", "broken link"])
def test_nothing_is_overwritten(tmp_path, there):
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
    elif there == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(UserError, match="out exists; give another --output"):
        small().save(out)
    assert list(tmp_path.iterdir()) == [out]
    assert there != "file" or out.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(page, "render", stop)
    full = isinstance(error, OSError)
    with pytest.raises(UserError if full else type(error), match="written: .*No space left" if full else "^$"):
        small().save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out cannot be written: "):
        small().save(tmp_path / "file" / "out")


def test_tables_need_no_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
from redundancy.report import Report, Assessed
report = Report([Assessed("a", {}, {})], {})
print(report.table())
try:
    report.save("out")
except Exception as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "UserError the report's figures need matplotlib: pip install matplotlib" in run.stdout


# ------------------------------------------------------------------------------------------------------------
# Odd ones


def empty(label="a"):
    return Assessed(label, {}, {}, {"patch.cosine_abs": "no patches", "attn.entropy": "no maps"})


def all_nan():
    findings = {name: Finding(each.axes, np.full_like(each.mean, NAN)) for name, each in model().findings.items()}
    return Assessed("n", {}, findings)


ODD = {
    "no metric": lambda: [empty()],
    "no models": lambda: [],
    "nothing at all": lambda: [Assessed("a", {}, {})],
    "one model lacks all": lambda: [model("b"), empty()],
    "the first lacks all": lambda: [empty(), model("b")],
    "one layer": lambda: [model(depth=1)],
    "all NaN": lambda: [all_nan(), model()],
    "other depths": lambda: [model("a", depth=2), model("b", depth=40)],
    "one image": lambda: [
        one_metric("a", Finding((LAYERS,), np.ones(3), np.full(3, NAN), 1, 1.0, NAN, np.ones(1)))
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_reports_are_shown(name):
    """pytest makes warnings errors."""
    first = report(*ODD[name]())
    json.loads(first.to_json(), parse_constant=forbidden)
    pictures = {metric: first.pictures(metric) for metric in wording.names(first.models)}
    shown = page.render(first.groups(), first.about, pictures) + first.table() + tables.latex(first.groups())
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", shown), re.IGNORECASE)
