"""A table of real runs: killed and started again, refused twice in one folder, and written from its record."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
from processes import PATIENCE

from state.lock import is_locked
from tables import command, runner

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "script" / "reproduce_table.py"
TABLE = """\
title: Two toys
seeds: 1
baseline: plain
flags: >-
  --device cpu --epochs 4 --warmup-epochs 1 --batch-size 64 --num_workers 0
  --model-kwargs patch_size=8 embed_dim=16 depth=2 num_heads=2
report: {metrics: [patch.cosine_abs], images: 8}
columns:
  - top1
  - {name: patches, label: "|cos|", value: test_patch.pairwise_cosine@last, digits: 4, difference: true}
  - {name: measured, label: of the report, value: "report:patch.cosine_abs@last", digits: 4}
  - parameters
rows:
  plain: {config: configs/digits.yaml}
  five: {config: configs/digits_diverse.yaml}
"""
PAGES = ("toys.md", "toys.tex", "toys.csv", "toys.seeds.csv", "toys.png")


def start(table: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(SCRIPT), str(table), "--output", str(output), *flags]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=table.parent)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def without_revision(page: Path) -> bytes:
    """A page's content, whoever commits or edits something meanwhile."""
    return re.sub(rb"revision [^;]+;", b"", page.read_bytes()) if page.suffix == ".md" else page.read_bytes()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def epochs_in(folder: Path) -> int:
    log = folder / "log.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder where the table ran without interruption, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "toys.yaml").write_text(TABLE)
    words = ["toys.yaml", "--output", str(folder / "out"), "--keep", str(folder / "record")]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(runner, "start", forks.start_as_the_runner)
        patch.chdir(folder)
        code = command.main(words)
    assert code == 0, said.getvalue()
    return folder, said.getvalue()


def test_what_comes_out(whole: tuple[Path, str]) -> None:
    folder, said = whole
    assert all((folder / "out" / page).is_file() for page in PAGES)
    runs = {row: folder / "out" / "toys" / row / "seed-0" for row in ("plain", "five")}
    last = {row: json.loads((run / "log.txt").read_text().splitlines()[-1]) for row, run in runs.items()}
    page = (folder / "out" / "toys.md").read_text()
    assert page.strip() in said
    for row in runs:
        assert f"| {row} | {last[row]['test_acc1']:.2f} |" in page
        assert f" {last[row]['test_patch.pairwise_cosine@last']:.4f} |" in page
    change = last["five"]["test_acc1"] - last["plain"]["test_acc1"]
    assert f" {change:+.2f}".replace("-", "−") in page  # noqa: RUF001
    report = json.loads((runs["five"] / "report.json").read_text())["models"][0]["findings"]["patch.cosine_abs"]
    assert f"| {report['mean'][-1]:.4f} |" in page
    assert "python script/reproduce_table.py toys.yaml" in page and "2 runs: revision" in page


