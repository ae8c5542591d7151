"""Models in shards: the steps and runs of DDP, exact continuation, checkpoints that anything reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from fsdp_runs import FLAGS, TWO
from test_distributed import together
from test_resume import assert_same_run

import main


def test_shards_take_ddps_steps():
    """Gradients, weights, EMA, optimizer, evaluation, faults, precision, families, refusals: see fsdp_step.py."""
    process = together(2, "tests/fsdp_step.py")
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """The folder of all runs of fsdp_runs.py, and what they printed."""
    folder = tmp_path_factory.mktemp("fsdp")
    process = together(2, "tests/fsdp_runs.py", str(folder))
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process.stdout


@pytest.mark.parametrize("name", ["shards", "shards_then_ddp", "ddp_then_shards"])
def test_runs_agree_with_ddp(runs, name):
    """Log lines and checkpoints, but for rounding; also where shards and DDP take turns."""
    folder, _ = runs
    logs = [(folder / run / "log.txt").read_text().splitlines() for run in ("ddp", name)]
    assert len(logs[0]) == 2
    for expected, found in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    expected, found = (torch.load(folder / run / "checkpoint.pth", weights_only=True) for run in ("ddp", name))
    assert list(found) == list(expected)
    for key in ("model", "model_ema"):
        assert list(found[key]) == list(expected[key])
        for weight, value in found[key].items():
            torch.testing.assert_close(value, expected[key][weight], rtol=1e-3, atol=1e-5)


def test_a_stopped_run_goes_on_exactly(runs):
    """Stopped within an epoch, and within its evaluation."""
    folder, shown = runs
    assert shown.count("stopped by a signal after epoch 1, step") == 2
    assert_same_run(folder / "parts", folder / "shards")


def test_one_process_reads_the_checkpoint(runs, tmp_path, capsys):
    """It finds the same accuracy, and goes on with the run."""
    folder, shown = runs
    pattern = r"\* Acc@1 .*"
    trained = re.findall(pattern, shown)[-2:]  # the last run of fsdp_runs.py evaluates
    assert main.main([*FLAGS, *TWO, "--eval", "--resume", str(folder / "shards" / "checkpoint.pth")]) == 0
    assert re.findall(pattern, capsys.readouterr().out) == trained and len(trained) == 2
    last = json.loads((folder / "shards" / "log.txt").read_text().splitlines()[-1])
    assert f"Acc@1 {last['test_acc1']:.3f}" in trained[0] and f"Acc@1 {last['ema_test_acc1']:.3f}" in trained[1]
    argv = [*FLAGS, "--batch-size", "128", "--resume", str(folder / "shards" / "checkpoint.2.pth")]
    assert main.main([*argv, "--output_dir", str(tmp_path)]) == 0
    assert "of 2 processes, not 1: other random draws" in capsys.readouterr().out
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_shards_need_several_processes(capsys):
    assert main.main([*FLAGS, "--fsdp"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fsdp shares the model out among processes, and this is one" in line
