"""Rows of segmentation in tables: real runs on a backbone of the same table, killed, kept, rendered; and checks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from PIL import Image
from processes import PATIENCE

from errors import UserError
from options import config
from redundancy.options import read_options as read_report_options
from segmentation.settings import Settings
from state.lock import is_locked
from tables import command, plan, runner, slurm
from tables.cells import Cell, cells_of
from tables.evidence import ROOT, read_log
from tables.options import read_options
from tables.reading import read_table
from tables.spec import Given

SCRIPT = ROOT / "script" / "reproduce_table.py"
TABLE = """\
title: A toy and its transfer
baseline: head
flags: >-
  --device cpu --epochs 1 --warmup-epochs 0 --batch-size 256 --num_workers 0
  --model-kwargs patch_size=8 embed_dim=16 depth=4 num_heads=2
columns: [miou, macc, pixel_acc, parameters]
rows:
  head:
    program: segmentation
    config: configs/segmentation/digits.yaml
    flags: >-
      --device cpu --data-set FOLDER --crop-size 16 --resize 24 20 --channels 8 --auxiliary-channels 4
      --iterations 12 --eval-interval 2 --warmup-iterations 1 --batch-size 4
    backbone: body
  body: {config: configs/digits.yaml, baseline: body}
"""
PAGES = ("toy.md", "toy.tex", "toy.csv", "toy.seeds.csv", "toy.png")


def run(*words: str | Path) -> tuple[int, str]:
    """The command's exit code, and what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return command.main([str(word) for word in words]), said.getvalue()


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Runs that this process starts are forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "start", forks.start_as_the_runner)
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FOLDER of pictures whose right half is bright: two classes."""
    root = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    for half, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / half).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((20, 24), np.uint8)
            mask[:, 12:] = 1
            pixels = random.integers(0, 60, (20, 24, 3)) + 90 * mask[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / half / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / half / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pairs: Path, forked: None) -> Path:
    """A folder where the table ran without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "toy.yaml").write_text(TABLE)
    code, said = run(folder / "toy.yaml", "--output", folder / "out", "--data-path", f"FOLDER={pairs}")
    assert code == 0 and "[1/2] body, seed 0: done" in said and "[2/2] head, seed 0: done" in said, said
    return folder


def last_line(folder: Path) -> dict[str, Any]:
    return read_log(folder / "seed-0")[-1]


def test_what_comes_out(whole: Path) -> None:
    """The run on the backbone's weights, and its scores in the columns; the backbone has none."""
    head = whole / "out" / "toy" / "head"
    last = last_line(head)
    scores = " | ".join(f"{last[name]:.2f}" for name in ("test_macc", "test_pixel_acc"))
    page = (whole / "out" / "toy.md").read_text()
    assert f"| head | {last['test_miou']:.2f} | – | {scores} |" in page  # noqa: RUF001
    assert re.search(r"^\| body \| – \| – \| – \| – \| [\d.]+ \|$", page, re.MULTILINE)  # noqa: RUF001
    assert "python script/reproduce_table.py toy.yaml --data-path DATA\n" in page
    said = (head / "seed-0" / "output.txt").read_text()
    assert f"backbone: {whole / 'out' / 'toy' / 'body' / 'seed-0' / 'checkpoint.pth'}" in said
    cost = json.loads((head / "seed-0" / "cost.json").read_text())
    assert cost["processes"] == 1 and cost["images_per_second"] > 0 and cost["hours"] > 0