def test_killed_and_started_again_gives_the_same_bit_for_bit(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner is killed while a run trains, and started again at once: it waits for that run. A second runner in
    the same folder is refused meanwhile."""
    table, output = whole[0] / "toys.yaml", tmp_path / "out"
    first = start(table, output)
    wait_for(lambda: epochs_in(output / "toys" / "plain" / "seed-0") >= 1, first)
    first.send_signal(signal.SIGKILL)
    ended(first)
    second = start(table, output)
    wait_for(lambda: is_locked(output / "toys"), second)
    assert command.main([str(table), "--output", str(output)]) == 2
    refused = f"another run is writing to --output {output / 'toys'}: wait for its end"
    assert refused in capsys.readouterr().err
    assert ended(second)[0] == 0
    for page in PAGES:
        assert without_revision(output / page) == without_revision(whole[0] / "out" / page), page
    for row in ("plain", "five"):
        log, other = (
            (folder / "toys" / row / "seed-0" / "log.txt").read_bytes() for folder in (output, whole[0] / "out")
        )
        assert log == other


def test_pages_come_from_the_record_alone(whole: tuple[Path, str], tmp_path: Path) -> None:
    """--render gives what the run itself wrote; the record holds no weights."""
    folder, _ = whole
    record = folder / "record"
    written = {page: (record / page).read_bytes() for page in PAGES}
    assert written == {page: (folder / "out" / page).read_bytes() for page in PAGES}
    kept = {path.name for path in (record / "toys" / "five" / "seed-0").iterdir()}
    assert kept == {"log.txt", "args.yaml", "cost.json", "report.json"}
    for page in PAGES:
        (record / page).unlink()
    assert command.main([str(folder / "toys.yaml"), "--render", str(record)]) == 0
    assert written == {page: (record / page).read_bytes() for page in PAGES}


def test_a_dry_run_says_what_is_there(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole
    words = [str(folder / "toys.yaml"), "--output", str(folder / "out"), "--seeds", "2", "--dry-run"]
    assert command.main([*words, "--nproc", "8", "--", "--num_workers", "3"]) == 0
    said = capsys.readouterr().out
    assert "# plain, seed 0: finished\n" in said and "# five, seed 1: to run\n" in said
    assert "torchrun --standalone --nproc_per_node 8 main.py --config configs/digits.yaml --device cpu" in said
    assert "--num_workers 3 --seed 1 --output_dir" in said
    assert "rate from\n" in said and " a finished run\n" in said and "an estimate: " in said
    assert not (folder / "out" / "toys" / "plain" / "seed-1").exists()


def test_through_torchrun(tmp_path: Path) -> None:
    """Two processes of a run, under a runner that is itself told to use less."""
    table = tmp_path / "toys.yaml"
    table.write_text("".join(line for line in TABLE.splitlines(True) if "report" not in line))
    flags = ["--nproc", "2", "--only", "plain", "--", "--epochs", "1", "--warmup-epochs", "0"]
    code, said = ended(start(table, tmp_path / "out", *flags))
    assert code == 0, said
    cost = json.loads((tmp_path / "out" / "toys" / "plain" / "seed-0" / "cost.json").read_text())
    assert cost["processes"] == 2
    assert "2 process(es) on cpu" in (tmp_path / "out" / "toys" / "plain" / "seed-0" / "output.txt").read_text()


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main([str(tmp_path / "toys.yaml")]) == 2
    assert "tables need scipy and matplotlib: pip install -r requirements-quickstart.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which table? e.g."),
        (["none.yaml"], "cannot read none.yaml: No such file"),
        (["TABLE", "--nproc", "0"], "--nproc must be between 1 and 1000, not 0"),
        (["TABLE", "--jobs", "0"], "--jobs must be between 1"),
        (["TABLE", "--seeds", "1001"], "--seeds must be between 1 and 1000, not 1001"),
        (["TABLE", "--output", ""], "--output must name a folder"),
        (["TABLE", "--output", "toys.yaml"], "cannot write to --output"),
        (["TABLE", "--keep", "toys.yaml", "--dry-run"], "cannot write to --keep"),
        (["TABLE", "--output", "a", "--keep", "a/b", "--dry-run"], "must lie beside each other"),
        (["TABLE", "--", "--help"], "--help behind -- asks a program for help"),
        (["TABLE", "--slurm", "'", "--dry-run"], "--slurm cannot be read"),
        (["TABLE", "--render", "nowhere"], "--render nowhere is no folder"),
        (["TABLE", "--only", "fve"], "has no row fve. Did you mean five?"),
        (["TABLE", "--job", "2"], "unrecognized arguments: --job 2"),
        (["TABLE", "--", "--seed", "3"], "--seed behind --: every run gets it"),
        (["TABLE", "--", "--epoch", "3"], "row plain: unrecognized arguments: --epoch 3"),
        (["TABLE", "--slurm", "", "--jobs", "2"], "--jobs is for runs on this machine"),
        (["TABLE", "--images-per-second", "10"], "--images-per-second is for --dry-run"),
        (["TABLE", "--dry-run", "--images-per-second", "0"], "--images-per-second must be above 0, and finite"),
        (["TABLE", "--render", "here", "--dry-run"], "--dry-run is for runs, and --render runs nothing"),
        (["--render", "nowhere"], "--render nowhere is no folder"),
        (["TABLE", "--output", "/proc/none"], "cannot write to --output /proc/none"),
        (["TABLE", "--data-path", "x" * 5000], "--data-path"),
        (
            ["TABLE", "--data-path", "VOC=."],
            "--data-path VOC=...: no row is of that set, but of DIGITS; correct it",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything runs, and with exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toys.yaml").write_text(TABLE)
    (tmp_path / "here").mkdir()
    assert command.main([word.replace("TABLE", "toys.yaml") for word in words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("reproduce_table.py: error: ")
    assert said.err.count("\n") == 1 and "Traceback" not in said.err
    assert sorted(os.listdir(tmp_path)) == ["here", "toys.yaml"]
