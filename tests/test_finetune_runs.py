"""Whole runs that start from weights: fine-tuning, timm's, and evaluation with the preprocessing of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_runs import FLAGS, assert_same, make_images, saved, train
from timm.models import save_for_hf

import main
from state.saved_flags import flags_of

HALF = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
AT_REST = ["--lr", "0", "--weight-decay", "0", "--warmup-lr", "0", "--min-lr", "0", "--epochs", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """One epoch on images with a mean and deviation of 0.5."""
    folder = tmp_path_factory.mktemp("run")
    assert train(images, folder, "--epochs", "1", *HALF) == 0
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm writes for the Hugging Face hub: a model of three classes, for images of another mean."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(5)
    model: Any = timm.create_model("deit_tiny_patch16_224", num_classes=3, **SHAPE)
    with torch.no_grad():
        model.cls_token.normal_()
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.3, 0.4, 0.5),
        "num_classes": 3,
    }
    save_for_hf(model, str(folder), model_args=SHAPE, safe_serialization=True)
    return folder


def colours(folder: Path) -> tuple[Any, Any]:
    flags = flags_of(saved(folder))
    return flags["mean"], flags["std"]


# ------------------------------------------------------------------------------------------------------------
# Preprocessing follows the weights


def test_evaluation_is_that_of_the_run(trained: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a word on the command line: the numbers of the run's own last evaluation."""
    line = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    assert train(images, None, "--eval", "--resume", str(trained / "checkpoint.pth"), "--no-model-ema") == 0
    printed = capsys.readouterr().out
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in printed
    assert f"loss {line['test_loss']:.3f}" in printed
    other = ["--mean", "0", "0", "0", "--std", "1", "1", "1"]
    assert train(images, None, "--eval", "--resume", str(trained / "checkpoint.pth"), *other) == 0
    assert "mean 0 0 0, std 1 1 1" in capsys.readouterr().out


def test_a_resumed_run_goes_on_as_it_began(trained: Path, images: Path, tmp_path: Path) -> None:
    """The flags need not be repeated."""
    shutil.copytree(trained, tmp_path / "x")
    assert train(images, tmp_path / "x", "--epochs", "2", "--resume", "auto") == 0
    assert colours(tmp_path / "x") == ([0.5] * 3, [0.5] * 3)


def test_another_mean_is_refused_on_resume(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "x")
    flags = ["--epochs", "2", "--resume", "auto", "--mean", "0", "0", "0"]
    assert train(images, tmp_path / "x", *flags) == 2
    assert "was trained with --mean" in capsys.readouterr().err


def test_fine_tuning_takes_over_the_preprocessing(trained: Path, images: Path, tmp_path: Path) -> None:
    assert train(images, tmp_path, "--epochs", "1", "--finetune", str(trained / "checkpoint.pth")) == 0
    assert colours(tmp_path) == ([0.5] * 3, [0.5] * 3)
    assert "mean: [0.5, 0.5, 0.5]" in (tmp_path / "args.yaml").read_text()


def test_a_run_of_deits_says_nothing_of_it(images: Path, tmp_path: Path) -> None:
    assert train(images, tmp_path, "--epochs", "1") == 0
    assert colours(tmp_path) == (None, None)


# ------------------------------------------------------------------------------------------------------------
# --pretrained


def of_hub(hub: Path, *flags: str) -> list[str]:
    return ["--pretrained", "--model", f"local-dir:{hub}", *flags]


