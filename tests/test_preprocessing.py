"""Preprocessing follows the weights: whose mean, deviation and crop a run and an export take."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pictures import make_args
from torchvision import transforms

from datasets import build_dataset
from errors import UserError
from images.transforms import CROP_PCT, preprocessing
from loaders import build_eval_loader, build_train_loader
from options import config
from options.flags import Args
from state.preprocessing import FIELDS, follow_weights
from state.trained import read_trained

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEITS = (MEAN, STD, 224 / 256, "center", "bicubic")
OTHERS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.75}
SIGLIP = "vit_base_patch16_siglip_224"  # mean and deviation 0.5, crop 0.9
TIMMS = ([0.5] * 3, [0.5] * 3, 0.9, "center", "bicubic")


def resolved(*argv: str, **changes: Any) -> config.Resolved:
    return config.Resolved(**{**asdict(Args()), **vars(config.resolve([*argv])), **changes})


def fields(args: Args) -> tuple[Any, ...]:
    return tuple(getattr(args, name) for name in FIELDS)


def a_file(folder: Path, **flags: Any) -> str:
    torch.save({"model": {"x": torch.zeros(1)}, **({"args": flags} if flags else {})}, folder / "x.pth")
    return str(folder / "x.pth")


# ------------------------------------------------------------------------------------------------------------
# The values of a run


def test_deits_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    args = follow_weights(resolved())
    assert fields(args) == (None,) * 5 and preprocessing(args) == DEITS
    assert not capsys.readouterr().out
    assert str(preprocessing(args)) == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 0.875 center bicubic"


def test_flags_hold(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--eval-crop-ratio", "0.75"]
    argv += ["--interpolation", "bilinear", "--crop-mode", "squash"]
    args = follow_weights(resolved(*argv))
    assert fields(args) == (*OTHERS.values(), "squash", "bilinear")
    assert "as given" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--crop-pct", "--crop_pct", "--eval-crop-ratio", "--eval_crop_ratio"])
def test_the_crop_has_timms_name_and_deits(flag: str) -> None:
    assert resolved(flag, "0.5").crop_pct == 0.5


def test_a_config_file_may_say_so(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("mean: [0.1, 0.2, 0.3]\nstd: [0.4, 0.5, 0.6]\neval_crop_ratio: 0.75\ncrop_mode: null\n")
    assert fields(resolved("--config", str(file)))[:3] == tuple(OTHERS.values())
    config.write_args(resolved("--config", str(file)), tmp_path / "args.yaml")
    assert fields(resolved("--config", str(tmp_path / "args.yaml")))[:4] == (*OTHERS.values(), None)


def test_timms_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """--pretrained: as the model's configuration in timm says; what a flag says holds."""
    args = follow_weights(resolved("--pretrained", "--model", SIGLIP))
    known = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(SIGLIP).to_dict())  # type: ignore
    assert fields(args) == TIMMS
    assert all(tuple(getattr(args, n)) == tuple(known[n]) for n in ("mean", "std", "interpolation", "crop_mode"))
    assert args.crop_pct == known["crop_pct"]
    assert (
        f"mean 0.5 0.5 0.5, std 0.5 0.5 0.5, crop 0.9 center bicubic (of {SIGLIP} in timm)"
        in capsys.readouterr().out
    )
    args = follow_weights(resolved("--pretrained", "--model", SIGLIP, "--crop-pct", "1", "--mean", "0", "0", "0"))
    assert fields(args) == ([0, 0, 0], [0.5] * 3, 1.0, "center", "bicubic")
    assert f"(of {SIGLIP} in timm); --mean, --crop-pct as given" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["deit_small_patch16_224", "deit_small_patch16_224_diverse", "deit_base_patch16_384"]
)
def test_deits_own_models_stay_with_deits(name: str) -> None:
    """timm's crop for them is 0.9 or 1; DeiT's own evaluation, whose numbers are published, crops 0.875."""
    assert fields(follow_weights(resolved("--pretrained", "--model", name))) == (None,) * 5


def test_small_images_are_taken_whole() -> None:
    args = follow_weights(resolved("--pretrained", "--model", SIGLIP, "--input-size", "32"))
    assert fields(args) == ([0.5] * 3, [0.5] * 3, None, None, None)
    assert preprocessing(args)[2:] == (1.0, "squash", "bicubic")


