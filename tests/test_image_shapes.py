"""Whole runs on images that are not square, and on grey ones: trained, resumed, evaluated, exported, fine-tuned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from small_runs import assert_same, make_images, saved, train

import main
from datasets import build_dataset
from loaders import build_eval_loader
from options import config
from script import export_model
from state.trained import read_trained

TERMS = ["--reg", "patch.mixing=1", "--reg", "patch.contrastive@0:last=0.5", "--reg", "attn.cosine@0=0.1"]
SHAPES = {
    "wide": ["--img-size", "8", "12"],
    "tall and grey": ["--input-size", "16", "8", "--in-chans", "1"],
    "grey": ["--in-chans", "1", "--mean", "0.4", "--std", "0.3"],
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES)
def test_a_run_from_its_start_to_what_others_load(images, tmp_path, flags, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(images, whole, "--epochs", "2", *TERMS, *flags) == 0
    shortly = ["--sched", "constant"]  # whose rate does not depend on the epochs to come
    for epochs in ("1", "2"):
        assert train(images, stopped, "--epochs", epochs, "--resume", "auto", *TERMS, *flags, *shortly) == 0
    assert train(images, tmp_path / "at once", "--epochs", "2", *TERMS, *flags, *shortly) == 0
    assert_same(saved(stopped)["model"], saved(tmp_path / "at once")["model"])
    trained = read_trained(str(whole / "checkpoint.pth"), "raw")
    capsys.readouterr()
    command = ["--config", str(whole / "args.yaml"), "--eval", "--weights", "raw"]
    assert main.main([*command, "--resume", str(whole / "checkpoint.pth")]) == 0
    last = json.loads((whole / "log.txt").read_text().splitlines()[-1])
    assert f"* Acc@1 {last['test_acc1']:.3f}" in capsys.readouterr().out
    assert export_model.main([str(whole / "checkpoint.pth"), str(tmp_path / "x"), "--weights", "raw"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    batch = torch.rand(2, *trained.image_shape)
    with torch.no_grad():
        assert torch.equal(model(batch), trained.backbone(batch))
    assert model.pretrained_cfg["input_size"] == trained.image_shape
    assert train(images, None, "--epochs", "1", "--finetune", str(whole / "checkpoint.pth"), *flags) == 0


def test_another_shape_is_another_model(images, tmp_path, capsys):
    assert train(images, tmp_path, "--epochs", "1", *SHAPES["wide"]) == 0
    for changed, message in (
        (["--img-size", "12", "8"], "was trained with --input-size 8 12, not 12 8"),
        ([*SHAPES["wide"], "--in-chans", "1"], "was trained with --in-chans 3, not 1"),
    ):
        assert train(images, tmp_path, "--epochs", "2", "--resume", "auto", *changed) == 2
        assert message in capsys.readouterr().err


def test_what_the_loader_hands_out(images):
    """Grey is normalised by one number: by default the mean of the colours'."""
    argv = ["--data-path", str(images), "--num_workers", "0", "--input-size", "8", "10", "--in-chans", "1"]
    args = config.resolve(argv)
    held, _ = build_dataset(False, args)
    (batch, _), *_ = build_eval_loader(args, held, 1, 0, CPU)
    assert batch.shape == (12, 1, 8, 10)
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    torch.testing.assert_close(batch[0], (held[0][0] / 255 - mean) / std)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--img-size", "8", "9", "10"],
            "it takes one number of pixels, or height and width, not 3 (channels are --in-chans)",
        ),
        (["--img-size", "8", "0"], "--input-size must be at least 1, not 0"),
        (["--in-chans", "2"], "--in-chans 2: images are read in 3 channels (colours) or in 1 (grey)"),
        (
            ["--in-chans", "1", "--std", "1", "1", "1"],
            "--std 1 1 1 cannot be used: it takes one number with --in-chans 1",
        ),
        (["--model-kwargs", "in_chans=1"], "cannot take images of 3 x 8 x 8 pixels"),
    ],
)
def test_what_cannot_be(images, argv, message, capsys):
    assert train(images, None, "--epochs", "1", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_files_of_flags(tmp_path):
    """One number or two, as args.yaml writes them."""
    for text, expected in (("32", 32), ("[32, 48]", [32, 48]), ("[32, 32]", 32), ("[32]", 32)):
        (tmp_path / "x.yaml").write_text(f"data_set: DIGITS\nimg_size: {text}\n")
        assert config.resolve(["--config", str(tmp_path / "x.yaml")]).input_size == expected
