"""What a checkpoint of a run holds, when it is written, and which resumes are refused."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_batch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import engine
import main
from engine import Finite, Precision, Updater, train_one_epoch
from errors import Interrupted, TrainingDiverged, UserError
from loggers.text import read_lines, set_aside
from losses import Objective
from mixing.mixup import Mixup
from options import config
from program import Signals
from state import checkpoint
from state import saver as saver_module
from state.run_state import RunState
from state.saver import Saver
from utils import set_streams, streams

CPU = Precision(torch.device("cpu"))
VIT = ["--model", "deit_tiny_patch16_224", "--input-size", "16", "--device", "cpu", "--num_workers", "0"]
VIT += ["--model-kwargs", "patch_size=4", "embed_dim=24", "depth=2", "num_heads=2"]
RUN = ["--data-set", "DIGITS", *VIT, "--batch-size", "64", "--lr", "2e-3", "--unscale-lr", "--epochs", "2"]
RUN += ["--warmup-epochs", "0", "--reg", "patch.cosine=0.5"]


@pytest.fixture
def make_run(tiny) -> Callable[..., RunState]:
    def make(*argv: str) -> RunState:
        args = config.plain(config.resolve(["--data-set", "DIGITS", "--batch-size", "4", *argv]))
        model, _ = tiny()
        optimizer = create_optimizer_v2(model.backbone, opt="adamw", lr=1e-3)
        schedule, _ = create_scheduler_v2(optimizer, num_epochs=5)
        return RunState(model, optimizer, schedule, CPU.scaler, None, args, Mixup(seed=3))

    return make


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def assert_equal_runs(one: Path, other: Path) -> None:
    """All weights, and all log lines."""
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()
    states = [checkpoint.load(str(folder / "checkpoint.pth")) for folder in (one, other)]
    for key in ("model", "model_ema"):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name]), name


# ------------------------------------------------------------------------------------------------------------
# Random streams


def test_streams_go_on_where_they_were():
    mixup, other = Mixup(seed=1), Mixup(seed=2)
    mixup.random.standard_normal()
    np.random.standard_normal()  # leaves half a pair behind, which is part of the state
    random.gauss(0, 1)
    state = streams(CPU.device, mixup.random)

    def draws(source: Mixup) -> list[float]:
        numbers = [random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item(), torch.randn(()).item()]
        return [*numbers, source.random.standard_normal(), source.random.beta(0.8, 0.8)]

    expected = draws(mixup)
    assert draws(mixup) != expected
    set_streams(state, CPU.device, other.random)
    assert draws(other) == expected


# ------------------------------------------------------------------------------------------------------------
# When a run saves and stops


def test_minutes_between_checkpoints(make_run, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now[0])
    saver = Saver(make_run(), tmp_path, Signals(), minutes=2.0)
    saved = []
    for step in range(1, 8):
        now[0] += 50.0
        end_step(saver, step)
        if (tmp_path / "checkpoint.pth").exists():
            saved.append(step)
            (tmp_path / "checkpoint.pth").unlink()
    assert saved == [3, 6]  # after 150 and 300 seconds


def test_steps_between_checkpoints(make_run, tmp_path):
    run = make_run()
    saver = Saver(run, tmp_path, Signals(), keep=3, steps=2)
    for step in range(1, 8):
        end_step(saver, step)
    names = ["checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth"]
    assert [checkpoint.load(str(tmp_path / name))["step"] for name in names] == [6, 4, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def end_step(saver: Saver, step: int) -> None:
    """What the loop does at the end of a step."""
    running = saver.run_state.running
    running.finite.ask({"loss": torch.tensor(1.0)})
    assert running.finite.verdict(step)
    running.step = step
    saver.after_step(step)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_step(make_run, tmp_path, name):
    before = signal.getsignal(name)
    with Signals() as signals:
        saver = Saver(make_run(), tmp_path, signals)
        end_step(saver, 1)
        os.kill(os.getpid(), name)
        with pytest.raises(Interrupted, match=r"after epoch 1, step 2, and saved: continue with --resume auto"):
            end_step(saver, 2)
        with pytest.raises(Interrupted, match=r"after epoch 1, step 2; nothing is saved without --output_dir"):
            end_step(Saver(saver.run_state, None, signals), 2)
    assert checkpoint.load(str(tmp_path / "checkpoint.pth"))["step"] == 2
    assert signal.getsignal(name) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_signal_during_the_evaluation(tmp_path, monkeypatch, call):
    """In the first epoch, in the last, or never: the run stops, and goes on as if it had not."""
    argv = [*RUN, "--model-ema-decay", "0.9", "--resume", "auto", "--output_dir"]
    assert main.main([*argv, str(tmp_path / "whole")]) == 0
    calls, evaluate_together = [], engine.evaluate_together

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_together(*args, **kwargs)

    monkeypatch.setattr(main, "evaluate_together", interrupted)
    codes = [main.main([*argv, str(tmp_path / "stopped")]) for _ in range(2)]
    assert codes == ([75, 0] if call < 3 else [0, 0])
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")


def places(folder: Path) -> list[tuple[int, int]]:
    """The last finished epoch and the steps after it: of checkpoint.pth, checkpoint.1.pth, ..."""
    numbered = sorted(folder.glob("checkpoint.[0-9].pth"))
    return [checkpoint.progress(path) for path in [folder / "checkpoint.pth", *numbered]]


STEPS = 1437 // 256 * 256 // 64  # of an epoch of RUN


@pytest.mark.parametrize(
    ("interval", "older"),
    [
        ("0", [(1, 0), (0, 0)]),
        ("8", [(1, 16), (1, 8), (1, 0)]),
        ("10", [(1, 10), (1, 0), (0, 10)]),  # the last step is saved anyway
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_an_epoch_is_saved_before_its_evaluation(tmp_path, monkeypatch, interval, older, fails):
    """That file gives way to the epoch's last one, also if the evaluation failed; none of the older ones does."""
    found, evaluate_together = [], engine.evaluate_together

    def watched(*args, **kwargs):
        found.append(places(tmp_path))
        if fails and len(found) == 3:
            raise UserError("a bad image")
        return evaluate_together(*args, **kwargs)

    monkeypatch.setattr(main, "evaluate_together", watched)
    argv = [*RUN, "--epochs", "3", "--save-interval-steps", interval, "--checkpoint-hist", "4"]
    argv += ["--resume", "auto", "--output_dir", str(tmp_path)]
    codes = [main.main(argv) for _ in range(2 if fails else 1)]
    assert codes == ([2, 0] if fails else [0])
    assert found[2:] == [[(1, STEPS), *older]] * len(codes)
    assert places(tmp_path) == [(2, 0), *older]


