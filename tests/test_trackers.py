"""Trackers of --log-with, read back by other programs than wrote them; and summary.csv, against timm's own."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import random
import re
import signal
import sqlite3
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import forks
import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState, tracking
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE
from small_runs import FLAGS, assert_same, make_images, saved, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.utils import update_summary

from errors import Interrupted, UserError
from loggers.backends import BACKENDS, _is_installed, check_packages, flattened, spelled
from loggers.summary import SUMMARY, Summary
from loggers.trackers import BOOK, Book, Had, Trackers, _be_alone, read_book
from options import config

ROOT = Path(__file__).parents[1]
TERMS = ["--reg", "patch.contrastive:tau=0.5@first:last=0.5", "--measure", "patch.cosine:abs@0,last"]
REAL = ("tensorboard", "trackio", "wandb", "mlflow")
TESTED = [
    pytest.param(name, marks=pytest.mark.skipif(not _is_installed(name), reason=f"needs the package {name}"))
    for name in REAL
]
Numbers = dict[str, dict[int, list[float]]]  # of each name, by step, all that were logged


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def expected(folder: Path, name: str = "wandb") -> Numbers:
    """What a tracker should have: each number of log.txt, once."""
    spelled_out = (("@", " at "), (":", " colon "), (",", " comma "), ("=", " is "))
    words = spelled_out if name == "mlflow" else ()
    numbers: Numbers = defaultdict(dict)
    for record in records(folder):
        for key, value in record.items():
            for char, word in words:
                key = key.replace(char, word)
            numbers[key][record["epoch"]] = [value]
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Readers


def in_tensorboard(folder: Path) -> Numbers:
    (run,) = (folder / "tensorboard").iterdir()
    return events(run)


def events(run: Path) -> Numbers:
    reader = EventAccumulator(str(run))
    reader.Reload()
    numbers: Numbers = {}
    for tag in reader.Tags()["scalars"]:
        numbers[tag] = defaultdict(list)
        for event in reader.Scalars(tag):
            numbers[tag][event.step].append(event.value)
    return numbers


def in_trackio(folder: Path) -> Numbers:
    (path,) = (folder / "trackio").glob("*.db")
    numbers: Numbers = defaultdict(lambda: defaultdict(list))
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
    connection.close()
    assert len({run for run, _, _ in rows}) == 1
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            numbers[name][step].append(value)
    return numbers


def in_wandb(folder: Path) -> Numbers:
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1 and len(files) == 2  # one run, of two processes
    numbers: Numbers = defaultdict(lambda: defaultdict(list))
    for record in (record for path in files for record in wandb_records(path)):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                (name,) = item.nested_key
                if not name.startswith("_"):
                    numbers[name][record.history.step.num].append(json.loads(item.value_json))
    return numbers


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of wandb's own file: LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def in_mlflow(folder: Path) -> Numbers:
    """By MLflow's client, in a process of its own: its imports warn."""
    program = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("diverse-vit")
