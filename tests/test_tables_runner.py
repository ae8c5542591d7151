"""The runner of tables: side by side, kept, resumed, failed, stopped; with a program that stands for main.py."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import executable

from errors import UserError
from options import config
from redundancy.options import read_options
from state.lock import TAKEN_WORDS as TAKEN
from state.lock import is_locked
from tables import evidence, plan, record, runner, slurm
from tables.cells import Cell, cells_of
from tables.evidence import ROOT, read_log
from tables.reading import read_table
from tables.runner import Runner
from tables.slots import Slot, make_slots
from tables.spec import Given

# Stands for main.py: writes an epoch a moment, notes when it begins and ends, and does as the row's name says.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

flags = sys.argv[1:]
folder = Path(flags[flags.index("--output_dir") + 1])
row, seed = folder.parent.name, int(flags[flags.index("--seed") + 1])
notes, log = Path(os.environ["NOTES"]), folder / "log.txt"

def note(word):
    with open(notes, "a") as file:
        file.write(json.dumps([word, row, seed, os.environ.get("CUDA_VISIBLE_DEVICES", "")]) + chr(10))

note("begin")
done = len(log.read_text().splitlines()) if log.exists() else 0
if row == "bad":
    print("some words")
    print("main.py: error: nothing works here")
    sys.exit(1)
if row == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
for epoch in range(done, 2):
    if row == "slow" and epoch == 1 and "HURRY" not in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        note("ready")
        sys.exit(75 if signal.sigtimedwait([signal.SIGTERM], 60) else 1)
    time.sleep(0.2)
    with open(log, "a") as file:
        file.write(json.dumps({"epoch": epoch, "test_acc1": 90 + seed + epoch, "n_parameters": 7}) + chr(10))
    print(f"Epoch {epoch + 1}/2  [10/10]  eta 0:00:00  {4 + epoch}.00 it/s  loss 1")
    if row == "short":
        break
note("end")
"""
TABLE = """\
title: Made up
seeds: 2
baseline: ROW
flags: --epochs 2 --batch-size 8
columns: [top1, parameters, images_per_second, hours]
rows:
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program notes what it does; it takes main.py's place."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr(runner, "PAUSE", 0.02)
    monkeypatch.setattr(runner, "interpreter", lambda command: [sys.executable, str(program), *command[2:]])
    (tmp_path / "notes").touch()
    return tmp_path / "notes"


def made(tmp_path: Path, *rows: str, **keys: int) -> list[Cell]:
    """The cells of a table with these rows."""
    path = tmp_path / "made.yaml"
    text = TABLE.replace("ROW", rows[0]) + "".join(f"  {row}: {{config: configs/digits.yaml}}\n" for row in rows)
    path.write_text(text)
    table = read_table(path, **keys)
    return cells_of(table, table.rows, tmp_path / "out")


def noted(notes: Path) -> list[list[Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()]


def finish(all_cells: list[Cell], jobs: int = 1, **rest: Any) -> Runner:
    found = Runner(all_cells, 1, [Slot() for _ in range(jobs)], **rest)
    found.run()
    return found


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_at_a_time_and_seed_by_seed(tmp_path: Path, notes: Path, jobs: int) -> None:
    ended: list[str] = []
    found = finish(made(tmp_path, "one", "two", "three"), jobs, after_cell=lambda cell: ended.append(cell.name))
    assert not found.failed and len(ended) == 6
    at_once = most = 0
    for word, *_ in noted(notes):
        at_once += {"begin": 1, "end": -1}[word]
        most = max(most, at_once)
    assert most == jobs
    begun = [(row, seed) for word, row, seed, _ in noted(notes) if word == "begin"]
    assert [seed for _, seed in begun[:3]] == [0, 0, 0]  # an early end leaves whole comparisons
    if jobs == 1:
        assert begun == [(row, seed) for seed in (0, 1) for row in ("one", "two", "three")]


def test_what_a_run_cost_is_written_down(tmp_path: Path, notes: Path) -> None:
    """The median of 4 and 5 steps a second, of 8 images each; 2 epochs of 10 steps."""
    all_cells = made(tmp_path, "one")
    finish(all_cells)
    cost = json.loads((all_cells[0].path / "cost.json").read_text())
    assert cost["images_per_second"] == pytest.approx(8 * 4.5)
    assert cost["hours"] == pytest.approx((10 / 4 + 10 / 5) / 3600)
    assert cost["processes"] == 1 and "logical cores" in cost["processor"]


def test_finished_cells_are_kept_and_broken_ones_go_on(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_cells = made(tmp_path, "one", "two")
    finish(all_cells)
    begun = len(noted(notes))
    finish(all_cells)
    assert len(noted(notes)) == begun
    assert "4 cells: 4 finished before, 0 to run" in capsys.readouterr().out
    log = all_cells[0].path / "log.txt"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    (all_cells[0].path / "cost.json").unlink()
    finish(all_cells)
    assert [note[:3] for note in noted(notes)[begun:]] == [["begin", "one", 0], ["end", "one", 0]]
    assert [line["epoch"] for line in read_log(all_cells[0].path)] == [0, 1]


def test_a_failing_cell_is_named_and_the_others_go_on(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_cells = made(tmp_path, "one", "bad", "killed", "short", "two", seeds=1)
    found = finish(all_cells)
    assert found.failed == {
        "bad, seed 0": "ended with exit code 1: main.py: error: nothing works here",
        "killed, seed 0": "ended with signal 9: it printed nothing",
        "short, seed 0": "1 of 2 epochs are done, and main.py ended",
    }
    assert [cell.row.name for cell in all_cells if cell.finished] == ["one", "two"]
    assert "bad, seed 0: FAILED: ended with exit code 1: main.py: error: nothing" in capsys.readouterr().out
    page = record.pages(all_cells[0].table, all_cells, "")["md"]
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert "| failed |" in lines["bad"] and "| failed |" in lines["killed"] and "| 91.00 |" in lines["one"]
    assert all_cells[1].why_failed.startswith("ended with exit code 1")
    (tmp_path / "program.py").write_text(PROGRAM.replace('row == "bad"', "False"))
    assert "bad, seed 0" not in finish(all_cells).failed and not all_cells[1].why_failed


HEADS = """\
  head: {program: segmentation, config: configs/segmentation/digits.yaml, backbone: BODY, baseline: head, flags: F}
  other: {program: segmentation, config: configs/segmentation/digits.yaml, backbone: one, baseline: head, flags: F}