def test_pretrained_weights(hub: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of rate 0 leaves timm's weights as they are, but for the head of two classes."""
    assert train(images, tmp_path, *of_hub(hub, *AT_REST)) == 0
    printed = capsys.readouterr().out
    assert f"starting from the weights of local-dir:{hub} in timm; new: head.weight, head.bias" in printed
    assert "mean 0.1 0.2 0.3, std 0.3 0.4 0.5" in printed
    timms = timm.create_model(f"local-dir:{hub}", pretrained=True).state_dict()
    weights = saved(tmp_path)["model"]
    for name, value in timms.items():
        assert name.startswith("head") or torch.equal(weights[name], value), name
    assert weights["head.weight"].shape == (2, 12)
    assert colours(tmp_path) == ([0.1, 0.2, 0.3], [0.3, 0.4, 0.5])


def test_a_resumed_run_needs_timms_weights_no_more(hub: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(hub, tmp_path / "hub")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = of_hub(tmp_path / "hub", "--sched", "constant", "--epochs")
    assert train(images, whole, *argv, "2") == 0
    assert train(images, parts, *argv, "1") == 0
    (tmp_path / "hub" / "model.safetensors").unlink()
    assert train(images, parts, *argv, "2", "--resume", "auto") == 0
    assert_same(saved(parts)["model"], saved(whole)["model"])
    assert train(images, None, *argv, "2", "--eval", "--resume", str(whole / "checkpoint.pth")) == 0


def test_timms_weights_are_evaluated(hub: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, None, *of_hub(hub, "--eval")) == 0
    assert "untrained" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pretrained", "--finetune", "FILE"], "--pretrained and --finetune both say what weights to start from"),
        (
            ["--pretrained", "--model", "deit_small_layer24_patch16_224"],
            "there are no pretrained weights for deit_small",
        ),
        (["--pretrained", "--model", "local-dir:/nowhere"], "/nowhere"),
        (["--pretrained", "--model", "HUB", "--model-kwargs", "depth=3"], "parameters are missing, first blocks.2"),
    ],
)
def test_what_cannot_be_pretrained_is_one_line(
    flags: list[str], message: str, trained: Path, hub: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"FILE": str(trained / "checkpoint.pth"), "HUB": f"local-dir:{hub}"}
    assert train(images, None, *[places.get(word, word) for word in flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("main.py: error: ") and "\n" not in error
    assert message in error


# ------------------------------------------------------------------------------------------------------------
# --train-mode


def test_train_mode(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it as ever: fine-tuning has no dropout. With it, the dropout of a run from scratch."""
    argv = ["--epochs", "1", "--drop", "0.5", "--finetune", str(trained / "checkpoint.pth")]
    found = {}
    for flag in ("", "--no-train-mode", "--train-mode"):
        assert train(images, tmp_path / f"x{flag}", *argv, *filter(None, [flag])) == 0
        found[flag] = saved(tmp_path / f"x{flag}")["model"]
        note = "note: --drop 0.5 and --drop-path 0.1 without effect"
        assert (note in capsys.readouterr().out) == (flag != "--train-mode")
    assert_same(found[""], found["--no-train-mode"])
    assert not torch.equal(found[""]["head.weight"], found["--train-mode"]["head.weight"])


# ------------------------------------------------------------------------------------------------------------
# The teacher


def test_a_teacher_of_another_size_and_mean(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = [*FLAGS, "--data-path", str(images), "--input-size", "12", *HALF]
    assert main.main([*larger, "--epochs", "1", "--output_dir", str(tmp_path / "teacher")]) == 0
    teacher = [
        "--teacher-path",
        str(tmp_path / "teacher" / "checkpoint.pth"),
        "--teacher-model",
        "deit_tiny_patch16_224",
    ]
    student = ["--model", "deit_tiny_distilled_patch16_224", "--distillation-type", "soft", "--epochs", "1"]
    assert train(images, None, *student, *teacher) == 2
    error = capsys.readouterr().err
    assert "--teacher-model deit_tiny_patch16_224: " in error and "--teacher-input-size" in error
    shape = [f"{key}={value}" for key, value in SHAPE.items() if key != "img_size"]
    own = ["--teacher-input-size", "12", "--teacher-model-kwargs", *shape]
    assert train(images, tmp_path / "student", *student, *teacher, *own) == 0
    assert "the teacher takes images of 12 x 12 pixels, normalised by mean 0.5 0.5 0.5" in capsys.readouterr().out
    line = json.loads((tmp_path / "student" / "log.txt").read_text())
    assert line["train_distillation"] > 0
    assert train(images, None, *student, *teacher, *own, "--teacher_eval") == 0
    assert "teacher" in capsys.readouterr().out