(run,) = client.search_runs([experiment.experiment_id])
names = run.data.metrics
print(json.dumps({n: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, n)] for n in names}))
"""
    words = [sys.executable, "-W", "ignore", "-c", program, f"sqlite:///{folder / 'mlflow.db'}"]
    output = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    numbers: Numbers = defaultdict(lambda: defaultdict(list))
    for name, pairs in json.loads(output.splitlines()[-1]).items():
        for step, value in pairs:
            numbers[name][step].append(value)
    return numbers


READERS = {"tensorboard": in_tensorboard, "trackio": in_trackio, "wandb": in_wandb, "mlflow": in_mlflow}


# ------------------------------------------------------------------------------------------------------------
# Whole runs with real trackers, in processes of their own


def environment(home: Path) -> dict[str, str]:
    """A user's, without accounts."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    new = {"HOME": str(home), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**own, **new, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def continued(images, tmp_path_factory) -> Path:
    """The folder of a run that a signal has stopped and a second process has finished, with all real trackers."""
    folder = tmp_path_factory.mktemp("runs") / "some run"
    env = environment(tmp_path_factory.mktemp("home"))
    words = [sys.executable, str(ROOT / "main.py"), *FLAGS, *TERMS, "--data-path", str(images), "--num_workers"]
    words += ["1", "--output_dir", str(folder), "--log-with", *(name for name in REAL if _is_installed(name))]
    current = tmp_path_factory.mktemp("current")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": current, "env": env}
    with subprocess.Popen([*words, "--epochs", "1000"], **pipes) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("Epoch 2/"):
                run.send_signal(signal.SIGTERM)
                break
        _, error = run.communicate(timeout=PATIENCE)
    assert run.returncode == 75, error
    epochs = str(len(records(folder)) + 1)
    again = subprocess.run([*words, "--epochs", epochs, "--resume", "auto"], timeout=PATIENCE, check=False, **pipes)
    assert again.returncode == 0, again.stderr
    assert "warning: --log-with" not in again.stdout and list(current.iterdir()) == []
    return folder


@pytest.mark.parametrize("name", TESTED)
def test_each_epoch_is_there_once_with_the_logs_numbers(continued, name):
    """Of a run that was stopped by a signal (exit code 75) and continued."""
    found, wanted = READERS[name](continued), expected(continued, name)
    assert len(records(continued)) >= 2
    if name == "tensorboard":  # holds float32
        wanted = {
            key: {step: [float(np.float32(value)) for value in values] for step, values in steps.items()}
            for key, steps in wanted.items()
        }
    assert {key: dict(steps) for key, steps in found.items()} == wanted
    assert any("test_patch.cosine" in key and "abs" in key for key in found)


def test_the_flags_are_stored(continued):
    """By TensorBoard's tracker in its YAML file, by wandb's in its own."""
    (path,) = (continued / "tensorboard").glob("*/*/hparams.yml")  # told once, though the run was continued
    flags = yaml.safe_load(path.read_text())
    assert flags["lr"] == 0.01 and flags["model_kwargs.depth"] == 2 and flags["clip_grad"] == "None"
    assert flags["reg"] == "patch.contrastive:tau=0.5@first:last=0.5" and flags["repeated_aug"] is False
    with sqlite3.connect(continued / "trackio" / "diverse-vit.db") as connection:
        ((stored,),) = connection.execute("SELECT config FROM configs").fetchall()
    connection.close()
    assert json.loads(stored)["model_kwargs.depth"] == 2


def test_several_processes_log_once(images, tmp_path):
    """And accelerate, which is asked who this process is, leaves the process group alone."""
    words = [*FLAGS, "--data-path", str(images), "--output_dir", str(tmp_path / "x"), "--epochs", "2"]
    process = forks.run(2, "main.py", *words, "--log-with", "tensorboard", env=environment(tmp_path))
    assert process.returncode == 0, process.stderr[-3000:]
    assert "2 process(es)" in process.stdout
    (run,) = tensorboard_runs(tmp_path / "x")
    assert len(list(run.glob("events*"))) == 1 and steps_of(run) == [0, 1]


def test_accelerate_touches_neither_processes_nor_devices(monkeypatch):
    """Left to itself it would open a process group here, and set the device."""
    PartialState._reset_state()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = dict(os.environ)
    _be_alone()
    assert dict(os.environ) == before and not torch.distributed.is_initialized()
    state = PartialState()
    assert state.is_main_process and state.num_processes == 1 and state.device == torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# Stopped, continued, begun anew: in this process


def steps_of(run: Path) -> list[int]:
    return [step for step, values in sorted(events(run)["train_loss"].items()) for _ in values]


def tensorboard_runs(folder: Path) -> list[Path]:
    return sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_ctime_ns)