def child_of(process: forks.Fork, word: str) -> int:
    """A process that another one has started, by a word of its command line."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == process.pid and word in (path.parent / "cmdline").read_text():
                return int(path.parent.name)
    raise AssertionError(f"no process with {word}")


def test_killed_and_started_again_gives_the_same_bit_for_bit(whole: Path, pairs: Path, tmp_path: Path) -> None:
    """The runner and the run are killed in the middle. The backbone, which is finished, is kept. What --keep leaves
    is the same table without weights and without the backbone's file."""
    out, record = tmp_path / "out", tmp_path / "record"
    shutil.copytree(whole / "out" / "toy" / "body", out / "toy" / "body")
    words = [whole / "toy.yaml", "--output", out, "--data-path", f"FOLDER={pairs}", "--keep", record]
    with open(tmp_path / "said", "wb") as said_first:
        first = forks.Fork(SCRIPT, [*map(str, words)], dict(os.environ), said_first.fileno(), said_first.fileno())
    deadline = time.monotonic() + PATIENCE
    while len(read_log(out / "toy" / "head" / "seed-0")) < 1:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run_of_head = child_of(first, "segmentation")
    first.kill()
    first.wait()
    os.kill(run_of_head, signal.SIGKILL)
    while is_locked(out / "toy" / "head" / "seed-0"):
        time.sleep(0.01)
    assert 0 < len(read_log(out / "toy" / "head" / "seed-0")) < 6 and not (out / "toy.md").exists()
    code, said = run(*words)
    assert code == 0 and "2 cells: 1 finished before, 1 to run" in said, said
    assert (out / "toy" / "head" / "seed-0" / "log.txt").read_bytes() == (
        whole / "out" / "toy" / "head" / "seed-0" / "log.txt"
    ).read_bytes()
    assert pages(out) == pages(whole / "out")
    shutil.rmtree(out)
    assert not list(record.rglob("*.pth"))
    for page in PAGES:
        (record / page).unlink()
    assert run(whole / "toy.yaml", "--render", record)[0] == 0
    assert pages(record) == pages(whole / "out")
    assert str(pairs) not in (record / "toy" / "head" / "seed-0" / "args.yaml").read_text()


def pages(folder: Path) -> dict[str, bytes]:
    """Without the revision, whoever commits or edits something meanwhile."""
    return {page: re.sub(rb"revision [^;]+;", b"", (folder / page).read_bytes()) for page in PAGES}


def test_a_backbone_of_another_table(whole: Path, pairs: Path, tmp_path: Path) -> None:
    """It must be there before anything starts, and the message names what trains it. A dry run shows all."""
    bodies = TABLE[: TABLE.index("  head:")] + TABLE[TABLE.index("  body:") :]
    heads = TABLE[: TABLE.index("  body:")].replace("flags: >-\n  --device", "runs: toy\nflags: >-\n  --device")
    (tmp_path / "bodies.yaml").write_text(bodies.replace("baseline: head", "runs: toy\nbaseline: body"))
    (tmp_path / "heads.yaml").write_text(heads)
    words = [tmp_path / "heads.yaml", "--output", tmp_path / "out", "--data-path", pairs]
    code, said = run(*words)
    assert code == 2 and said.count("error: ") == 1
    assert "heads.yaml, line 9: row head: its backbone is not trained in " in said
    train = f"python script/reproduce_table.py {tmp_path / 'bodies.yaml'} --only body --seeds 1"
    assert f"Train it first: {train} --output {tmp_path / 'out'}\n" in said and not (tmp_path / "out").exists()
    code, said = run(*words, "--dry-run", "--nproc", "2")
    assert code == 0 and "# head, seed 0: to run, when its backbone body is finished\n" in said
    start = "torchrun --standalone --nproc_per_node 2 -m segmentation --config configs/segmentation/digits.yaml"
    assert start in said and f"--backbone {tmp_path / 'out' / 'toy' / 'body' / 'seed-0' / 'checkpoint.pth'}" in said
    shutil.copytree(whole / "out" / "toy" / "body", tmp_path / "out" / "toy" / "body")
    code, said = run(*words, "--dry-run")
    assert code == 0 and "# head, seed 0: to run\n" in said
    (tmp_path / "out" / "toy" / "body" / "seed-0" / "cost.json").unlink()  # it goes on
    code, said = run(*words)
    assert code == 2 and "row head: its backbone is not trained in " in said
    (tmp_path / "bodies.yaml").unlink()
    shutil.rmtree(tmp_path / "out")
    code, said = run(*words)
    assert code == 2 and "heads.yaml, line 9: row head: its backbone body is not trained" in said
    assert said.endswith("has a row of that name with runs: toy\n")


# ------------------------------------------------------------------------------------------------------------
# Without runs


def cells(folder: Path, text: str = TABLE, given: Given = Given()) -> list[Cell]:  # noqa: B008
    (folder / "toy.yaml").write_text(text)
    table = read_table(folder / "toy.yaml")
    return cells_of(table, table.rows, folder / "out", given)


