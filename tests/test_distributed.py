"""Several gloo processes, started by torchrun or as forks (forks.py) that know of one another."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from processes import PATIENCE
from torch import nn

from datasets import build_dataset
from engine import Precision, evaluate_together
from loaders import build_eval_loader
from models import DiverseViT, build_model
from options import config

ROOT = Path(__file__).parents[1]
NO_LAUNCHER = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "MASTER_"))}


def torchrun(processes: int, script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """By the launcher itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**NO_LAUNCHER, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(ROOT / script), *argv],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def together(processes: int, script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """As forks, which start faster."""
    return forks.run(processes, script, *argv, env=NO_LAUNCHER)


COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"inductor compiles with {COMPILER}")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--static-graph",
        "--torchcompile aot_eager --grad-checkpointing",
        pytest.param("--torchcompile inductor --grad-checkpointing --static-graph", marks=needs_compiler),
    ],
)
def test_gradients_are_the_mean_of_the_processes(flags):
    """With an EMA; in DDP, compiled and recomputing, against eager single processes."""
    process = together(2, "tests/ddp_step.py", *flags.split())
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize(
    ("how", "timeout", "says"),
    [(signal.SIGKILL, "600", "Connection"), (signal.SIGSTOP, "4", "Timed out waiting 4000ms")],
)
def test_a_process_that_dies_or_hangs_ends_the_other(tmp_path, how, timeout, says):
    """Without a launcher that would do it. The one that is left says so in one line."""
    argv = ["--data-set", "DIGITS", "--model", "deit_tiny_patch16_224", "--input-size", "16", "--device", "cpu"]
    argv += ["--model-kwargs", "patch_size=4", "embed_dim=24", "depth=2", "num_heads=2", "--num_workers", "0"]
    argv += ["--batch-size", "32", "--epochs", "1000", "--print-freq", "1", "--dist-timeout", timeout]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**NO_LAUNCHER, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    reading, writing = os.pipe()
    with open(reading) as shown, tempfile.TemporaryFile("w+") as errors:
        left, lost = (
            forks.Fork(
                ROOT / "main.py",
                argv,
                {**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
                writing,
                errors.fileno(),
            )
            for rank in range(2)
        )
        os.close(writing)
        try:
            while "[3/" not in shown.readline():
                assert left.poll() is None
            lost.send_signal(how)
            code = left.wait()
        finally:
            left.kill(), lost.kill()
            left.wait(), lost.wait()
        errors.seek(0)
        error = errors.read()
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.startswith("main.py")]
    assert line.startswith("main.py: error: process 0 of 2 has lost another one (") and says in line
    assert line.endswith("continue with --resume auto") and "Traceback" not in error


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """17 validation images in 5 classes (17 divides by neither 2 nor 3), and weights to evaluate."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(17):
        for split in ("train", "val"):
            path = root / split / str(i % 5) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    torch.save(build_model("deit_tiny_patch16_224", **TINY).state_dict(), root / "weights.pth")
    return root


def flags(folder: Path) -> list[str]:
    kwargs = [f"{key}={value}" for key, value in TINY.items() if key not in ("img_size", "num_classes")]
    base = ["--data-path", str(folder), "--model", "deit_tiny_patch16_224", "--input-size", "32", "--device", "cpu"]
    return [*base, "--num_workers", "0", "--model-kwargs", *kwargs, "--batch-size", "2"]


def test_accuracy_is_the_same_on_1_2_and_3_processes(folder):
    """Every sample counts once, whatever the number of processes."""
    argv = [*flags(folder), "--eval", "--resume", str(folder / "weights.pth")]
    argv += ["--measure", "patch.pairwise_cosine@last"]
    outputs = []
    for processes, how in ((1, []), (2, []), (3, []), (3, ["--no-dist-eval"])):
        process = together(processes, "main.py", *argv, *how)
        assert process.returncode == 0, process.stderr[-3000:]
        outputs.append(process.stdout)
    assert re.search(r"\* Acc@1 \d+\.\d{3} Acc@5 100\.000 loss 1\.\d{3}", outputs[0]), outputs[0]
    assert "on the 17 test images" in outputs[0] and "patch.pairwise_cosine@last 0." in outputs[0]
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


def test_an_evaluation_reads_each_image_once(folder):
    """Over eight processes, for model and EMA together; --no-dist-eval lets every process read all of them."""

    def read(*how: str) -> Counter[int]:
        args = config.resolve(["--data-path", str(folder), "--input-size", "16", "--num_workers", "0", *how])
        images, _ = build_dataset(False, args)
        decoded: Counter[int] = Counter()
        decode = images.decode
        images.decode = lambda index: decoded.update([index]) or decode(index)
        networks = [DiverseViT(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))) for _ in range(2)]
        for rank in range(8):
            loader = build_eval_loader(args, images, 8, rank, torch.device("cpu"))
            evaluate_together(networks, loader, Precision(torch.device("cpu")))
        return decoded

    assert read() == dict.fromkeys(range(17), 1)
    assert read("--no-dist-eval") == dict.fromkeys(range(17), 8)


def test_two_processes_train_as_one_run(folder, tmp_path):
    """torchrun end to end: one log, one checkpoint, the global batch and rate of both processes."""
    argv = [*flags(folder), "--no-repeated-aug", "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    process = torchrun(2, "main.py", *argv, "--mixing_coef", "1", "--weight_mha_cond_orth_coef", "5e-4")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("Max accuracy") == 1 and "global batch 4" in process.stdout
    assert "2 process(es)" in process.stdout
    assert len((tmp_path / "run/log.txt").read_text().splitlines()) == 1
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["epoch"] == 0


def test_every_process_averages_the_same_weights(folder, tmp_path):
    """The EMA that two processes evaluate together is the one in the checkpoint."""
    argv = [*flags(folder), "--no-repeated-aug", "--epochs", "1", "--output_dir", str(tmp_path)]
    process = together(2, "main.py", *argv, "--model-ema-decay", "0.9")
    assert process.returncode == 0, process.stderr[-3000:]
    trained = re.findall(r"Acc@1 [\d.]+ Acc@5 [\d.]+ loss [\d.]+", process.stdout)
    alone = together(1, "main.py", *flags(folder), "--eval", "--resume", str(tmp_path / "checkpoint.pth"))
    assert trained == re.findall(r"Acc@1 [\d.]+ Acc@5 [\d.]+ loss [\d.]+", alone.stdout) and len(trained) == 2


def test_shards_are_evaluated_together_as_alone():
    """Model and EMA in one pass, in DDP's processes and in shards, with shares of different sizes."""
    process = together(2, "tests/one_pass.py")
    assert process.returncode == 0, process.stderr[-3000:]