def test_what_was_handed_over_before_a_kill_is_not_there_twice(images, tmp_path):
    """The kill came after TensorBoard had epoch 2, and before trackers.json said so."""
    flags = ["--log-with", "tensorboard"]
    assert train(images, tmp_path, "--epochs", "1", *flags) == 0
    before = (tmp_path / BOOK).read_bytes()
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto", *flags) == 0
    (tmp_path / BOOK).write_bytes(before)
    assert train(images, tmp_path, "--epochs", "3", "--resume", "auto", *flags) == 0
    (run,) = tensorboard_runs(tmp_path)
    assert steps_of(run) == [0, 1, 2]


def test_a_tracker_that_is_named_later_gets_the_epochs_before(images, tmp_path, capsys):
    assert train(images, tmp_path, "--epochs", "2") == 0
    assert not (tmp_path / BOOK).exists()
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto", "--log-with", "tensorboard") == 0
    assert "nothing to train" in capsys.readouterr().out
    (run,) = tensorboard_runs(tmp_path)
    assert steps_of(run) == [0, 1]


def test_a_fresh_run_and_one_that_goes_back_are_runs_of_their_own(images, tmp_path, capsys):
    flags = ["--log-with", "tensorboard", "--run-name", "some"]
    assert train(images, tmp_path, "--epochs", "3", *flags) == 0
    assert train(images, tmp_path, "--epochs", "3", *flags) == 0
    assert [steps_of(run) for run in tensorboard_runs(tmp_path)] == [[0, 1, 2]] * 2
    capsys.readouterr()
    back = str(tmp_path / "checkpoint.1.pth")
    assert train(images, tmp_path, "--epochs", "3", "--resume", back, "--lr", "1e-3", *flags) == 0
    assert "note: the trackers have other epochs than this run begins with" in capsys.readouterr().out
    assert [steps_of(run) for run in tensorboard_runs(tmp_path)] == [[0, 1, 2]] * 3
    assert all(run.name.startswith("some-") for run in tensorboard_runs(tmp_path))
    last = events(tensorboard_runs(tmp_path)[2])["train_lr"]
    assert last[2] == [float(np.float32(records(tmp_path)[2]["train_lr"]))]


def test_a_damaged_book_is_one_line(images, tmp_path, capsys):
    for content in (b"{", b"[]", b'{"id": "x"}', b'{"id": "x", "trackers": {"wandb": {"epoch": 1}}}', b"\xff"):
        (tmp_path / BOOK).write_bytes(content)
        with pytest.raises(UserError, match=r"trackers.json is damaged: delete it"):
            read_book(tmp_path / BOOK)
    assert train(images, tmp_path, "--epochs", "1", "--log-with", "tensorboard") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "damaged" in line


# ------------------------------------------------------------------------------------------------------------
# Trackers that misbehave


class Fake(tracking.GeneralTracker):
    """Stands in for a back-end. It draws random numbers, and fails when it is told to."""

    name = "comet_ml"
    requires_logging_directory = False
    fails_at: int | str | None = None
    seen: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.seen.append(("arguments", arguments))

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.fail_if("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append(("flags", values))

    def log(self, values: dict[str, Any], step: int | None = None, **keywords: Any) -> None:
        self.fail_if(step)
        self.seen.append(("step", step))

    def finish(self) -> None:
        self.seen.append(("finish", None))
        self.fail_if("finish")

    def fail_if(self, when: int | str | None) -> None:
        random.random(), np.random.random(), torch.rand(1)
        if when == self.fails_at:
            raise LookupError(f"no\nroute to {when}")


@pytest.fixture
def fake(monkeypatch) -> type[Fake]:
    """In place of comet_ml."""
    monkeypatch.setattr(Fake, "seen", [])
    monkeypatch.setattr(Fake, "fails_at", None)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "comet_ml", Fake)
    monkeypatch.setattr(config, "check_packages", lambda names: None)
    return Fake


def steps_seen(fake: type[Fake]) -> list[int]:
    return [value for what, value in fake.seen if what == "step"]