@pytest.mark.parametrize("way", ["finetune", "eval", "resume"])
def test_a_checkpoint_of_ours(tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_file(tmp_path, data_set="IMNET", model=SIGLIP, **OTHERS)
    state = torch.load(path) if way != "finetune" else None
    argv = ["--finetune", path] if way == "finetune" else ["--resume", path]
    args = follow_weights(resolved(*argv, "--model", SIGLIP), state)
    assert fields(args) == (*OTHERS.values(), None, None)
    assert f"(of {path})" in capsys.readouterr().out
    args = follow_weights(resolved(*argv, "--model", SIGLIP, "--std", "1", "1", "1"), state)
    assert fields(args) == (OTHERS["mean"], [1, 1, 1], 0.75, None, None)


@pytest.mark.parametrize("saved", [{"data_set": "IMNET"}, {"data_set": "CIFAR", "mean": None, "crop_pct": None}])
def test_an_older_checkpoint_was_trained_as_deit_does(tmp_path: Path, saved: dict[str, Any]) -> None:
    path = a_file(tmp_path, model=SIGLIP, **saved)
    assert fields(follow_weights(resolved("--finetune", path, "--model", SIGLIP))) == (None,) * 5
    state = {"args": Namespace(**saved)}
    assert fields(follow_weights(resolved("--resume", path, "--model", SIGLIP), state)) == (None,) * 5


@pytest.mark.parametrize("saved", [{}, {"model": SIGLIP, "mean": None, "dataset": "imagenet"}])
def test_weights_of_others_are_as_timm_knows_them(tmp_path: Path, saved: dict[str, Any]) -> None:
    path = a_file(tmp_path, **saved)
    assert fields(follow_weights(resolved("--finetune", path, "--model", SIGLIP))) == TIMMS
    assert fields(follow_weights(resolved("--finetune", path))) == (None,) * 5  # deit_base_patch16_224


def test_what_timms_training_was_told(tmp_path: Path) -> None:
    path = a_file(tmp_path, model=SIGLIP, crop_pct=0.8, std=(1.0, 1.0, 1.0))
    args = follow_weights(resolved("--finetune", path, "--model", SIGLIP))
    assert fields(args) == ([0.5] * 3, [1.0] * 3, 0.8, "center", "bicubic")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": 0.5},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, "a"]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0.5, 0, 0.5]},
        {"std": [[1], [2], [3]]},
        {"crop_pct": "a"},
        {"crop_pct": 0.0},
        {"crop_pct": torch.zeros(2)},
        {"crop_mode": "border"},
        {"crop_mode": ["center"]},
        {"interpolation": "\x1b[31mred"},
    ],
    ids=str,
)
def test_values_in_files_that_cannot_be(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = a_file(tmp_path, data_set="IMNET", **wrong)
    with pytest.raises(
        UserError, match=rf"x.pth was trained with {next(iter(wrong))} .*, which cannot be used"
    ) as e:
        follow_weights(resolved("--finetune", path))
    assert str(e.value).isprintable()


def test_two_sources_of_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pretrained and --finetune both say what weights to start from"):
        follow_weights(resolved("--pretrained", "--finetune", a_file(tmp_path)))


# ------------------------------------------------------------------------------------------------------------
# What becomes of them


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_normalised_by_the_runs_values(training: bool) -> None:
    """Against torchvision's Normalize, of batches with mean 0 and deviation 1, which are the pixels' shares."""
    neutral = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    batches = []
    colours = {name: OTHERS[name] for name in ("mean", "std")}
    for values in (neutral, colours, {}):
        args = make_args(**values, reprob=0.0, seed=3)
        dataset, _ = build_dataset(training, args)
        loader = (
            build_train_loader(args, dataset, 1, 0, CPU)
            if training
            else build_eval_loader(args, dataset, 1, 0, CPU)
        )
        batches.append(next(iter(loader))[0])
    plain, other, deits = batches
    assert plain.min() >= 0 and plain.max() <= 1
    expected = transforms.Normalize(OTHERS["mean"], OTHERS["std"])(plain)
    torch.testing.assert_close(other, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(deits, transforms.Normalize(MEAN, STD)(plain), rtol=0, atol=1e-6)


def test_what_a_checkpoint_was_trained_with_is_exported(tmp_path: Path) -> None:
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 16}
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=3, **shape)
    args = {"model": "deit_tiny_patch16_224", "model_kwargs": shape, "input_size": 64, "data_set": "IMNET"}
    for values, expected in ((OTHERS, tuple(OTHERS.values())), ({}, (MEAN, STD, CROP_PCT))):
        torch.save({"model": model.state_dict(), "args": {**args, **values}}, tmp_path / "x.pth")
        trained = read_trained(str(tmp_path / "x.pth"))
        assert all(
            list(one) == list(other) for one, other in zip(trained.preprocessing[:2], expected, strict=False)
        )
        assert trained.preprocessing[2:] == (expected[2], "center", "bicubic")