def test_a_mistake_of_one_process_is_reported_by_it(folder, tmp_path):
    """A damaged image in the second process's share."""
    shutil.copytree(folder, tmp_path / "copy")
    for path in sorted((tmp_path / "copy" / "val").glob("*/*.png"))[1::2]:
        path.write_bytes(b"no image")
    argv = [*flags(tmp_path / "copy"), "--eval", "--resume", str(folder / "weights.pth")]
    process = together(2, "main.py", *argv)
    assert process.returncode != 0
    assert process.stderr.count("main.py: error: cannot decode image") == 1, process.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("launcher", ["slurm", "own"])
def test_other_launchers(folder, tmp_path, launcher):
    """Two processes as srun would start them, or by hand: RANK, --world_size and --dist_url."""
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [*flags(folder), "--no-repeated-aug", "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    command += [] if launcher == "slurm" else ["--world_size", "2", "--dist_url", address]
    processes, outputs = [], []
    with contextlib.ExitStack() as files:
        for rank in range(2):
            slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
            slurm |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
            env = {**NO_LAUNCHER, **(slurm if launcher == "slurm" else {"RANK": str(rank)})}
            out, err = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            processes.append(forks.Fork(ROOT / "main.py", command, env, out.fileno(), err.fileno()))
            outputs.append((out, err))
        codes = [process.wait() for process in processes]
        for file in itertools.chain(*outputs):
            file.seek(0)
        outputs = [(out.read(), err.read()) for out, err in outputs]
    assert codes == [0, 0], outputs[0][1][-3000:]
    assert "2 process(es)" in outputs[0][0] and outputs[1][0] == ""
    assert len((tmp_path / "run/log.txt").read_text().splitlines()) == 1


def test_a_mistake_is_reported_once(folder):
    process = together(2, "main.py", *flags(folder), "--model", "deit_smal_patch16_224")
    assert process.returncode != 0
    assert process.stderr.count("main.py: error: unknown model 'deit_smal_patch16_224'") == 1
