"""Whole runs of segmentation: a tiny backbone, a dozen small images of odd sizes, through the command line."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import yaml
from small_runs import assert_same, saved
from small_segmentations import BACKBONE, FLAGS, TERMS, log_of, make_pairs, segment

import trainer
from engine import train_one_epoch
from redundancy.command import main as report
from segmentation.command import main
from segmentation.settings import recipe_of, resolve
from state.trained import read_trained


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a term of each level that segmentation has."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert segment(images, output, *TERMS) == 0
    return output


def test_what_a_run_leaves(whole: Path) -> None:
    first, last = log_of(whole)
    assert {
        "train_ce",
        "train_auxiliary",
        "train_patch.cosine@last",
        "test_miou",
        "test_macc",
        "test_pixel_acc",
    } <= set(last)
    assert last["epoch"] == 1 and last["max_miou"] == max(first["test_miou"], last["test_miou"]) > 0
    assert last["train_loss"] == pytest.approx(
        last["train_ce"]
        + 0.4 * last["train_auxiliary"]
        + 0.1 * (last["train_patch.cosine@last"] + last["train_attn.cosine@0"])
        + 1e-4 * last["train_weight.so@all"],
        rel=1e-5,
    )
    flags = yaml.safe_load((whole / "args.yaml").read_text())
    assert flags["model"] == "deit_tiny_patch16_224" and "mixup" not in flags and flags["iterations"] == 6
    names = saved(whole)["model"].keys()
    assert {
        "backbone.blocks.0.attn.qkv.weight",
        "decode_head.conv_seg.weight",
        "auxiliary_head.conv_seg.bias",
    } <= names
    assert (whole / "summary.csv").read_text().startswith("epoch,train_loss,eval_miou,eval_macc,eval_pixel_acc,")


def test_args_yaml_repeats_the_run(images: Path, whole: Path, tmp_path: Path) -> None:
    assert main(["--config", str(whole / "args.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same(saved(tmp_path / "again")["model"], saved(whole)["model"])
    assert log_of(tmp_path / "again") == log_of(whole)


@pytest.mark.parametrize(("step", "stopped_at"), [(1, 2), (2, 3), (4, 2)])  # it is heard with the next step
def test_a_stopped_run_goes_on_bit_for_bit(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, stopped_at: int
) -> None:
    """SIGTERM comes in the middle of an interval; the same command with --resume auto does the rest."""
    terms = [*TERMS, "--resume", "auto"]

    def interrupted(*args: Any, **options: Any) -> Any:
        class Stop:
            def after_step(self, number: int) -> None:
                running = args[5]
                if running.updates == step:
                    os.kill(os.getpid(), signal.SIGTERM)

        options["observers"] = [*options["observers"], Stop()]
        return train_one_epoch(*args, **options)

    monkeypatch.setattr(trainer, "train_one_epoch", interrupted)
    assert segment(images, tmp_path, *terms) == 75
    monkeypatch.undo()
    stopped = saved(tmp_path)
    assert stopped["step"] == stopped_at
    assert segment(images, tmp_path, *terms) == 0
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "log", "processes", "best"):
        assert_same(saved(tmp_path)[key], saved(whole)[key], key)


def test_a_run_on_a_grey_backbone_goes_on(images: Path, tmp_path: Path) -> None:
    """Its channels are the backbone's, when it begins and when it is continued; nobody gives --in-chans."""
    assert segment(images, tmp_path / "grey", "--in-chans", "1") == 0
    start = ["--backbone", str(tmp_path / "grey" / "checkpoint.pth"), "--resume", "auto"]
    for iterations in ("3", "6"):
        flags = [*start, "--iterations", iterations]
        assert segment(images, tmp_path / "run", *flags, model=["--device", "cpu"]) == 0
    assert [line["epoch"] for line in log_of(tmp_path / "run")] == [0, 1]
    assert saved(tmp_path / "run")["model"]["backbone.patch_embed.proj.weight"].shape[1] == 1


def test_two_processes_are_one(images: Path, tmp_path: Path) -> None:
    """The same crops in two batches of two: batch norm goes over both, so weights and scores agree."""
    script = str(Path(forks.ROOT) / "segmentation" / "__main__.py")
    common = [*BACKBONE, *FLAGS, "--data-path", str(images), "--reg", "patch.cosine=0.1", "--drop-path", "0"]
    common += ["--head-drop", "0", "--opt", "sgd", "--lr", "0.1"]  # Adam makes a step of every rounding error
    common += ["--iterations", "2", "--eval-interval", "1", "--warmup-iterations", "0"]
    for processes, batch in ((1, "4"), (2, "2")):
        output = str(tmp_path / str(processes))
        argv = [*common, "--batch-size", batch, "--output_dir", output]
        ended = forks.run(processes, script, *argv, env={})
        assert ended.returncode == 0, ended.stderr
    one, two = (saved(tmp_path / name)["model"] for name in ("1", "2"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], rtol=1e-4, atol=1e-6), name
    for alone, shared in zip(log_of(tmp_path / "1"), log_of(tmp_path / "2"), strict=True):
        assert alone["train_loss"] == pytest.approx(shared["train_loss"], rel=1e-5)
        assert alone["test_miou"] == pytest.approx(shared["test_miou"], abs=0.5)  # a pixel may be a draw


