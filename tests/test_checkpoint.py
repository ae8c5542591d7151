"""Files: atomic, plain data, readable by torch and timm, refused with a reason."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from fractions import Fraction
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from checkpoint_saver import STEPS, content
from conftest import TINY, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from engine import Precision, Updater, train_one_epoch
from errors import UserError
from losses import Objective
from models import DiverseViT, build_model
from models.weights import model_weights
from options import config
from state import checkpoint, resumption
from state.run_state import RunState

TINY_V1 = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0}
CPU = Precision(torch.device("cpu"))
HERE = Path(__file__).parent
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)


def make_run(tiny, seed: int = 0, train: bool = True) -> RunState:
    model, diversity = tiny("patch.cosine@last=0.5", seed=seed)
    optimizer = create_optimizer_v2(model.backbone, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=20, warmup_epochs=5, warmup_lr=1e-6)
    ema = ModelEmaV3(model, decay=0.5)
    run = RunState(model, optimizer, schedule, CPU.scaler, ema, args={"lr": 1e-3, "reg": ["a=1"]})
    if train:
        updater = Updater(optimizer, CPU, ema=run.ema)
        train_one_epoch(model, Objective(diversity=diversity), [random_batch()], updater, run.mixing)
        run.epoch, run.max_acc = 6, 71.5
        schedule.step(run.epoch)
    return run


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ------------------------------------------------------------------------------------------------------------
# Writing and reading


def test_round_trip_restores_everything(tiny, tmp_path):
    run = make_run(tiny)
    checkpoint.save(run.state_dict(), tmp_path / "checkpoint.pth")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    deit_keys = {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args", "max_acc"}
    assert deit_keys <= set(state) and state["args"] == {"lr": 1e-3, "reg": ["a=1"]}
    other = make_run(tiny, seed=1, train=False)
    assert not same(run.state_dict(), other.state_dict())
    saved = checkpoint.load(str(tmp_path / "checkpoint.pth"))
    other.load_state_dict(saved, "checkpoint.pth")
    other.restore_streams()
    assert same(saved, other.state_dict()) and same(saved["model"], run.model.backbone.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] != 1e-3
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())


def test_timm_reads_our_checkpoint(tiny, tmp_path):
    run = make_run(tiny)
    checkpoint.save(run.state_dict(), tmp_path / "checkpoint.pth")
    read = partial(
        timm.create_model, "deit_tiny_patch16_224", checkpoint_path=str(tmp_path / "checkpoint.pth"), **TINY
    )
    assert same(
        read().state_dict(), run.ema.module.backbone.state_dict()
    )  # timm takes the average where there is one
    run.ema = None
    checkpoint.save(run.state_dict(), tmp_path / "checkpoint.pth")
    assert same(read().state_dict(), run.model.backbone.state_dict())
    plain = timm.create_model("deit_tiny_patch16_224", **TINY)
    plain.load_state_dict(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"], strict=True)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"epoch": 1}, path)

    def dies(state, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(str(path)) == {"epoch": 1}


def test_the_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order = []

    def watch(name, original):
        def watched(*args):
            what = args[0]
            if name == "fsync":
                what = os.readlink(f"/proc/self/fd/{args[0]}")
                order.append((name, Path(what).name, os.path.getsize(what)))
            else:
                order.append((name, *(Path(path).name for path in args)))
            return original(*args)

        return watched

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, watch(name, getattr(os, name)))
    path = tmp_path / "checkpoint.pth"
    for counter in range(2):
        order.clear()
        checkpoint.save({"epoch": counter}, path, keep=2)
    written, *links, replaced, folder = order
    assert written == ("fsync", "checkpoint.pth.tmp", path.stat().st_size)  # all of it had been handed over
    assert [event[:3] if event[0] != "fsync" else event[:2] for event in links] == [
        ("link", "checkpoint.pth", "checkpoint.1.pth.tmp"),
        ("fsync", "checkpoint.1.pth.tmp"),
        ("replace", "checkpoint.1.pth.tmp", "checkpoint.1.pth"),
        ("fsync", tmp_path.name),
    ]
    assert replaced == ("replace", "checkpoint.pth.tmp", "checkpoint.pth")
    assert folder[:2] == ("fsync", tmp_path.name)


def test_a_checkpoint_of_the_references_form_is_read(tmp_path):
    state = {"model": build_model("deit_tiny_patch16_224", **TINY).state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "old.pth")
    assert checkpoint.load(str(tmp_path / "old.pth"))["args"].lr == 1


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "pickle with code", "zip without data"])
def test_what_is_no_checkpoint_is_refused_and_never_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"not a checkpoint",
            "truncated": data[: len(data) // 2],
            "pickle with code": pickle.dumps({"model": Evil()}, protocol=2),
            "zip without data": b"PK\x05\x06" + b"\0" * 18,
        }[content]
    )
    with pytest.raises(UserError, match=r"checkpoint.pth is not a checkpoint, or a damaged one") as error:
        checkpoint.load(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            checkpoint.load(str(path))


def test_a_damaged_text_is_refused(tmp_path):
    """Also where Python only warns of its escapes."""
    path = tmp_path / "x.pth"
    path.write_bytes(b"P\\\n.")
    with pytest.raises(UserError, match=r"x\.pth is not a checkpoint, or a damaged one"):
        checkpoint.load(str(path))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_are_read_or_refused(data):
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.arange(4.0)}, "epoch": 3, "args": {"lr": 1e-3}}, buffer)
    content = bytearray(buffer.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[position] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            checkpoint.load(str(path))


def test_addresses_are_downloaded_once_and_checked(monkeypatch, tmp_path, capsys):
    """Into torch.hub's folder; without running code, and with the way out of a damaged one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def download(address: str, file: str) -> None:
        asked.append(address)
        if "missing" in address:
            raise URLError("not found")
        torch.save({"model": Evil() if "evil" in address else {"w": torch.full((8,), 7.25)}}, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    address = "https://example.org/a/deit.pth?version=2"
    for _ in range(2):
        assert torch.equal(checkpoint.load(address)["model"]["w"], torch.full((8,), 7.25))
    assert asked == [address]
    file = tmp_path / "hub" / "checkpoints" / "deit.pth"
    assert capsys.readouterr().out == f'Downloading: "{address}" to {file}\n'
    damage(file)
    with pytest.raises(UserError, match=r"does not match its checksum; delete it in .*/hub/checkpoints$"):
        checkpoint.load(address)
    with pytest.raises(
        UserError, match=r"evil.pth is intact, but .* posix.mkdir .*; delete it in .*/hub/checkpoints$"
    ):
        checkpoint.load("https://example.org/evil.pth")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match=r"cannot read the checkpoint https://example.org/missing.pth: .*not found"):
        checkpoint.load("https://example.org/missing.pth")