# ------------------------------------------------------------------------------------------------------------
# What is never saved


def test_weights_that_are_not_finite_are_never_saved(make_run, tmp_path):
    """The loss is finite, and a gradient is not."""
    run = make_run()
    Saver(run, tmp_path, Signals()).save()
    good = checkpoint.load(str(tmp_path / "checkpoint.pth"))
    handle = run.model.backbone.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    saver = Saver(run, tmp_path, Signals(), steps=1)
    updater = Updater(run.optimizer, CPU)
    with pytest.raises(
        TrainingDiverged, match=r"head.weight is no longer finite after epoch 1, step 1: a gradient"
    ):
        train_one_epoch(
            *(run.model, Objective(), [random_batch()], updater, Mixup(0, 0), run.running), observers=[saver]
        )
    handle.remove()
    kept = checkpoint.load(str(tmp_path / "checkpoint.pth"))
    assert all(torch.equal(value, kept["model"][name]) for name, value in good["model"].items())


# ------------------------------------------------------------------------------------------------------------
# Resumes that cannot be exact


def saved_in_the_middle(run: RunState, processes: int = 1) -> dict:
    run.running.step = 3
    state = run.state_dict()
    state["processes"] = state["processes"] * processes
    return state


def test_another_number_of_processes(make_run, capsys):
    state = saved_in_the_middle(make_run(), processes=2)
    with pytest.raises(UserError, match=r"in the middle of an epoch by 2 processes, not 1: resume with as many"):
        make_run().load_state_dict(state, "x.pth")
    state["step"] = 0
    run = make_run()
    run.load_state_dict(state, "x.pth")
    assert "note: x.pth is of 2 processes, not 1: other random draws" in capsys.readouterr().out
    before = torch.get_rng_state()
    run.restore_streams()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_that_was_dropped_is_remembered(make_run):
    run, other = make_run(), make_run()
    run.running.finite.ask({"ce": torch.tensor(float("nan"))})
    assert not run.running.finite.verdict(1)
    run.running.step = 1
    other.load_state_dict(run.state_dict(), "x.pth")
    assert (other.running.finite.in_a_row, other.running.finite.dropped) == (1, 1)
    other.finish_epoch({"loss": 1.0}, {"acc1": 1.0}, {})
    assert (other.running.finite.in_a_row, other.running.finite.dropped) == (1, 0)


def test_replaced_images_are_remembered_while_the_flag_is_on(make_run):
    run, skipping, strict = make_run(), make_run("--skip-bad-images"), make_run()
    run.replaced = torch.tensor([False, True, False, True])
    skipping.replaced = torch.zeros(4, dtype=torch.bool)
    run.running.step, run.samples_per_step = 1, 3  # the last sample was read ahead
    state = run.state_dict()
    skipping.load_state_dict(state, "x.pth")
    assert skipping.replaced.tolist() == [False, True, False, False]
    strict.load_state_dict(state, "x.pth")
    assert len(strict.replaced) == 0