def test_one_that_fails_does_not_end_the_run(fake, images, tmp_path, capsys):
    fake.fails_at = 1
    flags = ["--log-with", "comet_ml", "tensorboard", "--epochs", "4"]
    assert train(images, tmp_path, *flags) == 0
    out = capsys.readouterr().out
    assert (
        out.count("warning: --log-with comet_ml fails at epoch 2: no route to 1. The run goes on without it") == 1
    )
    assert out.rstrip().endswith(
        "warning: comet_ml lacks the epochs after epoch 1 (no route to 1); the same command with --resume auto "
        "hands them over"
    )
    assert steps_seen(fake) == [0] and ("finish", None) in fake.seen and len(records(tmp_path)) == 4
    (run,) = tensorboard_runs(tmp_path)
    assert steps_of(run) == [0, 1, 2, 3]
    fake.fails_at = None
    assert train(images, tmp_path, *flags, "--resume", "auto") == 0
    assert steps_seen(fake) == [0, 1, 2, 3] and steps_of(run) == [0, 1, 2, 3]
    assert "warning: comet_ml" not in capsys.readouterr().out
    first, second = (value for what, value in fake.seen if what == "arguments")
    assert first == second and len(first["experiment_key"]) == 32


def test_one_that_does_not_start_is_one_line(fake, images, tmp_path, capsys):
    fake.fails_at = "start"
    assert train(images, tmp_path, "--log-with", "tensorboard", "comet_ml", "--epochs", "1") == 2
    shown = capsys.readouterr()
    assert "--log-with comet_ml does not start: no route to start. Export COMET_API_KEY\n" in shown.err
    assert "Epoch" not in shown.out and not (tmp_path / "checkpoint.pth").exists()


def test_one_that_does_not_close_is_a_warning(fake, images, tmp_path, capsys):
    fake.fails_at = "finish"
    assert train(images, tmp_path, "--log-with", "comet_ml", "--epochs", "1") == 0
    assert "warning: --log-with comet_ml does not close: no route to finish" in capsys.readouterr().out


@pytest.mark.parametrize(("end", "seen"), [(ZeroDivisionError, [0]), (Interrupted, [0, 1])])
def test_all_are_closed_however_a_run_ends(fake, tmp_path, end, seen):
    """An epoch that the saver stopped after is saved; that of a run that fails may not be."""
    with pytest.raises(end), Trackers(["comet_ml"], tmp_path, "p", "r", {}) as trackers:
        lines = [json.dumps({"epoch": 0, "train_loss": 1.0})]
        trackers.follow(lines, False)
        trackers.start()
        lines.append(json.dumps({"epoch": 1, "train_loss": 1.0}))
        raise end
    assert steps_seen(fake) == seen and fake.seen[-1] == ("finish", None)


def test_an_epoch_is_saved_before_it_is_handed_over(fake, images, tmp_path, monkeypatch):
    ahead = []
    monkeypatch.setattr(
        fake, "log", lambda self, values, step, **keywords: ahead.append(saved(tmp_path)["epoch"] - step)
    )
    assert train(images, tmp_path, "--log-with", "comet_ml", "--epochs", "2") == 0
    assert ahead == [0, 0]


def test_training_is_the_same_with_trackers(fake, images, tmp_path):
    flags = ["--epochs", "2", "--drop", "0.5", "--mixup", "0.8"]
    assert train(images, tmp_path / "with", *flags, "--log-with", "comet_ml", "tensorboard") == 0
    assert train(images, tmp_path / "without", *flags) == 0
    one, other = saved(tmp_path / "with"), saved(tmp_path / "without")
    for name in ("model", "model_ema", "optimizer", "log", "processes"):
        assert_same(one[name], other[name], name)


def test_the_users_variables_win(fake, tmp_path, monkeypatch):
    variable = "COMET_OFFLINE_DIRECTORY"
    for mine in (None, "/elsewhere"):
        if mine is not None:
            monkeypatch.setenv(variable, mine)
        with Trackers(["comet_ml"], tmp_path, "p", "r", {}) as trackers:
            trackers.start()
            assert os.environ[variable] == (mine or str(tmp_path / "comet_ml"))
        assert os.environ.get(variable) == mine