# ------------------------------------------------------------------------------------------------------------
# Killed while saving


class Killed:
    """A folder into which processes save until they are killed, and what must hold of it after each of them."""

    def __init__(self, folder: Path, saver: subprocess.Popen[str], size: int) -> None:
        self.folder = folder
        self.saver = saver
        self.size = size
        self.counter = -1

    def kill(self, delay: float | None = None, event: int | None = None) -> bool:
        """Start a process that goes on saving, and kill it; False if it ended before the event."""
        job = {"folder": str(self.folder), "start": self.counter + 1, "size": self.size}
        self.saver.stdin.write(json.dumps(job | {"delay": delay, "event": event}) + "\n")
        self.saver.stdin.flush()
        ended_by = int(self.saver.stdout.readline())
        assert ended_by in (0, signal.SIGKILL)
        self.check()
        return ended_by != 0

    def check(self) -> None:
        """The furthest checkpoint is valid, and at most what had not been finished is lost."""
        saved = (self.folder / "saved").read_text().split() if (self.folder / "saved").exists() else []
        noted = int(saved[-1]) if saved else -1
        last = max(noted, self.counter)  # the one before may have been killed between its save and its note
        assert self.count(checkpoint.newest(self.folder)) in (last, last + 1)
        if last >= 0:
            self.counter = self.count(self.load("checkpoint.pth"))
            assert self.counter in (last, last + 1)
        if last >= 1:
            assert self.count(self.load("checkpoint.1.pth")) in (self.counter - 1, self.counter)
        left = {path.name for path in self.folder.iterdir()} - {"saved", "checkpoint.pth", "checkpoint.1.pth"}
        assert left <= {"checkpoint.pth.tmp", "checkpoint.1.pth.tmp"}

    def load(self, name: str):
        return self.folder / name, checkpoint.load(str(self.folder / name))

    def count(self, found) -> int:
        if found is None:
            return -1
        counter = found[1]["epoch"] * STEPS + found[1]["step"]
        assert same(found[1], content(counter, self.size))
        return counter