def test_a_file_without_a_log_goes_on_with_the_folders(make_run, tmp_path):
    """Checkpoints of DeiT and of earlier versions have none."""
    run = make_run()
    run.epoch = 1
    state = run.state_dict()
    del state["log"], state["processes"], state["step"]
    lines = [json.dumps({"epoch": epoch}) for epoch in range(4)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    other = make_run()
    other.load_state_dict(state, "x.pth")
    assert not other.log and other.resumed
    assert read_lines(tmp_path / "log.txt", other.epoch) == lines[:2]
    set_aside(tmp_path / "log.txt")
    assert (tmp_path / "log.old.txt").read_text().splitlines() == lines and not (tmp_path / "log.txt").exists()


# ------------------------------------------------------------------------------------------------------------
# Whole runs


def test_resume_auto_skips_a_damaged_file(tmp_path, capsys):
    argv = [*RUN, "--resume", "auto", "--output_dir", str(tmp_path)]
    assert main.main(argv) == 0
    assert "no checkpoint in" in capsys.readouterr().out
    whole = (tmp_path / "log.txt").read_text()
    content = bytearray((tmp_path / "checkpoint.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint.pth").write_bytes(content)
    (tmp_path / "checkpoint_best.pth").unlink()
    assert main.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"warning: skipped: {tmp_path}/checkpoint.pth is" in shown
    assert f"resumed {tmp_path}/checkpoint.1.pth: epoch 1 is done, best top-1" in shown
    assert (tmp_path / "log.txt").read_text() == whole


@pytest.fixture
def images_with_faults(tmp_path) -> Path:
    """300 training images, of which 3 are cut off, and 8 validation images."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 300), ("val", 8)):
        for i in range(count):
            path = tmp_path / "data" / split / str(i % 2) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    for name in ("0/004.png", "0/100.png", "1/201.png"):
        path = tmp_path / "data" / "train" / name
        path.write_bytes(path.read_bytes()[:300])
    return tmp_path / "data"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_bad_images_are_counted_exactly_across_a_stop(images_with_faults, tmp_path, monkeypatch, workers, capfd):
    argv = ["--data-path", str(images_with_faults), *VIT, "--batch-size", "32", "--epochs", "1", "--resume", "auto"]
    argv += ["--no-repeated-aug", "--num_workers", workers, "--output_dir"]
    assert main.main([*argv, str(tmp_path / "refused")]) == 2
    error = capfd.readouterr().err
    assert "cannot decode image" in error and "or give --skip-bad-images" in error
    argv.insert(0, "--skip-bad-images")
    assert main.main([*argv, str(tmp_path / "whole")]) == 0
    wish = Saver.wish
    monkeypatch.setattr(Saver, "wish", lambda self: Saver.STOP if self.run_state.running.step == 4 else wish(self))
    assert main.main([*argv, str(tmp_path / "stopped")]) == 75
    monkeypatch.undo()
    assert main.main([*argv, str(tmp_path / "stopped")]) == 0
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[: 300 // 32 * 32].tolist()
    bad = {2, 50, 250}  # positions of the three files in the sorted folders
    assert log_of(tmp_path / "whole")[0]["train_bad_images"] == len(bad & set(order))


def test_a_bad_validation_image_costs_no_training(images_with_faults, tmp_path, capfd):
    """It is found in the first epoch's evaluation; once it is repaired, the run goes on from there."""
    argv = ["--data-path", str(images_with_faults), *VIT, "--batch-size", "32", "--epochs", "2", "--resume", "auto"]
    argv += ["--no-repeated-aug", "--skip-bad-images", "--print-freq", "1", "--model-ema-decay", "0.9"]
    argv += ["--output_dir"]
    assert main.main([*argv, str(tmp_path / "whole")]) == 0
    image = images_with_faults / "val" / "1" / "007.png"
    content = image.read_bytes()
    image.write_bytes(content[:200])
    capfd.readouterr()
    assert main.main([*argv, str(tmp_path / "run")]) == 2
    shown = capfd.readouterr()
    assert "Epoch 1/2  [9/9]" in shown.out and "Acc@1" not in shown.out
    (line,) = [line for line in shown.err.splitlines() if line.startswith("main.py: error")]
    assert f"cannot decode image {image}" in line and "--skip-bad-images" not in line
    assert not (tmp_path / "run" / "log.txt").exists()
    image.write_bytes(content)
    assert main.main([*argv, str(tmp_path / "run")]) == 0
    shown = capfd.readouterr()
    assert "Epoch 1/2" not in shown.out and "Epoch 2/2  [9/9]" in shown.out
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_deterministic_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        for name in ("one", "other"):
            assert main.main([*RUN, "--epochs", "1", "--deterministic", "--output_dir", str(tmp_path / name)]) == 0
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_runs(tmp_path / "one", tmp_path / "other")


def test_nonfinite_flags_reach_the_loop(tmp_path, capsys):
    broken = [*RUN, "--epochs", "1", "--lr", "1e30", "--opt", "sgd"]
    assert main.main([*broken, "--nonfinite", "stop"]) == 1
    assert "1 step(s) in a row up to step 2" in capsys.readouterr().err
    assert main.main([*broken, "--nonfinite-patience", "4"]) == 1
    shown = capsys.readouterr()
    assert "4 step(s) in a row up to step 5" in shown.err
    assert shown.out.count("is dropped, ce is not finite") == 3
    finite = Finite()
    assert (finite.policy, finite.patience) == ("skip", 10)