@pytest.mark.skipif(not _is_installed("wandb"), reason="needs the package wandb")
def test_wandb_without_an_account_is_one_line(images, tmp_path, monkeypatch, capsys):
    for variable in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # where wandb would ask
    assert train(images, tmp_path / "x", "--log-with", "wandb", "--epochs", "1") == 2
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("main.py: error: --log-with wandb does not start: ") and "Epoch" not in shown.out
    assert last.endswith(". Log in with `wandb login`, or export WANDB_MODE=offline")


# ------------------------------------------------------------------------------------------------------------
# Flags


def test_what_cannot_work_is_told_before_anything_is_created(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    argv = ["--data-set", "DIGITS", "--output_dir", str(folder), "--log-with"]
    for words, message in (
        (["tensorbord"], r"invalid choice: 'tensorbord' .*\. Did you mean tensorboard\?"),
        (["wandb", "mlfow"], r"invalid choice: 'mlfow' .* Did you mean mlflow\?"),
        (["tensorboard", "--run-name", "a/b"], r"--run-name a/b becomes the name of a folder"),
        (["tensorboard", "--run-name", ".."], r"--run-name \.\. becomes the name of a folder"),
        (["tensorboard", "--output_dir", ""], r"--log-with tensorboard writes below --output_dir: give one"),
    ):
        with pytest.raises(UserError, match=message):
            config.resolve([*argv, *words])
    (tmp_path / "c.yaml").write_text("log-with: [tensorboard, trackIO]\n")
    with pytest.raises(UserError, match=r"log_with must be one of .* not 'trackIO'\. Did you mean trackio\?"):
        config.resolve(["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text(f"log-with: [tensorboard]\noutput_dir: {folder}\n")
    assert config.resolve(["--config", str(tmp_path / "c.yaml")]).log_with == ["tensorboard"]
    assert not folder.exists()


def test_a_missing_package_is_told_with_what_to_install(tmp_path, monkeypatch):
    missing = [name for name in BACKENDS if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("needs a back-end that is not installed")
    package = BACKENDS[missing[0]].package or missing[0]
    for there in (False, True):  # also beside a folder of that name, which some of them make
        with pytest.raises(
            UserError, match=f"^--log-with {missing[0]} needs the package .*: pip install {package}$"
        ):
            config.resolve(["--data-set", "DIGITS", "--output_dir", "x", "--log-with", missing[0]])
        if not there:
            (tmp_path / missing[0]).mkdir()
            monkeypatch.chdir(tmp_path)
            monkeypatch.syspath_prepend(str(tmp_path))
    check_packages([])


def test_a_mistyped_name_is_answered_before_anything_slow_is_imported():
    program = (
        "import sys; from options.flags import answer_at_once\n"
        "try: answer_at_once(['--log-with', 'wandbe'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'accelerate', 'wandb'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert run.stdout == "2 set()\n" and "Did you mean wandb or swanlab? --help" in run.stderr


def test_accelerate_knows_these_trackers():
    assert set(BACKENDS) == set(tracking.LOGGER_TYPE_TO_CLASS)


# ------------------------------------------------------------------------------------------------------------
# Names


@given(st.text(min_size=1), st.text(min_size=1))
def test_two_names_stay_two(one, other):
    assert (spelled(one) == spelled(other)) == (one == other)


@given(st.text())
def test_spelled_names_have_no_character_that_mlflow_refuses(name):
    """Its rule: letters, digits, and / _ . - : and space (no colon on Windows). Whole runs ask MLflow itself."""
    assert re.fullmatch(r"[A-Za-z0-9_.\- ]*", spelled(name))


def test_flags_become_numbers_and_text():
    given = {"lr": 0.1, "opt": "adamw", "eval": False, "mean": None, "reg": ["a=1", "b=2"], "model_kwargs": {}}
    given["teacher_model_kwargs"] = {"depth": 2, "window": (7, 7)}
    assert flattened(given) == {
        "lr": 0.1,
        "opt": "adamw",
        "eval": False,
        "mean": "None",
        "reg": "a=1 b=2",
        "teacher_model_kwargs.depth": 2,
        "teacher_model_kwargs.window": "7 7",
    }


def test_the_book_knows_its_log():
    lines = ["a", "b", "c"]
    book = Book(trackers={"wandb": Had(2, "")})
    assert book.is_of(lines) and not book.is_of(lines[:1])
    assert not Book(trackers={"wandb": Had(1, "0" * 64)}).is_of(lines)


# ------------------------------------------------------------------------------------------------------------
# summary.csv


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def by_timm(records: list[Mapping[str, Any]], prefix: str, path: Path) -> list[dict[str, str]]:
    """The rows that timm's own function writes for the same numbers."""
    for record in records:
        tested = {new: record[prefix + old] for new, old in (("loss", "loss"), ("top1", "acc1"), ("top5", "acc5"))}
        update_summary(record["epoch"], {"loss": record["train_loss"]}, tested, str(path), lr=record["train_lr"])
    return rows(path)


@pytest.mark.parametrize(("flag", "prefix"), [("--model-ema", "ema_test_"), ("--no-model-ema", "test_")])
def test_summary_is_what_timm_would_have_written(images, tmp_path, flag, prefix):
    """And what follows is the rest of log.txt."""
    assert train(images, tmp_path / "x", flag, "--epochs", "2", *TERMS) == 0
    ours, logged = rows(tmp_path / "x" / SUMMARY), records(tmp_path / "x")
    timms = by_timm(logged, prefix, tmp_path / "timm.csv")
    columns = list(timms[0])
    assert list(ours[0])[: len(columns)] == columns
    assert [{name: row[name] for name in columns} for row in ours] == timms
    assert [row["epoch"] for row in ours] == ["0", "1"]
    for row, record in zip(ours, logged, strict=True):
        assert {name: float(row[name]) for name in record if name != "train_lr"} == {
            name: value for name, value in record.items() if name != "train_lr"
        }


def test_a_continued_run_has_each_epoch_once_and_a_fresh_one_keeps_the_summary_before(images, tmp_path):
    assert train(images, tmp_path, "--epochs", "1") == 0
    (tmp_path / SUMMARY).unlink()  # as if killed before it was written
    assert train(images, tmp_path, "--epochs", "1", "--resume", "auto") == 0
    assert [row["epoch"] for row in rows(tmp_path / SUMMARY)] == ["0"]
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto") == 0
    assert [row["epoch"] for row in rows(tmp_path / SUMMARY)] == ["0", "1"]
    before = (tmp_path / SUMMARY).read_bytes()
    assert train(images, tmp_path, "--epochs", "1") == 0
    assert (tmp_path / "summary.old.csv").read_bytes() == before and len(rows(tmp_path / SUMMARY)) == 1


def test_an_epoch_without_evaluation_has_empty_cells(tmp_path):
    tested = {"test_loss": 0.5, "test_acc1": 75.0, "test_acc5": 100.0}
    lines = [
        json.dumps({"train_loss": 1.0, "train_lr": 0.1, "epoch": 0}),
        json.dumps({"train_loss": None, "train_lr": 0.1, **tested, "epoch": 1}),
        json.dumps({"train_loss": 1.0, "train_lr": 0.1, **tested, "ema_test_loss": 0.25, "epoch": 2}),
    ]
    Summary(tmp_path / SUMMARY, lines).after_epoch({})
    first, second, third = rows(tmp_path / SUMMARY)
    assert first["eval_loss"] == first["eval_top1"] == first["test_loss"] == "" and first["train_loss"] == "1.0"
    assert second["train_loss"] == "" and second["eval_loss"] == "0.5" and second["ema_test_loss"] == ""
    assert third["eval_loss"] == third["ema_test_loss"] == "0.25" and third["test_acc1"] == "75.0"
