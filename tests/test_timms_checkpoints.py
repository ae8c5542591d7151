"""Checkpoints of timm's training script, with their moving average, wherever weights are taken; ours in timm."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_runs import FLAGS, MODEL, make_images, saved, train
from timm.models import load_state_dict
from timm.utils import CheckpointSaver, ModelEmaV3

import main
from errors import UserError
from state.preprocessing import preprocessing_of
from state.trained import read_trained

ARCHITECTURE, CLASSES, PIXELS = "deit_tiny_patch16_224", 2, 8
KWARGS = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
# What timm's script saves of its flags where they are not given, as far as they say what a model is.
TIMMS = {"model": ARCHITECTURE, "model_kwargs": KWARGS, "img_size": PIXELS, "num_classes": CLASSES} | dict.fromkeys(
    ("input_size", "in_chans", "gp", "mean", "std", "crop_pct", "crop_mode", "clip_grad", "opt_eps", "resume")
)
TIMMS |= {"interpolation": "", "class_map": "", "opt": "sgd", "lr": 0.1, "weight_decay": 2e-5}


def save_as_timm(folder: Path, ema: bool = True, **flags: Any) -> tuple[Path, torch.nn.Module, torch.nn.Module]:
    """A checkpoint by timm's own saver; the trained model and its average, which differ."""
    args = argparse.Namespace(**{**TIMMS, **flags})
    torch.manual_seed(5)
    pixels = args.img_size or args.input_size[-2:]
    pooled = {"global_pool": args.gp} if args.gp else {}
    model = timm.create_model(args.model, num_classes=CLASSES, img_size=pixels, **pooled, **args.model_kwargs)
    average = ModelEmaV3(model)
    with torch.no_grad():
        for weights in (model, average.module):
            for parameter in weights.parameters():
                parameter.normal_(std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, args, average if ema else None, checkpoint_dir=str(folder))
    saver.save_checkpoint(3, metric=71.5)
    return folder / "last.pth.tar", model.eval(), average.module.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def same(one: dict[str, Any], model: torch.nn.Module) -> bool:
    return all(torch.equal(one[name], value) for name, value in model.state_dict().items())


def test_a_model_is_built_from_what_the_file_says(tmp_path):
    file, model, average = save_as_timm(tmp_path)
    for weights, expected in (("auto", average), ("ema", average), ("raw", model)):
        trained = read_trained(str(file), weights)
        assert same(trained.backbone.state_dict(), expected)
        assert (trained.name, trained.image_shape) == (ARCHITECTURE, (3, PIXELS, PIXELS))
    file, model, _ = save_as_timm(tmp_path / "none", ema=False)
    assert same(read_trained(str(file)).backbone.state_dict(), model)
    with pytest.raises(UserError, match="holds no EMA"):
        read_trained(str(file), "ema")


def test_what_its_flags_say_of_the_images(tmp_path):
    """--input-size C H W, --gp, and preprocessing, which is timm's for the model where nothing is said."""
    file, _, _ = save_as_timm(
        tmp_path, img_size=None, input_size=[3, 16, 16], gp="avg", crop_pct=0.9, mean=[0.5] * 3
    )
    trained = read_trained(str(file))
    assert trained.image_shape == (3, 16, 16) and trained.backbone.global_pool == "avg"
    assert list(trained.preprocessing.mean) == [0.5] * 3 and trained.preprocessing.crop_pct == 0.9
    file, _, _ = save_as_timm(tmp_path / "vit", model="vit_tiny_patch16_224")
    state = torch.load(file, weights_only=False)
    said = preprocessing_of(state, str(file), "vit_tiny_patch16_224", (3, 64, 64))
    assert list(said.mean) == [0.5] * 3 and said.crop_pct == 0.9  # of vit_tiny in timm