@pytest.fixture
def saver():
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    with subprocess.Popen(
        [sys.executable, str(HERE / "checkpoint_saver.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process


def test_killed_at_every_event_of_a_save_nothing_is_lost(tmp_path, saver):
    run = Killed(tmp_path, saver, size=2000)
    event = 1
    while run.kill(event=event):
        event += 1
    print(event)
    assert event > 50


def test_killed_at_any_time_nothing_is_lost(tmp_path, saver, capsys):
    run = Killed(tmp_path, saver, size=100_000)
    generator = random.Random(0)
    kills = within = 0
    while kills < 60 or (kills < 3000 and not (within > 5 and run.counter > 20)):  # a busy machine needs more
        assert run.kill(delay=generator.uniform(0.0, 0.06))
        kills, within = kills + 1, within + any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    assert within > 5 and run.counter > 20  # many were killed within a save, and the run still got on
    assert "warning" not in capsys.readouterr().out  # no file was ever damaged
    checkpoint.save(content(run.counter + 1, 10), tmp_path / "checkpoint.pth", keep=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"saved", "checkpoint.pth", "checkpoint.1.pth"}


# ------------------------------------------------------------------------------------------------------------
# Saving that fails


@contextlib.contextmanager
def largest_file(size: int):
    """No file can be written beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0.0, 0.001, 0.02, 0.06, 0.5, 0.99, 0.9999])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, room):
    path = tmp_path / "checkpoint.pth"
    for counter in range(2):
        checkpoint.save(content(counter, 10), path, keep=2)
    checkpoint.save(content(2, 20_000), tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    (tmp_path / "whole").unlink()
    with largest_file(int(room * size)), pytest.raises(UserError) as error:
        checkpoint.save(content(2, 20_000), path, keep=2)
    assert str(error.value) == f"cannot save {path}: File too large; what was there before is still there"
    assert same(checkpoint.load(str(path)), content(1, 10))
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pth", "checkpoint.1.pth"}


@pytest.mark.parametrize("name", ["fsync", "replace", "link and copy"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"epoch": 1}, path)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if name == "link and copy":
        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr(shutil, "copyfile", fail)
    else:
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(
        UserError, match=r"cannot save .*: Input/output error; what was there before is still there"
    ):
        checkpoint.save({"epoch": 2}, path, keep=2)
    assert checkpoint.load(str(path)) == {"epoch": 1}
    assert not any(file.suffix == ".tmp" for file in tmp_path.iterdir())


def test_a_folder_that_cannot_be_flushed_is_reported(tmp_path, monkeypatch):
    original = os.fsync
    path = tmp_path / "checkpoint.pth"

    def fail(code, descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", partial(fail, errno.EIO))
    with pytest.raises(
        UserError, match=r"may not survive a power cut: its folder cannot be flushed, .*Input/output"
    ):
        checkpoint.save({"epoch": 1}, path)
    assert checkpoint.load(str(path)) == {"epoch": 1}
    monkeypatch.setattr(os, "fsync", partial(fail, errno.EINVAL))  # a file system that has no such thing
    checkpoint.save({"epoch": 2}, path)


def test_what_is_no_error_of_the_disk_is_not_called_one(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpoint.save({"epoch": 1}, tmp_path / "checkpoint.pth")
    for value in (Fraction(1, 2), np.float64(0.5), np.zeros(2), Path("x")):
        with pytest.raises(TypeError, match=r"checkpoint\['a'\]\[1\] is a .*: a checkpoint holds plain data only"):
            checkpoint.save({"a": [1, value]}, tmp_path / "checkpoint.pth")


def test_a_folder_that_is_not_there_or_takes_no_files():
    with pytest.raises(UserError, match=r"cannot save /proc/checkpoint.pth: No such file"):
        checkpoint.save({"epoch": 1}, Path("/proc/checkpoint.pth"))
    with pytest.raises(UserError, match=r"cannot write checkpoints to /proc: .*; choose another --output_dir"):
        checkpoint.check_space(Path("/proc"), 0)
    with pytest.raises(UserError, match="cannot write checkpoints to /missing: No such file"):
        checkpoint.check_space(Path("/missing"), 0)


@pytest.mark.parametrize("name", [checkpoint.LATEST, checkpoint.BEST])
def test_a_folder_in_a_checkpoints_place_is_refused(tmp_path, name):
    """Before the first epoch, not after it."""
    (tmp_path / name).mkdir()
    with pytest.raises(
        UserError, match=f"{name} is a folder, and a checkpoint is to be written there: move it away"
    ):
        checkpoint.check_space(tmp_path, 0)


def test_room_for_checkpoints(tmp_path, monkeypatch):
    checkpoint.check_space(tmp_path, 1)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"the checkpoints need 953,674,316,406.2 MiB: make room"):
        checkpoint.check_space(tmp_path, 10**18)
    free = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    checkpoint.check_space(tmp_path, 3 * 2**20)
    with pytest.raises(UserError, match=r"has 3\.0 MiB free, and the checkpoints need 3\.5 MiB"):
        checkpoint.check_space(tmp_path, 7 * 2**19)
    with largest_file(0), pytest.raises(UserError, match=r"cannot write checkpoints to .*: File too large"):
        checkpoint.check_space(tmp_path, 1)


def test_size_of_a_checkpoint(tiny, tmp_path):
    state = make_run(tiny).state_dict()
    size = checkpoint.nbytes(state)
    checkpoint.save(state, tmp_path / "checkpoint.pth")
    assert 0.5 < size / (tmp_path / "checkpoint.pth").stat().st_size < 1
    assert checkpoint.nbytes({"a": [torch.zeros(3), (torch.zeros(2, dtype=torch.bfloat16), 5)], "b": "x"}) == 16


# ------------------------------------------------------------------------------------------------------------
# Several files


def test_the_last_files_are_kept(tmp_path):
    def kept() -> dict[str, int]:
        return {file.name: checkpoint.load(str(file))["epoch"] for file in sorted(tmp_path.iterdir())}

    path = tmp_path / "checkpoint.pth"
    for epoch in range(5):
        checkpoint.save({"epoch": epoch}, path, keep=3)
    assert kept() == {"checkpoint.pth": 4, "checkpoint.1.pth": 3, "checkpoint.2.pth": 2}
    checkpoint.save({"epoch": 5}, path)
    assert kept() == {"checkpoint.pth": 5, "checkpoint.1.pth": 3, "checkpoint.2.pth": 2}
    (tmp_path / "checkpoint.1.pth").unlink()
    checkpoint.save({"epoch": 6}, path, keep=3)  # fills the gap
    assert kept() == {"checkpoint.pth": 6, "checkpoint.1.pth": 5, "checkpoint.2.pth": 2}
    (tmp_path / "checkpoint.1.pth").unlink()
    os.link(path, tmp_path / "checkpoint.1.pth")  # as after a kill
    checkpoint.save({"epoch": 7}, path, keep=3)
    assert kept() == {"checkpoint.pth": 7, "checkpoint.1.pth": 6, "checkpoint.2.pth": 2}


def test_where_there_are_no_hard_links_files_are_copied(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", fail)
    for epoch in range(3):
        checkpoint.save({"epoch": epoch}, tmp_path / "checkpoint.pth", keep=2)
    assert checkpoint.load(str(tmp_path / "checkpoint.1.pth")) == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 2


def damage(path: Path) -> None:
    """Flip a bit of a tensor, which torch.load does not see."""
    data = bytearray(path.read_bytes())
    position = data.index(torch.full((8,), 7.25).numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    state = torch.load(path, weights_only=True)
    assert state.get("model", state)["w"][0] != 7.25


def test_the_furthest_valid_file_is_the_newest(tmp_path, capsys):
    """Against the maximum over the files that are known to be valid."""
    generator = random.Random(0)
    names = ["checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth", "checkpoint.10.pth", "checkpoint_best.pth"]
    for case in range(60):
        folder = tmp_path / str(case)
        folder.mkdir()
        valid, damaged = {}, {}
        for name in generator.sample(names, generator.randint(1, 5)):
            progress = (generator.randint(8, 11), generator.choice([0, 0, 9, 10, 100]))
            state = {"w": torch.full((8,), 7.25), "epoch": progress[0], "step": progress[1], "name": name}
            checkpoint.save(state | ({} if progress[1] else {"step": 0}), folder / name)
            kind = generator.choice(["valid", "valid", "tensor", "cut"])
            if kind == "tensor":
                damage(folder / name)
            elif kind == "cut":
                os.truncate(folder / name, generator.randint(0, (folder / name).stat().st_size - 1))
            (valid if kind == "valid" else damaged)[name] = progress
            when = generator.randint(10**9, 10**9 + 5)
            os.utime(folder / name, (when, when))
        if not valid:
            with pytest.raises(UserError, match=r"no checkpoint in .* is valid: checkpoint") as error:
                checkpoint.newest(folder)
            assert all(name in str(error.value) for name in damaged)
            continue
        path, state = checkpoint.newest(folder)
        assert (state["epoch"], state["step"]) == max(valid.values()) == valid[path.name]
        assert state["name"] == path.name and torch.equal(state["w"], torch.full((8,), 7.25))
        printed = capsys.readouterr().out
        assert not any(str(folder / name) in printed for name in valid)
        skipped = [name for name, progress in damaged.items() if progress > valid[path.name]]
        assert all(f"warning: skipped: {folder / name} is" in printed for name in skipped)


def test_equally_far_files_are_tried_from_the_last_modified_on(tmp_path):
    for when, name in enumerate(["checkpoint.pth", "checkpoint_best.pth"]):
        checkpoint.save({"epoch": 3}, tmp_path / name)
        os.utime(tmp_path / name, (10**9 + when, 10**9 + when))
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint_best.pth"
    os.utime(tmp_path / "checkpoint.pth", (10**9 + 1, 10**9 + 1))
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint.pth"


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path / "missing") is None and checkpoint.newest(tmp_path) is None
    for name in (
        "checkpoint.pth.tmp",
        "checkpoint_old.pth",
        "model.pth",
        "checkpoint.0.pth",
        "checkpoint.1.pth.old",
    ):
        (tmp_path / name).write_bytes(b"anything")
    (tmp_path / "checkpoint.7.pth").mkdir()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save({"epoch": 0}, tmp_path / "checkpoint.pth")
    assert checkpoint.newest(tmp_path)[1] == {"epoch": 0}
    assert not (tmp_path / "checkpoint.pth.tmp").exists() and (tmp_path / "model.pth").exists()


def test_a_file_without_an_epoch_is_not_a_run(tmp_path, capsys):
    checkpoint.save({"epoch": 2}, tmp_path / "checkpoint.1.pth")
    checkpoint.save({"model": {}}, tmp_path / "checkpoint.pth")
    assert checkpoint.newest(tmp_path)[1] == {"epoch": 2}
    printed = capsys.readouterr().out
    assert f"warning: skipped: {tmp_path / 'checkpoint.pth'} does not say which epoch it is of" in printed


# ------------------------------------------------------------------------------------------------------------
# Damaged and hostile files

VARIED = {
    "w": torch.arange(5.0),
    "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "none": torch.zeros(0, 4),
    "nested": OrderedDict(a=[1, 2.5, (True, None, "text")], b={0: {"step": -7}}),
}


def exactly(one, other) -> bool:
    """Equal in types and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.untyped_storage().tolist() == other.untyped_storage().tolist()
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(exactly(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(exactly, one, other))
    return one == other


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(VARIED, path)
    whole = path.read_bytes()
    assert exactly(checkpoint.load(str(path)), VARIED)
    flipped = [
        whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :]
        for i in range(len(whole))
        for mask in (1 << i % 8, whole[i] ^ ord("."))  # "." ends a pickle
    ]
    refused = 0
    for data in flipped + [whole[:i] for i in range(0, len(whole), 7)]:
        path.write_bytes(data)
        try:
            assert exactly(checkpoint.load(str(path)), VARIED)
        except UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(whole) / 2


def test_a_file_that_is_cut_off_is_called_damaged(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for size in (4, 100, 5_000, 45_000):
        path.write_bytes((HERE / "golden" / "checkpoint_v1.pth").read_bytes()[:size])
        with pytest.raises(UserError, match=r"checkpoint.pth is not a checkpoint, or a damaged one \(BadZipFile\)"):
            checkpoint.load(str(path))


@pytest.mark.parametrize("checksum", [None, "sha256:" + "0" * 64])
def test_a_changed_tensor_is_seen(tmp_path, checksum):
    """Also in files of earlier versions, which held a checksum of their own."""
    path, state = tmp_path / "checkpoint.pth", {"w": torch.full((8,), 7.25), "epoch": 1}
    torch.save(state | ({"checksum": checksum} if checksum else {}), path)
    assert same(checkpoint.load(str(path)), state)
    damage(path)
    with pytest.raises(UserError, match=r"checkpoint.pth is damaged: its content does not match its checksum"):
        checkpoint.load(str(path))
    torch.save({"epoch": 1, "checksum": "another's, of another kind"}, path)
    assert checkpoint.load(str(path))["checksum"] == "another's, of another kind"


def test_torch_writes_a_crc_of_every_member(tmp_path):
    checkpoint.save({"w": torch.arange(8.0), "b": torch.ones(3), "epoch": 1}, tmp_path / "checkpoint.pth")
    with zipfile.ZipFile(tmp_path / "checkpoint.pth") as archive:
        assert sum("/data/" in member.filename for member in archive.filelist) == 2
        assert all(member.CRC == zlib.crc32(archive.read(member)) > 0 for member in archive.filelist)


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes | None) -> None:
    """Write an archive anew, with members changed or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            new = changed.get(Path(name).name.replace(".", "_"), data)
            if new is not None:
                archive.writestr(name, new)


def compressed(path):
    """Of which a few bytes could unpack to more than there is memory."""
    rewritten(path, zipfile.ZIP_DEFLATED)


def one_record_many_times(path):
    """Members that share their bytes, so that a small file has a large content."""
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.filelist, key=lambda member: member.file_size)
        for i in range(100):
            twin = zipfile.ZipInfo(f"{largest.filename}_{i}")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "flag_bits", "compress_type"):
                setattr(twin, name, getattr(largest, name))
            archive.filelist.append(twin)
        archive.comment = b"so that the directory is written anew"


def folders(path):
    """Of which torch reads nothing, and leaves the memory of the tensors as it was."""
    with zipfile.ZipFile(path, "a") as archive:
        for member in archive.filelist:
            member.external_attr = 0x10
        archive.comment = b"so that the directory is written anew"


def without_a_tensor(path):
    rewritten(path, **{"0": None})


def without_pickle(path):
    rewritten(path, data_pkl=None)


def short_tensor(path):
    rewritten(path, **{"0": b"\0" * 16})


def with_code(path):
    rewritten(path, data_pkl=pickle.dumps({"model": Evil()}, protocol=2))


def with_code_after_the_end(path):
    with zipfile.ZipFile(path) as archive:
        whole = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    rewritten(path, data_pkl=whole[:-1] + pickle.dumps(Evil(), protocol=2)[2:])


@pytest.mark.parametrize(
    "change",
    [
        compressed,
        one_record_many_times,
        folders,
        without_a_tensor,
        without_pickle,
        pytest.param(short_tensor, marks=pytest.mark.skipif(OLD, reason="torch 2.6 reads beyond a short tensor")),
        with_code,
        with_code_after_the_end,
    ],
)
def test_a_hostile_archive_is_refused_and_never_executed(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"w": torch.zeros(1000), "epoch": 1}, path)
    rewritten(path)
    assert checkpoint.load(str(path))["epoch"] == 1  # rewriting by itself is no harm
    change(path)
    expected = "posix.mkdir is in the way" if change in (with_code, with_code_after_the_end) else "damaged"
    with pytest.raises(UserError, match=expected) as error:
        checkpoint.load(str(path))
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid: checkpoint.pth"):
        checkpoint.newest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_files_of_other_kinds_are_read_or_refused_without_a_word(tmp_path, recwarn):
    state = {"model": {"w": torch.arange(4.0)}, "epoch": 3}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "protocol.pth", pickle_protocol=3)
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(state, tmp_path / "without_crc.pth")
    torch.serialization.set_crc32_options(crc)
    for name in ("old.pth", "protocol.pth", "without_crc.pth"):
        assert same(checkpoint.load(str(tmp_path / name)), state)
    torch.save(state, tmp_path / "unsupported.pth", pickle_protocol=5)
    (tmp_path / "weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"unsupported.pth is intact, but .* a pickle of protocol 5"):
        checkpoint.load(str(tmp_path / "unsupported.pth"))
    with pytest.raises(UserError, match="is not a checkpoint, or a damaged one"):
        checkpoint.load(str(tmp_path / "weights.safetensors"))
    assert not recwarn
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*missing.pth: .*No such file"):
        checkpoint.load(str(tmp_path / "missing.pth"))
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*: .*Is a directory"):
        checkpoint.load(str(tmp_path))


def test_other_warnings_of_torch_are_heard(tmp_path, monkeypatch):
    checkpoint.save({"epoch": 3}, tmp_path / "checkpoint.pth")

    def load(*args, **options):
        warnings.warn("something else", stacklevel=1)
        return {"epoch": 3}

    monkeypatch.setattr(torch, "load", load)
    with pytest.warns(UserWarning, match="something else"):
        checkpoint.load(str(tmp_path / "checkpoint.pth"))


# ------------------------------------------------------------------------------------------------------------
# The first format


def test_a_checkpoint_of_the_first_format_is_read(capsys):
    """golden/checkpoint_v1.pth was written by `checkpoint.save(run.state_dict())` when it had no checksum.

    make_run's objects at commit a31852b, for TINY_V1 and the flags below: one step on random_batch(pixels=8) with
    patch.cosine@last=0.5, AdamW, EMA 0.5, Mixup of 4-pixel patches and seed 0, then epoch 6 and top-1 71.5.
    """
    state = checkpoint.load(str(HERE / "golden" / "checkpoint_v1.pth"))
    assert set(state) == {
        *("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args", "max_acc")
    }
    assert state["args"] == {
        **{"model": "deit_tiny_patch16_224", "input_size": 8, "model_kwargs": TINY_V1},
        **{"opt": "adamw", "sched": "cosine", "lr": 1e-3, "reg": ["patch.cosine@last=0.5"]},
    }
    backbone = build_model("deit_tiny_patch16_224", img_size=8, num_classes=5, **TINY_V1)
    optimizer = create_optimizer_v2(backbone, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=20, warmup_epochs=5, warmup_lr=1e-6)
    model = DiverseViT(backbone)
    run = RunState(model, optimizer, schedule, CPU.scaler, ModelEmaV3(model, decay=0.5), args=state["args"])
    run.load_state_dict(state, "checkpoint_v1.pth")
    assert "warning" not in capsys.readouterr().out
    assert (run.epoch, run.max_acc) == (6, 71.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0007938926261462366, rel=1e-12)
    for weights, total, head in (
        (backbone, 22.677573748842917, [0.0012452062219381332, 0.04336922988295555, -0.004806036129593849]),
        (run.ema.module.backbone, 22.677598841313994, [0.0012447063, 0.04336973279714584, -0.0048065362498164]),
    ):
        summed = sum(value.double().sum().item() for value in weights.state_dict().values())
        assert summed == pytest.approx(total, rel=1e-12)
        assert weights.head.weight[0, :3].tolist() == pytest.approx(head, rel=1e-7)
    moments = optimizer.state[backbone.cls_token]
    assert moments["step"] == 1 and moments["exp_avg_sq"].sum().item() == pytest.approx(
        0.00106162053998559, rel=1e-7
    )


# ------------------------------------------------------------------------------------------------------------
# Resuming what cannot be resumed


def test_weights_alone_cannot_be_resumed(tiny, tmp_path):
    torch.save({"model": tiny()[0].backbone.state_dict()}, tmp_path / "x.pth")
    args = config.resolve(["--resume", str(tmp_path / "x.pth")])
    with pytest.raises(UserError, match="cannot be resumed, it has no optimizer, lr_scheduler, epoch; --finetune"):
        resumption.find(args)


def test_another_models_checkpoint_is_refused(tiny):
    state = make_run(tiny).state_dict()
    wide, _ = tiny("patch.cosine@last=0.5", embed_dim=36)
    run = make_run(tiny, train=False)
    run.model = wide
    with pytest.raises(UserError, match=r"does not fit VisionTransformer: cls_token is \[1, 1, 24\] there and"):
        run.load_state_dict(state, "x.pth")


def test_another_optimizers_checkpoint_is_refused(tiny):
    run = make_run(tiny)
    state = run.state_dict()
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    with pytest.raises(UserError, match="is not this run's"):
        run.load_state_dict(state, "x.pth")


def test_a_checkpoint_without_ema_starts_one_and_says_so(tiny, capsys):
    state = make_run(tiny).state_dict()
    del state["model_ema"]
    run = make_run(tiny, seed=1, train=False)
    run.load_state_dict(state, "x.pth")
    assert "warning: x.pth holds no EMA" in capsys.readouterr().out
    assert same(run.ema.module.backbone.state_dict(), state["model"])


def test_a_file_without_weights(tiny):
    with pytest.raises(UserError, match="holds no model weights"):
        model_weights({"epoch": 3}, "x.pth")
    with pytest.raises(UserError, match="holds no model weights"):
        model_weights([1, 2], "x.pth")
    weights = {"module.head.weight": torch.zeros(2), "_orig_mod.head.bias": torch.zeros(2)}
    assert list(model_weights({"state_dict": weights}, "x.pth")) == ["head.weight", "head.bias"]