""".replace("flags: F", "flags: --iterations 2 --eval-interval 1")


def with_heads(tmp_path: Path, body: str) -> list[Cell]:
    """The cells of two rows of main.py, and of two of segmentation that stand before them."""
    table = made(tmp_path, body, "one")[0].table
    text = Path(table.path).read_text().replace("rows:\n", f"rows:\n{HEADS.replace('BODY', body)}")
    Path(table.path).write_text(text)
    return cells_of(read_table(table.path), read_table(table.path).rows, tmp_path / "out")


@pytest.mark.parametrize("jobs", [1, 3])
def test_segmentation_begins_when_its_backbone_is_finished(tmp_path: Path, notes: Path, jobs: int) -> None:
    """Each seed on that of its own, wherever the rows stand; nothing else is held up."""
    all_cells = with_heads(tmp_path, "two")
    assert not finish(all_cells, jobs).failed and all(cell.finished for cell in all_cells)
    order = [note[:3] for note in noted(notes)]
    for head, body in (("head", "two"), ("other", "one")):
        for seed in (0, 1):
            assert order.index(["end", body, seed]) < order.index(["begin", head, seed])
    if jobs == 1:
        assert [row for word, row, _ in order if word == "begin"] == ["two", "head", "one", "other"] * 2


def test_what_stands_on_a_failed_backbone_is_named(tmp_path: Path, notes: Path) -> None:
    all_cells = with_heads(tmp_path, "bad")
    found = finish(all_cells)
    for seed in (0, 1):
        said = found.failed[f"head, seed {seed}"]
        assert said == f"not run: its backbone (bad, seed {seed}) is not finished"
        assert f"bad, seed {seed}" in found.failed
    assert len(found.failed) == 4 and [cell.row.name for cell in all_cells if cell.finished] == ["other", "one"] * 2
    page = record.pages(all_cells[0].table, all_cells, "")["md"]
    assert re.search(r"^\| head \| 0 of 2 \| failed", page, re.MULTILINE)
    (tmp_path / "program.py").write_text(PROGRAM.replace('row == "bad"', "False"))
    assert not finish(all_cells).failed and not all_cells[0].why_failed


def test_a_failed_cell_of_a_row_leaves_the_rest_of_the_row(tmp_path: Path, notes: Path) -> None:
    """Its mean says of how many seeds it is."""
    (tmp_path / "program.py").write_text(PROGRAM.replace('row == "bad"', 'row == "one" and seed == 1'))
    all_cells = made(tmp_path, "one", "two")
    finish(all_cells)
    page = record.pages(all_cells[0].table, all_cells, "")["md"]
    assert "| one | 1 of 2 | 91.00 |" in page and "| two | 2 of 2 | 91.50 ± 0.71 | 0.00 (1 pairs) ° |" in page


def test_a_signal_lets_runs_save_and_stop(tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing new begins, nothing counts as failed, and the next runner goes on."""
    all_cells = made(tmp_path, "slow", "other")

    def stop() -> None:
        while not any(word == "ready" for word, *_ in noted(notes)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    found = finish(all_cells)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert (found.stopped, found.failed) == (signal.SIGTERM, {})
    assert "stopping: the runs finish their step and save" in capsys.readouterr().out
    assert [row for word, row, *_ in noted(notes) if word == "begin"] == ["slow"]
    os.environ["HURRY"] = "1"
    try:
        assert not finish(all_cells).failed and all(cell.finished for cell in all_cells)
    finally:
        del os.environ["HURRY"]


def test_a_signal_while_a_run_starts_reaches_it(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = runner.start

    def interrupted(*arguments: Any) -> Any:
        process = start(*arguments)
        while not any(word == "ready" for word, *_ in noted(notes)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(runner, "start", interrupted)
    found = finish(made(tmp_path, "slow", "other"))
    assert (found.stopped, found.failed) == (signal.SIGTERM, {})
    assert [row for word, row, *_ in noted(notes) if word == "begin"] == ["slow"]


class Interrupting(io.RawIOBase):
    """A stream during whose second write a signal comes."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, text: Any) -> int:
        self.written.append(bytes(text))
        if len(self.written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return len(text)


def test_a_signal_in_the_middle_of_a_line(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream can be used again while it writes."""
    raw = Interrupting()
    monkeypatch.setattr(runner, "SHOWN", (0.0, 0.0))
    with io.TextIOWrapper(io.BufferedWriter(raw), write_through=True) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        found = finish(made(tmp_path, "one", "two"))
        written = b"".join(raw.written).decode()
    assert found.stopped == signal.SIGTERM and not found.failed
    assert written.count("stopping: the runs finish their step and save") == 1


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[Any]:
    """Starts a process that holds the lock of a folder, as main.py does."""
    started: list[subprocess.Popen[str]] = []

    def hold(folder: Path) -> subprocess.Popen[str]:
        folder.mkdir(parents=True)
        command = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def test_a_cell_that_an_earlier_run_still_trains_is_waited_for(
    tmp_path: Path, notes: Path, holder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SHOWN", (0.05, 0.05))
    all_cells = made(tmp_path, "one", "two", seeds=1)
    process = holder(all_cells[0].path)

    def release() -> None:
        while not all_cells[1].finished:
            time.sleep(0.02)
        time.sleep(0.3)
        process.kill()

    thread = threading.Thread(target=release)
    thread.start()
    finish(all_cells)
    thread.join()
    assert [row for word, row, *_ in noted(notes) if word == "begin"] == ["two", "one"]
    assert "waiting for one, seed 0, which an earlier run is still training" in capsys.readouterr().out


def test_a_run_that_took_the_folder_first_is_waited_for(tmp_path: Path, notes: Path) -> None:
    """It began between the look at the lock and main.py's own: main.py ends with its message, and comes again."""
    refuse = 'if not (folder / "second").exists():\n    (folder / "second").touch()\n'
    refuse += f'    print("main.py: error: {TAKEN} --output_dir x: wait for its end")\n    sys.exit(2)\n'
    program = PROGRAM.replace('note("begin")\n', 'note("begin")\n' + refuse)
    (tmp_path / "program.py").write_text(program)
    all_cells = made(tmp_path, "one", seeds=1)
    assert not finish(all_cells).failed and all_cells[0].finished
    assert [word for word, *_ in noted(notes)] == ["begin", "begin", "end"]


def test_the_reason_is_that_of_this_attempt(tmp_path: Path, notes: Path) -> None:
    """Not of an earlier one, nor the words of torchrun's report behind main.py's own."""
    behind = 'print("  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html")'
    (tmp_path / "program.py").write_text(PROGRAM.replace("    sys.exit(1)", f"    {behind}\n    sys.exit(1)"))
    killed, bad = made(tmp_path, "killed", "bad", seeds=1)
    killed.path.mkdir(parents=True)
    (killed.path / "output.txt").write_text(f"main.py: error: {TAKEN} --output_dir x\n")
    found = finish([killed, bad])
    assert found.failed["killed, seed 0"] == "ended with signal 9: it printed nothing"
    assert found.failed["bad, seed 0"] == "ended with exit code 1: main.py: error: nothing works here"


def test_a_run_that_is_always_refused_fails_in_the_end(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MOST_MEETINGS", 2)
    refuse = f'print("main.py: error: {TAKEN} --output_dir x")\nsys.exit(2)\n'
    (tmp_path / "program.py").write_text(
        PROGRAM.replace('note("end")\n', "").replace("done = len", f"{refuse}done = len")
    )
    found = finish(made(tmp_path, "one", seeds=1))
    assert TAKEN in found.failed["one, seed 0"] and len(noted(notes)) == 3


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path: Path, notes: Path) -> None:
    def after_cell(cell: Cell) -> None:
        raise UserError("cannot write to out: no space")

    all_cells = made(tmp_path, "one", "two", seeds=1)
    found = finish(all_cells, after_cell=after_cell)
    assert all(cell.finished for cell in all_cells) and found.trouble == "cannot write to out: no space"


@pytest.mark.parametrize("name", [evidence.OUTPUT, evidence.COST, evidence.BAD_END])
def test_a_folder_that_cannot_be_written_to_fails_alone(tmp_path: Path, notes: Path, name: str) -> None:
    """Also a full disk: what cannot be written of one run does not end the others."""
    bad, other = made(tmp_path, "one", "two", seeds=1)
    (bad.path / name).mkdir(parents=True)
    found = finish([bad, other], jobs=2)
    assert other.is_done and list(found.failed) == [bad.name]
    assert "cannot go on: [Errno 21] Is a directory: " in found.failed[bad.name]


def test_other_epochs_than_the_tables_are_no_result(tmp_path: Path, notes: Path) -> None:
    """A run that is being continued is not finished, and its old cost and report are gone when it begins."""
    all_cells = made(tmp_path, "one", seeds=1)
    finish(all_cells)
    (cell,) = all_cells
    log = cell.path / "log.txt"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert not cell.finished and "| not run |" in record.pages(cell.table, all_cells, "")["md"]
    (tmp_path / "program.py").write_text(PROGRAM.replace('row == "bad"', "True"))
    finish(all_cells)
    assert not (cell.path / "cost.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.txt", b"null\n", "is no log of a run: a line is no JSON object"),
        ("log.txt", b'{"epoch": 0}\n{"epo', "is no log of a run"),
        ("log.txt", b"\xff\xfe", "is no log of a run"),
        ("cost.json", b"3", "holds no JSON object: remove it"),
        ("cost.json", b"{", "cannot be read"),
        ("report.json", b"[]", "holds no JSON object"),
        ("report.json", b'{"models": []}', "is no redundancy report of a table"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, notes: Path, name: str, content: bytes, message: str) -> None:
    all_cells = made(tmp_path, "one", seeds=1)
    finish(all_cells)
    (cell,) = all_cells
    (cell.path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        evidence.read_log(cell.path), evidence.read_report(cell.path), evidence.read_object(cell.path / "cost.json")


def test_gpus_are_shared_out(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.devices for slot in make_slots(2, 4, "auto")] == ["0,1,2,3", "4,5,6,7"]
    assert [slot.devices for slot in make_slots(3, 2, "auto")] == ["0,1", "2,3", "4,5"]
    assert [slot.devices for slot in make_slots(2, 4, "cpu")] == ["", ""]
    with pytest.raises(UserError, match="--jobs 3 runs of --nproc 4 processes need 12 GPUs, and there are 8"):
        make_slots(3, 4, "auto")
    assert make_slots(1, 1, "cuda:1")[0].devices == ""
    with pytest.raises(UserError, match="--device cuda:1 is one GPU, and --jobs 2 runs need one each"):
        make_slots(2, 1, "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,-1,5")  # CUDA itself sees those before the -1
    with pytest.raises(UserError, match="need 3 GPUs, and there are 2"):
        make_slots(3, 1, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    slots = make_slots(2, 1, "auto")
    monkeypatch.setattr(runner, "machine", dict)
    Runner(made(tmp_path, "one", "two", seeds=1), 1, slots).run()
    assert {devices for _, _, _, devices in noted(notes)} == {"5", "7"}


def test_the_time_left_is_that_of_the_epochs_left(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at a time, each with an epoch in 10 seconds: 6 more epochs take 30."""
    all_cells = made(tmp_path, "one", "two")
    monkeypatch.setattr(runner.time, "monotonic", lambda: 110.0)
    slots = [Slot(cell=cell, began=100.0) for cell in all_cells[:2]]
    found = Runner(all_cells, 1, slots)
    assert found._left() == "time left unknown yet"
    for cell in all_cells[:2]:
        cell.path.mkdir(parents=True)
        (cell.path / "log.txt").write_text('{"epoch": 0}\n')
    assert found._left() == "about 0:00:30 left"


def test_an_epoch_of_another_program_takes_another_time(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of main.py's in 10 seconds say nothing of segmentation. When one of that took 10, too: 3 more take 30,
    2 of main.py's 10; with two at a time half of it."""
    all_cells = with_heads(tmp_path, "two")
    head, _, two, _ = all_cells[:4]
    slots = [Slot(cell=two, began=100.0), Slot()]
    monkeypatch.setattr(runner.time, "monotonic", lambda: 110.0)
    found = Runner([head, two, all_cells[4], all_cells[6]], 1, slots)
    two.path.mkdir(parents=True)
    (two.path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    assert found._left() == "time left unknown yet"
    slots[1].cell, slots[1].began = head, 100.0
    head.path.mkdir(parents=True)
    (head.path / "log.txt").write_text('{"epoch": 0}\n')
    assert found._left() == "about 0:00:20 left"


def test_a_report_is_of_the_runs_own_data_and_weights(tmp_path: Path) -> None:
    """python -m redundancy reads the command; what a report of another table holds is measured again beside it."""
    path = tmp_path / "made.yaml"
    report = "report: {metrics: [patch.cosine_abs], images: 16}\n"
    path.write_text(TABLE.replace("ROW", "one") + "  one: {config: configs/deit_tiny.yaml}\n" + report)
    table = read_table(path, seeds=1)
    (cell,) = cells_of(table, table.rows, tmp_path / "out", Given(("--fast-resize",), {"": "/images"}))
    options = read_options(cell.report_command(tmp_path / "report")[3:])
    assert options.words == [f"one={cell.folder}/checkpoint.pth"] and options.metrics == ["patch.cosine_abs"]
    assert (options.images, options.args.weights, options.args.data_path) == (16, "raw", "/images")
    assert options.args.fast_resize and options.args.data_set == "IMNET"
    cell.path.mkdir(parents=True)
    model = {"findings": {"attn.std": {}}, "gaps": {"attn.entropy": "no map"}}
    for images, metrics in ((16, ["attn.std", "attn.entropy", "patch.cosine_abs"]), (99, ["patch.cosine_abs"])):
        about = {"command": f"python -m redundancy x --images {images}"}
        (cell.path / "report.json").write_text(json.dumps({"about": about, "models": [model]}))
        assert not cell.reported and cell.missing == ["patch.cosine_abs"]
        assert read_options(cell.report_command(tmp_path / "report")[3:]).metrics == metrics


# ------------------------------------------------------------------------------------------------------------
# Checks before anything runs


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    all_cells = made(tmp_path, "one")
    cell = all_cells[0]
    cell.check()
    cell.path.mkdir(parents=True)
    config.write_args(cell.args, cell.path / "args.yaml")
    cell.check()
    other = config.resolve(["--config", str(ROOT / "configs/digits.yaml"), "--epochs", "3"])
    config.write_args(other, cell.path / "args.yaml")
    with pytest.raises(UserError, match=r"holds a run with --batch-size 32, and .*made\.yaml says 8: move it away"):
        cell.check()


def test_what_a_run_fills_in_is_no_difference(tmp_path: Path) -> None:
    """Class names and the preprocessing of images are written to args.yaml, and nobody gave them."""
    cell = made(tmp_path, "one")[0]
    cell.path.mkdir(parents=True)
    filled = replace(cell.args, class_names=["a", "b"], mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0)
    config.write_args(filled, cell.path / "args.yaml")
    cell.check()
    more = replace(cell.args, reg=["patch.cosine@last=0.5"])
    config.write_args(more, cell.path / "args.yaml")
    with pytest.raises(UserError, match=r"holds a run with --reg \['patch.cosine@last=0.5'\], and .* says \[\]"):
        cell.check()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{config: configs/none.yaml}", "row new: cannot read --config"),
        ("{config: configs/digits.yaml, flags: --epoch 3}", "row new: .*Did you mean --epochs"),
        ("{config: configs/digits.yaml, flags: --reg patch.cosin=1}", "row new: .*patch.cosin"),
        ("{config: configs/digits.yaml, flags: --model deit_tiny_patch16_225}", "row new: unknown model"),
        ("{config: configs/digits.yaml, flags: --reg patch.cosine@12=1}", "row new: .*12"),
        ("{config: configs/digits.yaml, flags: --remedy gfsa@40}", "row new: .*40"),
        ("{config: configs/deit_tiny.yaml, flags: --data-set CIFAR}", "row new: .*data-path"),
    ],
)
def test_rows_are_checked_before_anything_starts(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(TABLE.replace("ROW", "one") + f"  one: {{config: configs/digits.yaml}}\n  new: {row}\n")
    table = read_table(path, seeds=1)
    with pytest.raises(UserError, match=f"made.yaml, line 8: {message}"):
        plan.check(cells_of(table, table.rows, tmp_path / "out"), with_data=True)


def test_an_estimate_by_what_was_measured(tmp_path: Path, notes: Path) -> None:
    """Hours of 1,437 images and 2 epochs at 36 images/s; twice the blocks take about twice the time."""
    path = tmp_path / "made.yaml"
    rows = "  one: {config: configs/digits.yaml}\n"
    rows += "  deep: {config: configs/digits.yaml, flags: --model-kwargs depth=24}\n"
    path.write_text(TABLE.replace("ROW", "one") + rows)
    table = read_table(path, seeds=1)
    all_cells = cells_of(table, table.rows, tmp_path / "out")
    sizes = plan.check(all_cells, with_data=False)
    unknown = plan.estimate(all_cells, sizes, None)
    assert [each.hours for each in unknown] == [None, None] and "give --images-per-second" in plan.describe(unknown)
    told = plan.estimate(all_cells, sizes, 100)
    assert told[0].hours == pytest.approx(2 * 1437 / 100 / 3600) and told[0].basis == "--images-per-second"
    finish(all_cells[:1])
    one, deep = plan.estimate(all_cells, sizes, None)
    assert one.hours == pytest.approx(2 * 1437 / 36 / 3600) and one.basis == "a finished run"
    assert one.hours is not None and deep.hours is not None and 1.9 < deep.hours / one.hours < 2.05
    assert deep.basis == "a finished run of one, by the forward pass's work"
    assert sizes["one"].parameters == 615_626  # what main.py prints
    block = 12 * 17 * 64**2 + 2 * 17**2 * 64  # multiplications of 17 tokens, 64 wide: qkv, proj, MLP; attention
    assert sizes["one"].flops == 2 * (12 * block + 16 * 192 * 64 + 64 * 10)  # and patches, head
    assert sizes["one"].disk == 3 * 3 * 4 * 615_626  # weights and two moments in float32, in three files


# ------------------------------------------------------------------------------------------------------------
# SLURM


def test_jobs_are_submitted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through run_with_submitit.py itself; a job that waits is not submitted again, one that is gone is."""
    pytest.importorskip("submitit", reason="needs submitit: pip install -r requirements-submitit.txt")
    executable(tmp_path / "bin" / "sbatch", '#!/bin/sh\necho "Submitted batch job 4242"\n')
    executable(tmp_path / "bin" / "srun", "#!/bin/sh\nexit 1\n")
    executable(tmp_path / "bin" / "squeue", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked; cat {tmp_path}/queue\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    queue = tmp_path / "queue"
    queue.write_text("")
    all_cells = made(tmp_path, "one", seeds=1)
    assert slurm.submit(all_cells, 0, "--partition gpu") == {}
    assert (all_cells[0].path / "job.txt").read_text() == "4242\n"
    queue.write_text("4242 gpu made-one-0 PENDING\n")
    slurm.submit(all_cells, 0, "--partition gpu")
    said = capsys.readouterr().out
    assert "one, seed 0: job 4242\n" in said and "one, seed 0: job 4242 is in the queue" in said
    assert (tmp_path / "asked").read_text().split() == ["--noheader", "--jobs", "4242"]
    queue.write_text("")
    slurm.submit(all_cells, 0, "--partition gpu")
    assert "one, seed 0: job 4242 ended at epoch 0 of 2; logs in " in capsys.readouterr().out
    scripts = list((all_cells[0].path / "submitit").rglob("*.sh"))
    assert (
        scripts
        and "--job-name=made-one-0" in scripts[0].read_text()
        and "--partition=gpu" in scripts[0].read_text()
    )


def test_what_sbatch_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    failed = slurm.submit(made(tmp_path, "one", seeds=1), 1, "--partition gpu")
    assert "no sbatch and srun on PATH" in failed["one, seed 0"]


def test_a_job_that_has_ended_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its epochs are in the log, and its own output says what it cost."""
    executable(tmp_path / "bin" / "squeue", "#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (cell,) = made(tmp_path, "one", seeds=1)
    (cell.path / "submitit" / "4242").mkdir(parents=True)
    (cell.path / "job.txt").write_text("4242\n")
    (cell.path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1, "test_acc1": 91}\n')
    said = "Epoch 1/2  [10/10]  eta 0:00:00  4.00 it/s\nEpoch 2/2  [10/10]  eta 0:00:00  4.00 it/s\n"
    (cell.path / "submitit" / "4242" / "4242_0_log.out").write_text(said)
    assert slurm.submit([cell], 2, "") == {} and cell.finished
    cost = json.loads((cell.path / "cost.json").read_text())
    assert (cost["images_per_second"], cost["processes"]) == (2 * 8 * 4, 2)


def test_a_lock_of_another_process_is_seen(tmp_path: Path, holder: Any) -> None:
    process = holder(tmp_path / "run")
    assert is_locked(tmp_path / "run") and not is_locked(tmp_path / "none")
    process.kill()
    process.wait()
    assert not is_locked(tmp_path / "run")
    with open(tmp_path / "run" / ".lock", "rb+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