def test_flags_are_those_of_the_rows_own_program(tmp_path: Path, pairs: Path) -> None:
    """The table's, and those behind --, are for rows of the table's program; data goes by the sets."""
    (tmp_path / "toy.yaml").write_text(TABLE)
    data = ["--data-path", str(pairs), "--data-path", "FOLDER=/f", "--data-path", "ADE20K=/a"]
    given = read_options([str(tmp_path / "toy.yaml"), *data, "--", "--lr", "0.5"]).given
    assert given == Given(("--lr", "0.5"), {"": str(pairs), "FOLDER": "/f", "ADE20K": "/a"})
    head, body = cells(tmp_path, given=given)
    assert body.args.lr == 0.5 and head.args.lr != 0.5 and head.args.batch_size == 4
    assert (body.args.data_path, head.args.data_path) == (str(pairs), "/f")
    assert head.commands(1)[:3] == ["python", "-m", "segmentation"]
    assert body.commands(1)[:2] == ["python", "main.py"]
    assert "/f" in head.flags and "/a" not in head.flags and "--epochs" not in head.flags
    own = re.sub(r"flags: >-\n.*\n.*\n(?=columns)", "program: segmentation\nflags: --lr 0.25\n", TABLE)
    own = own.replace("    program: segmentation\n", "").replace("body: {", "body: {program: main, ")
    head, body = cells(tmp_path, own)
    assert (head.program.name, body.program.name) == ("segmentation", "main")
    assert head.args.lr == 0.25 and body.args.lr != 0.25


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["A", "B"], "--data-path is given twice: keep one"),
        (["VOC=A", "VOC=B"], "--data-path is given twice for VOC: keep one"),
        (["VOC="], "--data-path must name a folder"),
    ],
)
def test_data_is_given_once(tmp_path: Path, data: Sequence[str], message: str) -> None:
    (tmp_path / "toy.yaml").write_text(TABLE)
    code, said = run(tmp_path / "toy.yaml", *(word for each in data for word in ("--data-path", each)))
    assert code == 2 and message in said


def test_only_takes_backbones_along(tmp_path: Path) -> None:
    text = TABLE + "  other: {config: configs/digits.yaml, baseline: other}\n"
    table = cells(tmp_path, text)[0].table
    assert [row.name for row in table.only(["head"])] == ["head", "body"]
    assert [row.name for row in table.only(["body"])] == ["body"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("--iterations 12", "--iterations 13", "13 are not a multiple of --eval-interval 2"),
        ("--iterations 12", "--epochs 12", "unrecognized arguments: --epochs 12"),
        ("--channels 8", "--reg patch.cosine@norm=1", "patch.cosine@norm is at a layer behind the last block"),
        ("--channels 8", "--map-layers 0 9 1 2", "has blocks 0 to 3, and no 9"),
        ("--channels 8", "--pretrained", "--pretrained and backbone: body both say what it starts from"),
        ("--channels 8", "--backbone x.pth", "--backbone x.pth and backbone: body both say what it starts from"),
        ("--channels 8", "--class-file none.txt", "--class-file /.*none.txt: no such file"),
        ("--channels 8", "--predictions there", "--predictions is written by --eval"),
        ("backbone: body", "label: x", "there is no network: say backbone: ROW, or give --backbone"),
        ("backbone: body", "backbone: nobody", "its backbone nobody is not trained in .*, and no table of"),
        ("--data-set FOLDER", "--data-set ADE20K", "no folder .*images/validation"),
    ],
)  # fmt: skip
def test_rows_are_checked_before_anything_starts(
    tmp_path: Path, pairs: Path, old: str, new: str, message: str
) -> None:
    assert old in TABLE
    given = Given(data={"": str(pairs)})
    with pytest.raises(UserError, match=f"toy.yaml, line 8: row head: .*{message}"):
        plan.check(cells(tmp_path, TABLE.replace(old, new), given), with_data=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["", "--model deit_tiny_patch16_224"])
