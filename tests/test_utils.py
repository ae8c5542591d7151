"""Launchers, devices, meters and progress."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from processes import PATIENCE

import utils
from errors import UserError
from loggers.meters import Meters
from loggers.progress import Progress, clock
from utils import Launch, find_launch, pick_device


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 8, 1)),
        ({"RANK": "1"}, Launch(1, 2, 0)),  # --world_size says how many
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}, Launch(5, 16, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Launch(0, 1, 0)),  # a batch script, before any srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch(0, 1, 0)),  # an interactive shell
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Launch(0, 2, 0)),
    ],
)
def test_launchers(env, expected):
    assert find_launch(2 if env == {"RANK": "1"} else 1, env) == expected


def test_several_processes_without_a_launcher():
    with pytest.raises(UserError, match="--world_size 4, but no launcher set RANK: start with 'torchrun"):
        find_launch(4, {})
    with pytest.raises(UserError, match=r"RANK, WORLD_SIZE, LOCAL_RANK are \['x', '1', '0'\]"):
        find_launch(1, {"RANK": "x"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[07-09,12],login1", "gpu07"), ("node1", "node1"), ("a-b-3,c", "a-b-3"), ("n[3,5]", "n3")],
)
def test_slurm_rendezvous(nodelist, host, monkeypatch):
    joined = {}
    monkeypatch.setattr(
        utils.dist, "init_process_group", lambda backend, **options: joined.update(options, b=backend)
    )
    monkeypatch.setattr(utils.dist, "rendezvous", lambda url, *own, timeout: iter([(utils.dist.HashStore(), *own)]))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodelist)
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    utils.init_distributed(Launch(1, 4, 1), torch.device("cpu"))
    assert (utils.os.environ["MASTER_ADDR"], utils.os.environ["MASTER_PORT"]) == (host, "23456")
    assert joined["b"] == "gloo" and (joined["rank"], joined["world_size"]) == (1, 4)
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")


def test_restarts_do_not_meet_in_a_used_store():
    """torchrun keeps one store over its restarts, and counts them per machine."""
    one, several = Launch(1, 4, 1), Launch(1, 8, 1)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert utils._restart(one, {}) == utils._restart(several, {**env, "TORCHELASTIC_MAX_RESTARTS": "0"}) == "0"
    assert utils._restart(one, {**env, "TORCHELASTIC_RESTART_COUNT": "2"}) == "2"
    with pytest.raises(UserError, match="on several machines works with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 only"):
        utils._restart(several, env)
    assert utils._restart(several, {**env, "TORCHELASTIC_USE_AGENT_STORE": "False"}) == "0"


def test_nobody_else_comes():
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "2"}
    code = "import torch, utils; utils.init_distributed(utils.find_launch(), torch.device('cpu'), timeout=1.0)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert "UserError: 2 processes cannot meet at --dist_url env://" in run.stderr


def test_no_rendezvous(monkeypatch):
    for name in ("MASTER_ADDR", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no MASTER_ADDR: start with torchrun, or give --dist_url"):
        utils.init_distributed(Launch(0, 2, 0), torch.device("cpu"))


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: no CUDA device is visible"):
        pick_device("cuda")
    with pytest.raises(UserError, match="--device mps: no MPS device"):
        pick_device("mps")
    with pytest.raises(UserError, match="--device tpuu: not a device name"):
        pick_device("tpuu")
    with pytest.raises(UserError, match="--device meta is not supported"):
        pick_device("meta")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert pick_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cuda:0", local_rank=1) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="local rank 2 has no GPU of its own: 2 visible"):
        pick_device("cuda", local_rank=2)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Whatever fails before the rename leaves the old content, and nothing beside it."""
    path, seen = tmp_path / "log.txt", []
    utils.write_atomically(path, lambda file: file.write(b"old"), lambda: seen.append(path.exists()))
    utils.write_atomically(path, lambda file: file.write(b"new"), lambda: seen.append(path.read_bytes()))
    assert seen == [False, b"old"] and path.read_bytes() == b"new"

    def dies(*args: object) -> None:
        raise KeyboardInterrupt

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write, just_before in ((dies, None), (full, None), (lambda file: file.write(b"newer"), full)):
        with pytest.raises((KeyboardInterrupt, OSError)):
            utils.write_atomically(path, write, just_before)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full)
            utils.write_atomically(path, lambda file: file.write(b"newer"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        utils.write_atomically(tmp_path / "missing" / "log.txt", lambda file: file.write(b"new"))


def test_seeds_make_draws_repeat():
    draws = []
    for seed in (3, 3, 4):
        utils.seed_everything(seed)
        draws.append((utils.random.random(), float(utils.np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[1], draws[2], strict=True))


def test_meters_keep_means():
    meters = Meters()
    assert meters.means() == {} == meters.global_means()
    for step in range(4):
        meters.update({"loss": torch.tensor(1.0), "a": torch.tensor(2.0 * step)})
    assert meters.means() == {"loss": 1.0, "a": 3.0} == meters.global_means()


def test_meters_go_on_where_they_were():
    whole, first, second = Meters(), Meters(), Meters()
    second.load_state_dict(first.state_dict())
    assert second.means() == {}
    for step, meters in enumerate((first, first, second)):
        if meters is second:
            second.load_state_dict(first.state_dict())
        for each in (whole, meters):
            each.update({"x": torch.tensor(0.1 * step)})
    assert second.means() == whole.means()


def test_meters_keep_float64():
    meters = Meters()
    for value in (1.0, 1e-12):
        meters.update({"x": torch.tensor(value, dtype=torch.float64)})
    assert meters.means()["x"] == (1 + 1e-12) / 2


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    meters = Meters()
    progress = Progress("Epoch 1/3", interval=2, units_after=2)
    for value in progress.over(1, 5, meters):
        meters.update({"loss": torch.tensor(float(value))})
    text = capsys.readouterr().out
    shown = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert len(shown) == 3 and [s.split("[")[1].split("]")[0] for s in shown] == ["2/5", "4/5", "5/5"]
    assert all(re.search(r"eta 0:00:0\d, run 0:00:0\d  .*it/s  loss \d", s) for s in shown)
    assert ("█" in text) == terminal and shown[-1].rstrip().endswith("loss 3")


def test_a_narrow_terminal_drops_whole_entries(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    meters = Meters()
    for value in Progress("Epoch 1/3").over(1, 1, meters):
        meters.update({name: torch.tensor(float(value)) for name in ("loss", "a_long_name_of_a_term", "another")})
    line = capsys.readouterr().out.strip("\r\n")
    assert len(line) < 80 and line.endswith("it/s  loss 1")


def test_the_bar_moves_between_its_means(capsys, monkeypatch):
    """At every step that takes long enough; the means stay those of the last interval, which are not read anew."""
    now = [0.0]
    monkeypatch.setattr("loggers.progress.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    meters = Meters()
    for step in Progress("Epoch 1/1", interval=4).over(1, 6, meters):
        meters.update({"loss": torch.tensor(float(step))})
        now[0] += 0.06 if step < 4 else 2.0
    shown = [entries.split("  ") for entries in capsys.readouterr().out.split("\r")[1:]]
    assert [entries[1] for entries in shown] == ["[2/6]", "[4/6]", "[5/6]", "[6/6]"]
    assert [[entry.strip() for entry in entries if "loss" in entry] for entries in shown] == [
        [],
        *([["loss 2.5"]] * 2),
        ["loss 3.5"],
    ]


def test_clock():
    assert [clock(s) for s in (0, 61.9, 3600 * 30 + 59)] == ["0:00:00", "0:01:01", "30:00:59"]