def evaluate(images: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Exit code and output of --eval, in timm's preprocessing."""
    code = main.main([*FLAGS, "--data-path", str(images), "--eval", *flags])
    return code, *capsys.readouterr()


def test_evaluation_chooses_the_weights(images, tmp_path, capsys):
    file, _, _ = save_as_timm(tmp_path)
    code, both, _ = evaluate(images, capsys, "--resume", str(file))
    assert code == 0 and [line.split()[3] for line in both.splitlines() if "Accuracy" in line] == ["network", "EMA"]
    lines = [line for line in both.splitlines() if line.startswith(("*", "Accuracy"))]
    for weights, expected in (("raw", lines[:2]), ("ema", lines[2:])):
        code, out, _ = evaluate(images, capsys, "--resume", str(file), "--weights", weights)
        assert code == 0 and [line for line in out.splitlines() if line.startswith(("*", "Accuracy"))] == expected
    file, _, _ = save_as_timm(tmp_path / "none", ema=False)
    code, _, err = evaluate(images, capsys, "--resume", str(file), "--weights", "ema")
    assert code == 2 and "holds no EMA" in err
    code, _, err = evaluate(images, capsys, "--weights", "ema")
    assert code == 2 and err.startswith("main.py: error: --weights ema chooses among a checkpoint's weights: give")


@pytest.mark.parametrize("weights", ["auto", "raw", "ema"])
def test_fine_tuning_starts_from_either(images, tmp_path, weights, capsys):
    """A rate of 0 leaves the weights as they were loaded."""
    file, model, average = save_as_timm(tmp_path / "timm")
    still = ["--lr", "0", "--min-lr", "0", "--warmup-epochs", "0", "--epochs", "1"]
    assert train(images, tmp_path / "run", "--finetune", str(file), "--weights", weights, *still) == 0
    assert same(saved(tmp_path / "run")["model"], average if weights == "ema" else model)
    assert ("the moving average in" in capsys.readouterr().out) == (weights == "ema")


def test_evaluating_a_run_that_was_fine_tuned_from_an_average(images, tmp_path, capsys):
    """By its own args.yaml, whose `weights` say what the run started from; and it keeps no average itself."""
    file, _, _ = save_as_timm(tmp_path / "timm")
    flags = ["--finetune", str(file), "--weights", "ema", "--epochs", "1", "--no-model-ema"]
    assert train(images, tmp_path / "run", *flags) == 0
    command = ["--config", str(tmp_path / "run" / "args.yaml"), "--eval"]
    command += ["--resume", str(tmp_path / "run" / "checkpoint.pth")]
    assert main.main(command) == 0
    assert "Accuracy of the network" in capsys.readouterr().out
    assert main.main([*command, "--weights", "ema"]) == 2
    assert "holds no EMA" in capsys.readouterr().err


def test_teachers(images, tmp_path, capsys):
    file, _, _ = save_as_timm(tmp_path)
    teacher = [
        "--teacher-model",
        ARCHITECTURE,
        "--teacher-model-kwargs",
        *MODEL[MODEL.index("--model-kwargs") + 1 :],
    ]
    found = {}
    for weights in ("auto", "raw", "ema"):
        flags = [*teacher, "--teacher-path", str(file), "--teacher_eval", "--teacher-weights", weights]
        assert main.main([*FLAGS, "--data-path", str(images), *flags]) == 0
        found[weights] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert found["auto"] == found["raw"] != found["ema"]
    assert main.main([*FLAGS, "--data-path", str(images), "--teacher-weights", "ema", "--epochs", "1"]) == 2
    assert "--teacher-weights ema is for the weights of --teacher-path FILE: give it" in capsys.readouterr().err


def test_resuming_one_says_what_can_be_done(images, tmp_path, capsys):
    file, _, _ = save_as_timm(tmp_path)
    assert train(images, None, "--resume", str(file)) == 2
    assert "cannot be resumed, it has no model, lr_scheduler; --finetune starts from" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Ours for timm


def test_our_history_says_how_good_its_weights_are(images, tmp_path):
    """timm's averaging takes the files with the best `metric`, and of each the average, where there is one."""
    assert train(images, tmp_path, "--epochs", "3", "--checkpoint-hist", "3") == 0
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    files = [tmp_path / name for name in ("checkpoint.2.pth", "checkpoint.1.pth", "checkpoint.pth")]
    for line, file in zip(log, files, strict=True):
        state = torch.load(file, weights_only=True)
        assert state["metric"] == line["ema_test_acc1"]
        assert same(load_state_dict(str(file)), read_trained(str(file), "ema").backbone)
    assert train(images, tmp_path / "plain", "--epochs", "1", "--no-model-ema") == 0
    (line,) = [json.loads(line) for line in (tmp_path / "plain" / "log.txt").read_text().splitlines()]
    assert saved(tmp_path / "plain")["metric"] == line["test_acc1"]


def test_a_state_within_an_epoch_has_no_metric(images, tmp_path, monkeypatch):
    """timm's averaging passes over files without one."""
    assert train(images, tmp_path, "--epochs", "1") == 0

    def broken(*unused: Any) -> None:
        raise UserError("stopped before the evaluation")

    monkeypatch.setattr(main, "evaluate_run", broken)
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto") == 2
    assert saved(tmp_path)["step"] and "metric" not in saved(tmp_path)
