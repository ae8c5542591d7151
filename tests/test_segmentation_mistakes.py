"""What users get wrong in segmentation: each mistake is one line that names this program's flags."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import make_images, saved, train
from small_segmentations import BACKBONE, make_pairs, segment

from segmentation.command import main
from segmentation.settings import resolve

SHORT = ["--iterations", "1", "--eval-interval", "1", "--warmup-iterations", "0"]
ANY = ["--device", "cpu"]  # the model is a checkpoint's


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    assert segment(images, output, *SHORT, "--model-ema-decay", "0.5") == 0
    return output


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("segmentation: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(("weights", "part"), [("raw", "model"), ("ema", "model_ema")])
def test_weights_of_a_backbone_are_chosen(images: Path, run: Path, tmp_path: Path, weights: str, part: str) -> None:
    """With a rate of 0 the backbone stays what it was at the start."""
    flags = ["--backbone", str(run / "checkpoint.pth"), "--weights", weights, "--lr", "0", "--weight-decay", "0"]
    assert segment(images, tmp_path, *SHORT, *flags, model=ANY) == 0
    first, now = saved(run)[part], saved(tmp_path)["model"]
    assert not torch.equal(saved(run)["model"]["backbone.cls_token"], saved(run)["model_ema"]["backbone.cls_token"])
    for name in (name for name in now if name.startswith("backbone.")):
        assert torch.equal(now[name], first[name]), name


def test_weights_without_a_file(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(images, None, "--weights", "raw") == 2
    assert "give --backbone FILE, or --eval with --resume FILE" in one_line(capsys)


def test_an_evaluation_does_not_ask_for_what_its_run_started_from(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """args.yaml names --backbone and its --weights; to evaluate, the file may be gone, and both weights count."""
    start = tmp_path / "start.pth"
    shutil.copy(run / "checkpoint.pth", start)
    begun = ["--backbone", str(start), "--weights", "raw", "--head-weights", str(start)]
    assert segment(images, tmp_path / "run", *SHORT, *begun, model=ANY) == 0
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["weights"] == "raw"
    start.unlink()
    argv = ["--config", str(tmp_path / "run" / "args.yaml")]
    capsys.readouterr()
    assert main([*argv, "--eval", "--resume", str(tmp_path / "run" / "checkpoint.pth")]) == 0
    printed = capsys.readouterr().out
    assert "network: mIoU" in printed and "EMA: mIoU" in printed
    assert main([*argv, "--output_dir", str(tmp_path / "again")]) == 2
    assert f"--backbone {start}: no such file" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model", "swin_tiny_patch4_window7_224"],
            "is of the model deit_tiny_patch16_224, not swin_tiny_patch4",
        ),
        (
            ["--model-kwargs", "embed_dim=24"],
            "is of a model with embed_dim=16, not 24: drop it from --model-kwargs",
        ),
    ],
)
def test_a_backbone_of_another_model(
    images: Path, run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert segment(images, None, "--backbone", str(run / "checkpoint.pth"), *SHORT, *flags, model=ANY) == 2
    assert words in one_line(capsys)


def test_a_backbone_of_the_model_that_is_named(images: Path, run: Path) -> None:
    """Also with the tag of timm's weights."""
    flags = ["--backbone", str(run / "checkpoint.pth"), "--model", "deit_tiny_patch16_224.fb_in1k"]
    assert segment(images, None, *SHORT, *flags, "--model-kwargs", "embed_dim=16", model=ANY) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--head", "linear", "--batch-size", "1", "--crop-size", "4"],
            "and a crop of one patch: batch norm needs",
        ),
        (["--head", "linear", "--map-layers", "3"], "--head linear reads the last map alone: drop --map-layers"),
        (["--class-names", "sky", "sea", "sky"], "--class-names has sky more than once: names must differ"),
        (["--pictures", "3"], "--pictures is for the page of --predictions: give both, or drop it"),
        (["--resize", "0", "20"], "--resize 0 is not to resize at all: drop the other number, or the 0"),
    ],
)
def test_flags_that_cannot_be(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert segment(images, tmp_path / "run", *SHORT, *flags) == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--crop-size", "8"], ["--batch-size", "2"]])
def test_the_linear_head_takes_what_has_two_values(images: Path, flags: list[str]) -> None:
    """One crop of four patches, or two crops of one."""
    linear = ["--head", "linear", "--batch-size", "1", "--crop-size", "4"]
    assert segment(images, None, *SHORT, *linear, *flags) == 0


OF_FLAGS = {"channels", "auxiliary-channels"}  # which all these runs are given


@pytest.mark.parametrize(
    ("flags", "names", "why"),
    [
        ([], set(), ""),
        (["--auxiliary-coef", "0"], {"auxiliary-channels"}, "--auxiliary-coef 0 has no auxiliary head"),
        (["--head", "linear"], OF_FLAGS, "--head linear is one layer on the last map"),
        (
            ["--head", "linear", "--head-drop", "0.2", "--auxiliary-coef", "0"],
            {*OF_FLAGS, "auxiliary-coef", "head-drop"},
            "--head linear is one layer on the last map",
        ),
        (["--warmup-share", "0.1"], {"warmup-share"}, "--warmup-iterations 0 has no warm-up"),
        (["--frozen", "--layer-decay", "0.9"], {"layer-decay"}, "--frozen does not train the backbone"),
    ],
)
def test_flags_without_effect_are_said(
    images: Path, capsys: pytest.CaptureFixture[str], flags: list[str], names: set[str], why: str
) -> None:
    """They do not refuse a run: a configuration's file may hold them."""
    assert segment(images, None, *SHORT, *flags) == 0
    found = {line for line in capsys.readouterr().out.splitlines() if "no effect" in line}
    assert found == {f"note: --{name} has no effect: {why}" for name in names}


def test_the_auxiliary_head_stays(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its coefficient may change, but 0 is another network; so in training as in evaluation."""
    shutil.copytree(run, tmp_path / "run")
    for flags in (["--resume", "auto", "--iterations", "2"], ["--eval", "--resume", str(run / "checkpoint.pth")]):
        output = tmp_path / "run" if "auto" in flags else None
        assert segment(images, output, *SHORT, *flags, "--auxiliary-coef", "0") == 2
        assert "was trained with --auxiliary-coef 0.4 and has an auxiliary head: keep it" in one_line(capsys)
    assert segment(images, tmp_path / "run", *SHORT, "--resume", "auto", "--auxiliary-coef", "0.1") == 0


def test_a_finished_run_is_told_which_flag_makes_it_longer(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert segment(images, tmp_path / "run", *SHORT, "--resume", "auto") == 0
    assert "nothing to train: 1 of 1 epochs are done; raise --iterations" in capsys.readouterr().out


def test_an_evaluation_with_other_flags(images: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(images, None, "--eval", "--resume", str(run / "checkpoint.pth"), "--channels", "16") == 2
    said = one_line(capsys)
    assert "with the flags of its run: --config FOLDER/args.yaml" in said and "--finetune" not in said


def test_a_classifier_is_not_continued(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["--epochs", "1", "--mixup", "0", "--cutmix", "0"]
    assert train(make_images(tmp_path / "images", per_class=2), tmp_path / "classifier", *plain) == 0
    path = str(tmp_path / "classifier" / "checkpoint.pth")
    capsys.readouterr()
    for flags in (["--resume", path], ["--eval", "--resume", path]):
        assert segment(images, None, *SHORT, *flags, model=ANY) == 2
        assert "is not a checkpoint of python -m segmentation, it has no decode_head: give one" in one_line(capsys)


def test_what_must_stay_names_this_program_s_flag(
    images: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(images, None, *SHORT, "--resume", str(run / "checkpoint.pth"), "--channels", "9") == 2
    assert "--channels 8, not 9: keep it, or start from its weights with --backbone" in one_line(capsys)


def test_a_damaged_state_names_this_program_s_flag(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    state["optimizer"]["param_groups"].pop()
    torch.save(state, tmp_path / "damaged.pth")
    assert segment(images, None, *SHORT, "--resume", str(tmp_path / "damaged.pth")) == 2
    said = one_line(capsys)
    assert "damaged.pth" in said and "start from its weights with --finetune (segmentation: --backbone)" in said


def test_masks_are_counted_once(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there are no names, all masks are read for their largest label, for both halves."""
    assert segment(images, None, "--check-data") == 0
    assert capsys.readouterr().out.count("for their largest label") == 1


def test_the_command_in_the_program_is_one_that_runs() -> None:
    """Its first lines name configurations that there are."""
    import segmentation

    text = (Path(segmentation.__file__).parent / "__main__.py").read_text()
    named = [word for word in text.split() if word.startswith("configs/")]
    assert len(named) == 2
    for path in named:
        assert resolve(["--config", str(Path(segmentation.__file__).parents[1] / path), *BACKBONE]).iterations
