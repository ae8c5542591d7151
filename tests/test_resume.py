"""Runs that are stopped, killed and continued, against the run that nothing happened to: equal bit for bit.

Everything happens in processes of its own, started as a user starts them: Mixup, EMA, repeated augmentation, random
erasing, dropout, drop path and all five terms are on, and the run measures redundancy as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import PATIENCE
from small_runs import assert_same, make_images

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds a launcher's processes in /proc")

ROOT = Path(__file__).parents[1]
FLAGS = ["--data-set", "DIGITS", "--model", "deit_tiny_patch16_224_diverse", "--input-size", "16"]
FLAGS += [
    "--device",
    "cpu",
    "--model-kwargs",
    "patch_size=4",
    "embed_dim=24",
    "depth=2",
    "num_heads=2",
    "--batch-size",
    "32",
]
FLAGS += ["--drop", "0.1", "--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "1", "--num_workers", "0"]
FLAGS += ["--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--emb_contrast_cross_coef", "0.5"]
FLAGS += ["--attn_cos_within_coef", "1e-4", "--weight_mha_cond_orth_coef", "5e-4", "--model-ema-decay", "0.9"]
FLAGS += ["--measure", "patch.cno@last", "--print-freq", "1", "--epochs", "3", "--save-interval-steps", "4"]
COMPILED = ["--torchcompile", "aot_eager"]
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(
    folder: Path, processes: int, *extra: str, restarts: int = 0, main: Path = ROOT / "main.py"
) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max-restarts={restarts}"]
    return [*launcher, str(main), *FLAGS, "--output_dir", str(folder), "--resume", "auto", *extra]


def finish(folder: Path, processes: int, *extra: str) -> str:
    """Run to the end."""
    done = subprocess.run(
        command(folder, processes, *extra),
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def die(folder: Path, processes: int, when: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """The run, whose last process kills itself: see dying_main.py."""
    return subprocess.run(
        command(folder, processes, restarts=restarts, main=ROOT / "tests" / "dying_main.py"),
        env={**ENV, "PYTHONPATH": str(ROOT), "DIES": when},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def interrupt(
    folder: Path, processes: int, when: str, how: Callable[[subprocess.Popen[str]], None], *extra: str
) -> tuple[int, str]:
    """Start the run, and do something to it when a line of its output contains `when`."""
    run = subprocess.Popen(
        command(folder, processes, *extra),
        env=ENV,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert run.stdout is not None
    seen: list[str] = []
    with run.stdout:
        for line in run.stdout:
            seen.append(line)
            if when in line:
                how(run)
                break
        seen += list(run.stdout)
    return run.wait(timeout=PATIENCE), "".join(seen)


def kill(run: subprocess.Popen[str]) -> None:
    """The launcher, if there is one, and all training processes."""
    for pid in [run.pid, *children(run.pid)]:
        os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """The processes that a launcher started; a single training process has none."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def assert_same_run(folder: Path, expected: Path) -> None:
    """All checkpoints' tensors and numbers, and all log lines; only the folder and the workers may differ."""
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        one, other = (torch.load(each / name, weights_only=True) for each in (folder, expected))
        for state in (one, other):
            del state["args"]["output_dir"], state["args"]["num_workers"]
        assert_same(one, other, name)
    assert (folder / "log.txt").read_text() == (expected / "log.txt").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[int], Path]:
    """The run that nothing happens to, for a number of processes."""
    runs: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in runs:
            runs[processes] = tmp_path_factory.mktemp(f"whole{processes}")
            finish(runs[processes], processes)
        return runs[processes]

    return run


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, whole, processes):
    """SIGKILL after a step that is no checkpoint's, twice. From three processes on, the order of sums matters."""
    total = 1437 // 256 * 256 // 32 // processes
    for epoch, step in ((1, 6), (2, total - 1)):
        code, text = interrupt(tmp_path, processes, f"Epoch {epoch}/3  [{step}/{total}]", kill)
        assert code == -signal.SIGKILL, text[-3000:]
    assert "resumed" in finish(tmp_path, processes)
    assert_same_run(tmp_path, whole(processes))


@pytest.mark.parametrize(("processes", "epoch"), [(1, 1), (1, 3), (2, 2)])
def test_killed_during_an_evaluation(tmp_path, whole, processes, epoch):
    """Nothing is trained again: the run goes on with the evaluation, of model and EMA."""
    done = die(tmp_path, processes, f"{epoch} batch 2")
    total = 1437 // 256 * 256 // 32 // processes
    assert done.returncode != 0 and f"Epoch {epoch}/3  [{total}/{total}]" in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "died").exists() and done.stdout.count("Max accuracy") == epoch - 1
    shown = finish(tmp_path, processes)
    assert f"Epoch {epoch}/3" not in shown and shown.count("Max accuracy") == 4 - epoch
    assert_same_run(tmp_path, whole(processes))


@pytest.mark.parametrize(("processes", "name"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_stopped_by_a_signal(tmp_path, whole, processes, name):
    """The step is finished, a checkpoint is written, and the exit code says so."""
    total = 1437 // 256 * 256 // 32 // processes

    def send(run: subprocess.Popen[str]) -> None:
        os.kill([run.pid, *children(run.pid)][-1], name)  # one training process is enough

    started = time.monotonic()
    code, text = interrupt(tmp_path, processes, f"Epoch 2/3  [3/{total}]", send)
    assert time.monotonic() - started < 120
    assert "stopped by a signal after epoch 2, step" in text and "continue with --resume auto" in text
    assert code == 75 if processes == 1 else code != 0
    last = int(text.split("stopped by a signal after epoch 2, step ")[1].split(",")[0])
    assert 3 <= last <= 6
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == last
    finish(tmp_path, processes)
    assert_same_run(tmp_path, whole(processes))


def test_compiled(tmp_path):
    """Warming up leaves no trace in a run, continued or not."""
    finish(tmp_path / "whole", 1, *COMPILED)
    code, text = interrupt(tmp_path / "killed", 1, "Epoch 2/3  [6/40]", kill, *COMPILED)
    assert code == -signal.SIGKILL and "compiled with" in text, text[-3000:]
    finish(tmp_path / "killed", 1, *COMPILED)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_torchrun_restarts_what_died(tmp_path, whole):
    """A process kills itself once; --max-restarts=1 starts all of them again, and --resume auto goes on."""
    done = die(tmp_path, 2, "2 step 7", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists() and "epoch 1 is done, and 4 steps after it" in done.stdout
    assert_same_run(tmp_path, whole(2))


def test_killed_anywhere_in_the_last_save(tmp_path):
    """Each time the resumed run leaves what the uninterrupted one leaves: log.txt and all checkpoints."""
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "tests/killed_saves.py", str(make_images(tmp_path / "images")), str(tmp_path / "runs")],
        env={**ENV, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 15


def test_the_number_of_workers_changes_nothing(tmp_path, whole):
    finish(tmp_path, 1, "--num_workers", "2")
    assert_same_run(tmp_path, whole(1))
