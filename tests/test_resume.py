"""Runs that are stopped, killed and continued, against the run that nothing happened to: equal bit for bit.

Everything happens in processes of its own: the run that nothing happens to, and torchrun's, start as a user starts
them, the others as forks (forks.py). Mixup, EMA, repeated augmentation, random erasing, dropout, drop path and all
five terms are on, and the run measures redundancy as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import torch
from pictures import save_photo
from processes import PATIENCE
from small_runs import assert_same, make_images

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds a launcher's processes in /proc")

ROOT = Path(__file__).parents[1]
SAMPLES = 256  # of an epoch: repeated augmentation takes a multiple of 256
BATCH = 8
FLAGS = ["--model", "deit_tiny_patch16_224_diverse", "--input-size", "16", "--device", "cpu", "--model-kwargs"]
FLAGS += ["patch_size=4", "embed_dim=24", "depth=2", "num_heads=2", "--batch-size", str(BATCH)]
FLAGS += ["--drop", "0.1", "--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "1", "--num_workers", "0"]
FLAGS += ["--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--emb_contrast_cross_coef", "0.5"]
FLAGS += ["--attn_cos_within_coef", "1e-4", "--weight_mha_cond_orth_coef", "5e-4", "--model-ema-decay", "0.9"]
FLAGS += ["--measure", "patch.cno@last", "--print-freq", "1", "--epochs", "3", "--save-interval-steps", "4"]
COMPILED = ["--torchcompile", "aot_eager", "--epochs", "2", "--emb_contrast_cross_coef", "0"]
COMPILED += ["--model-kwargs", "patch_size=4", "embed_dim=24", "depth=1", "num_heads=2"]  # for compiling takes time
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """As many as an epoch has samples, and few to evaluate."""
    root = tmp_path_factory.mktemp("data")
    for half, count in (("train", SAMPLES), ("val", 40)):
        for i in range(count):
            save_photo(root / half / f"class{i % 4}" / f"{i}.png", seed=i, width=16, height=16)
    return root


def words(images: Path, folder: Path, *extra: str) -> list[str]:
    where = ["--data-path", str(images), "--output_dir", str(folder)]
    return [*FLAGS, *where, "--resume", "auto", *extra]


def steps(processes: int) -> int:
    """Of an epoch."""
    return SAMPLES // BATCH // processes


def as_a_user(launcher: list[str], *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A run in a new interpreter."""
    return subprocess.run(
        [sys.executable, *launcher, *argv],
        env={**ENV, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def finish(images: Path, folder: Path, processes: int, *extra: str) -> str:
    """Run to the end."""
    done = forks.run(processes, "main.py", *words(images, folder, *extra), env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interrupt(processes: int, argv: list[str], when: str, how: Callable[[forks.Group], None]) -> tuple[int, str]:
    """Start the run, and do something to it when a line of its output contains `when`."""
    reading, writing = os.pipe()
    run = forks.Group(processes, "main.py", argv, ENV, writing, writing)
    os.close(writing)
    seen: list[str] = []
    with open(reading) as output:
        for line in output:
            seen.append(line)
            if when in line:
                how(run)
                break
        seen += list(output)
    return run.wait(), "".join(seen)


def assert_same_run(folder: Path, expected: Path) -> None:
    """All checkpoints' tensors and numbers, and all log lines; only the folder and the workers may differ."""
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        one, other = (torch.load(each / name, weights_only=True) for each in (folder, expected))
        for state in (one, other):
            del state["args"]["output_dir"], state["args"]["num_workers"]
        assert_same(one, other, name)
    assert (folder / "log.txt").read_text() == (expected / "log.txt").read_text()


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Callable[[int], Path]:
    """The run that nothing happens to, for a number of processes."""
    runs: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in runs:
            runs[processes] = tmp_path_factory.mktemp(f"whole{processes}")
            if processes == 1:
                done = as_a_user(["main.py"], *words(images, runs[1]))
                assert done.returncode == 0, done.stderr[-3000:]
            else:
                finish(images, runs[processes], processes)
        return runs[processes]

    return run


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_killed_in_the_middle_of_an_epoch(images, tmp_path, whole, processes):
    """SIGKILL after a step that is no checkpoint's, twice. From three processes on, the order of sums matters."""
    total = steps(processes)
    for epoch, step in ((1, 6), (2, total - 1)):
        place = f"Epoch {epoch}/3  [{step}/{total}]"
        code, text = interrupt(processes, words(images, tmp_path), place, forks.Group.kill)
        assert code == -signal.SIGKILL and place in text, text[-3000:]
    assert "resumed" in finish(images, tmp_path, processes)
    assert_same_run(tmp_path, whole(processes))


@pytest.mark.parametrize(("processes", "epoch"), [(1, 1), (1, 3), (2, 2)])
def test_killed_during_an_evaluation(images, tmp_path, whole, processes, epoch):
    """Nothing is trained again: the run goes on with the evaluation, of model and EMA."""
    dying = {**ENV, "DIES": f"{epoch} batch 2"}
    done = forks.run(processes, "tests/dying_main.py", *words(images, tmp_path), env=dying)
    total = steps(processes)
    assert done.returncode != 0 and f"Epoch {epoch}/3  [{total}/{total}]" in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "died").exists() and done.stdout.count("Max accuracy") == epoch - 1
    shown = finish(images, tmp_path, processes)
    assert f"Epoch {epoch}/3" not in shown and shown.count("Max accuracy") == 4 - epoch
    assert_same_run(tmp_path, whole(processes))


@pytest.mark.parametrize(("processes", "name"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_stopped_by_a_signal(images, tmp_path, whole, processes, name):
    """The step is finished, a checkpoint is written, and the exit code says so."""
    total = steps(processes)

    def send(run: forks.Group) -> None:
        run.forks[-1].send_signal(name)  # one training process is enough

    code, text = interrupt(processes, words(images, tmp_path), f"Epoch 2/3  [3/{total}]", send)
    assert "stopped by a signal after epoch 2, step" in text and "continue with --resume auto" in text
    assert code == 75
    last = int(text.split("stopped by a signal after epoch 2, step ")[1].split(",")[0])
    assert 3 <= last <= 6
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == last
    finish(images, tmp_path, processes)
    assert_same_run(tmp_path, whole(processes))


def test_compiled(images, tmp_path):
    """Warming up leaves no trace in a run, continued or not."""
    finish(images, tmp_path / "whole", 1, *COMPILED)
    argv = words(images, tmp_path / "killed", *COMPILED)
    code, text = interrupt(1, argv, f"Epoch 2/2  [6/{steps(1)}]", forks.Group.kill)
    assert code == -signal.SIGKILL and "compiled with" in text, text[-3000:]
    finish(images, tmp_path / "killed", 1, *COMPILED)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_torchrun_restarts_what_died(images, tmp_path, whole):
    """A process kills itself once; --max-restarts=1 starts all of them again, and --resume auto goes on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    dying = {"PYTHONPATH": str(ROOT), "DIES": "2 step 7"}
    done = as_a_user([*launcher, "tests/dying_main.py"], *words(images, tmp_path), **dying)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists() and "epoch 1 is done, and 4 steps after it" in done.stdout
    assert_same_run(tmp_path, whole(2))


def test_killed_anywhere_in_the_last_save(tmp_path):
    """Each time the resumed run leaves what the uninterrupted one leaves: log.txt and all checkpoints."""
    (tmp_path / "runs").mkdir()
    few = make_images(tmp_path / "images")
    done = forks.run(1, "tests/killed_saves.py", str(few), str(tmp_path / "runs"), env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 15


def test_the_number_of_workers_changes_nothing(images, tmp_path, whole):
    finish(images, tmp_path, 1, "--num_workers", "2")
    assert_same_run(tmp_path, whole(1))