@pytest.mark.parametrize("processes", [2, 3])
def test_scores_do_not_depend_on_the_number_of_processes(
    images: Path, whole: Path, tmp_path: Path, processes: int
) -> None:
    script = str(Path(forks.ROOT) / "segmentation" / "__main__.py")
    argv = [*BACKBONE, *FLAGS, "--data-path", str(images), "--eval", "--resume", str(whole / "checkpoint.pth")]
    alone, several = (forks.run(count, script, *argv, env={}) for count in (1, processes))
    assert alone.returncode == several.returncode == 0, several.stderr
    lines = [line for line in alone.stdout.splitlines() if "mIoU" in line]
    assert len(lines) == 2 and lines == [line for line in several.stdout.splitlines() if "mIoU" in line]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--iterations", "7"], "--iterations 7 are not a multiple of --eval-interval 3"),
        (["--reg", "patch.mixing=1"], "patch.mixing takes the label of a whole image"),
        (["--reg", "patch.cosine@norm=1"], "patch.cosine@norm is at a layer behind the last block"),
        (["--frozen", "--reg", "patch.cosine=1"], "--frozen trains the heads alone"),
        (["--head", "linear", "--neck", "deconv"], "--head linear reads the last map alone: drop --neck deconv"),
        (["--scale-range", "2", "1"], "--scale-range takes two factors, the smaller one first"),
        (["--backbone", "nothing.pth"], "--backbone nothing.pth: no such file"),
        (["--mixup", "0.8"], "unrecognized arguments: --mixup"),
        (["--batch-size", "1"], "--batch-size 1 in one process: UperNet averages a whole crop"),
        (["--stride", "8"], "--stride is that of --inference slide"),
        (["--predictions", "there"], "--predictions is written by --eval"),
        (["--map-layers", "0", "9", "1", "2"], "has blocks 0 to 3, and no 9"),
    ],
)
def test_a_mistake_is_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert segment(images, tmp_path / "run", *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("segmentation: error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_predictions_and_their_comparison(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks hold the predicted classes; counted again by the script, they have the scores of the evaluation."""
    argv = ["--eval", "--resume", str(whole / "checkpoint.pth"), "--weights", "raw", "--pictures", "2"]
    assert segment(images, None, *argv, "--predictions", str(tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    (score,) = re.findall(r"^network: mIoU ([\d.]+)%", printed, re.MULTILINE)
    assert f"written: {tmp_path / 'a' / 'predictions.html'}" in printed
    masks = sorted(path.name for path in (tmp_path / "a" / "masks").rglob("*.png"))
    assert masks == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert (tmp_path / "a" / "predictions.html").read_text().count("<article") == 2
    compare = runpy.run_path(str(Path(forks.ROOT) / "script" / "compare_masks.py"))["main"]
    where = ["--data-set", "FOLDER", "--data-path", str(images), "--output", str(tmp_path / "both.html")]
    assert compare([f"one={tmp_path / 'a'}", f"two={tmp_path / 'a'}", *where]) == 0
    assert re.findall(r"^(?:one|two): mIoU ([\d.]+)%", capsys.readouterr().out, re.MULTILINE) == [score, score]
    assert compare([f"one={tmp_path}", *where]) == 2
    assert "one has no predictions; write them with --predictions" in capsys.readouterr().err


def test_the_backbone_comes_out_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report, and what else reads checkpoints, takes the fine-tuned backbone, without a classifier."""
    trained = read_trained(str(whole / "checkpoint.pth"), "raw")
    own = trained.backbone.state_dict()
    there = {name: weight for name, weight in saved(whole)["model"].items() if name.startswith("backbone.")}
    assert {f"backbone.{name}" for name in own} == there.keys() and trained.backbone.num_classes == 0
    assert all(torch.equal(weight, there[f"backbone.{name}"]) for name, weight in own.items())
    assert trained.image_shape == (3, 16, 16) and trained.name == "deit_tiny_patch16_224"
    argv = [f"after={whole / 'checkpoint.pth'}", "--data-set", "DIGITS", "--images", "4", "--device", "cpu"]
    argv += ["--metrics", "patch.cosine_abs", "--num_workers", "0", "--output", str(tmp_path / "report")]
    assert report(argv) == 0
    measured = json.loads((tmp_path / "report" / "report.json").read_text())["models"][0]
    assert measured["label"] == "after" and "patch.cosine_abs" in measured["findings"]


@pytest.mark.parametrize(
    "path", sorted((Path(forks.ROOT) / "configs" / "segmentation").glob("*.yaml")), ids=lambda path: path.stem
)
def test_recipes_are_configurations(path: Path) -> None:
    args = resolve(["--config", str(path), "--model", "deit_small_patch16_224"])
    assert args.epochs * args.eval_interval == args.iterations
    assert args.data_set.lower() in path.stem and recipe_of(args).crop == (args.input_size,) * 2