def test_a_backbone_in_a_file(whole: Path, pairs: Path, tmp_path: Path, model: str) -> None:
    """Given in flags: it must be there. Without --model the file says what is built, narrower than timm's model."""
    file = whole / "out" / "toy" / "body" / "seed-0" / "checkpoint.pth"
    trained = last_line(whole / "out" / "toy" / "head")["n_parameters"]
    head, gone = (
        cells(
            tmp_path,
            TABLE.replace("    backbone: body\n", "").replace(
                "--channels 8", f"--channels 8 --backbone {path} {model}"
            ),
            Given(data={"": str(pairs)}),
        )[0]
        for path in (file, tmp_path / "none.pth")
    )
    assert head.has_backbone and f"--backbone {file}" in " ".join(head.flags)
    assert (plan.check([head], with_data=True)["head"].parameters == trained) == (not model)
    with pytest.raises(UserError, match=r"row head: --backbone /.*none\.pth: no such file"):
        plan.check([gone], with_data=True)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """What the run takes from its backbone is no difference, nor where the folder of all runs lies."""
    head, _ = cells(tmp_path)
    head.path.mkdir(parents=True)
    assert isinstance(head.args, Settings)
    filled: dict[str, Any] = {"model": "deit_tiny_patch16_224", "model_kwargs": {"depth": 4}, "in_chans": 1}
    filled |= {"class_names": ["a", "b"], "mean": [0.5], "std": [0.5], "remedy": ["gfsa@0"]}
    there = replace(head.args, **filled, backbone="elsewhere/toy/body/seed-0/checkpoint.pth")
    config.write_args(there, head.path / "args.yaml")
    head.check()
    for change, words in (
        ({"backbone": "elsewhere/toy/other/seed-0/checkpoint.pth"}, "--backbone toy/other/seed-0"),
        ({"lr": 0.5}, "--lr 0.5"),
        ({"map_layers": [0, 1, 2, 3]}, "--map-layers"),
        ({"resize": []}, "--resize"),
        ({"clip_grad": 7.0}, "--clip-grad 7.0"),
        ({"reg": ["patch.cosine@last=0.5"]}, "--reg"),
    ):
        config.write_args(replace(there, **change), head.path / "args.yaml")
        with pytest.raises(UserError, match=f"holds a run with {words}.*toy.yaml says "):
            head.check()
    config.write_args(cells(tmp_path)[1].args, head.path / "args.yaml")
    with pytest.raises(UserError, match=r"holds no run of segmentation .*unknown key.*: move it away, or give"):
        head.check()


def test_an_estimate(whole: Path, pairs: Path, tmp_path: Path) -> None:
    """12 steps of 4 crops on 2 processes at 10 crops/s; as many parameters as the run has trained."""
    head, body = cells(tmp_path, given=Given(data={"": str(pairs)}))
    sizes = plan.check([head, body], with_data=True, processes=2)
    told = plan.estimate([head, body], sizes, 10)[0]
    assert told.hours == pytest.approx(12 * 4 * 2 / 10 / 3600)
    assert sizes["head"].parameters == last_line(whole / "out" / "toy" / "head")["n_parameters"]


def test_a_report_is_on_the_images_of_the_backbone(whole: Path, tmp_path: Path) -> None:
    """As that was trained on them; segmentation's own are no classes of images."""
    text = TABLE.replace("title:", "report: {metrics: [patch.cosine_abs], images: 8}\ntitle:")
    head, body = cells(tmp_path, text, Given(data={"FOLDER": "/f"}))
    shutil.copytree(whole / "out" / "toy" / "body", body.path.parent)
    options = read_report_options(head.report_command(tmp_path / "report")[3:])
    assert options.words == [f"head={head.folder}/checkpoint.pth"] and options.images == 8
    assert (options.args.data_set, options.args.data_path, options.args.device) == ("DIGITS", None, "cpu")


def test_jobs_are_submitted_when_their_backbone_is_there(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[list[str]] = []

    def submit(words: list[str], **rest: Any) -> subprocess.CompletedProcess[str]:
        submitted.append(words)
        return subprocess.CompletedProcess(words, 0, "submitted job 7; logs in x\n", "")

    monkeypatch.setattr(slurm.subprocess, "run", submit)
    head, body = cells(tmp_path)
    assert slurm.submit([head], 4, "--partition gpu") == {} and not submitted
    assert "head, seed 0: waits for its backbone body; the same command later submits it" in capsys.readouterr().out
    shutil.copytree(whole / "out" / "toy" / "body", body.path.parent)
    assert slurm.submit([head], 4, "--partition gpu") == {}
    start = ["script/run_with_submitit.py", "--program", "segmentation", "--ngpus", "4", "--job-name", "toy-head-0"]
    assert submitted == [[sys.executable, *start, "--partition", "gpu", "--", *head.flags]]
