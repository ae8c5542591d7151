"""Patch Diversification's released recipe in small runs: both accuracies, continued, in two stages, elsewhere."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from safetensors.torch import load_file
from small_runs import FLAGS, assert_same, make_images, saved, train

import build
import main
import runs
from engine import Precision
from errors import UserError
from export import export
from mixing.patch_grid import PatchGrid
from models import DiverseViT, build_model
from models.weights import load_for_finetuning
from options import config
from redundancy.command import main as report_redundancy
from state import resumption
from state.run_state import RunState
from state.trained import read_trained

TERMS = ["--reg", "patch.region_mixing=1", "--reg", "patch.context=1"]
RECIPE = [*TERMS, "--mixup", "0", "--cutmix", "1", "--mixup-switch-prob", "0", "--model-kwargs", "drop_rate=0.2"]
CPU = Precision(torch.device("cpu"))
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
ENV |= {"OMP_NUM_THREADS": "1"}
SMALL_SWIN = ["--model-kwargs", "embed_dim=12", "depths=(2,2)", "num_heads=(2,2)", "window_size=4"]
HEAD = {"patch_head.weight", "patch_head.bias"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of the recipe, with checkpoints within each."""
    folder = tmp_path_factory.mktemp("run")
    often = ["--save-interval-steps", "2", "--checkpoint-hist", "9", "--drop-path", "0.3"]
    assert train(images, folder, *RECIPE, "--epochs", "2", *often) == 0
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "levit_128s", "--input-size", "224"], "labels 9 patches of 64 x 64 pixels"),
        (
            ["--model", "swin_tiny_patch4_window7_224", "--input-size", "36", "44", *SMALL_SWIN],
            "labels 20 patches of 8 x 8 pixels, and SwinTransformer has 30",
        ),
    ],
)
def test_images_of_parts_of_patches(
    images: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before training: regions are made of whole patches of the last block."""
    argv = ["--data-path", str(images), "--device", "cpu", "--num_workers", "0", "--batch-size", "4", *flags]
    assert main.main([*argv, "--reg", "patch.region_mixing=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and "--input-size of whole patches" in line


@pytest.mark.parametrize(
    "term", ["patch.region_mixing", "patch.context", "patch.mixing", "patch.contrastive@embed:last"]
)
def test_patches_that_are_dropped(images: Path, term: str, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = ["--model-kwargs", "patch_size=4", "embed_dim=12", "depth=2", "num_heads=2", "patch_drop_rate=0.5"]
    assert train(images, None, *kwargs, "--reg", f"{term}=1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs all patches, and --model-kwargs patch_drop_rate drops some" in line


# ------------------------------------------------------------------------------------------------------------
# Both accuracies


def test_a_run_reports_both_accuracies(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, tmp_path, *RECIPE, "--epochs", "1") == 0
    shown = capsys.readouterr().out
    (record,) = log_of(tmp_path)
    for prefix, line in (("test_", "* Joint"), ("ema_test_", "EMA: Joint")):
        joint = record[f"{prefix}joint_acc1"], record[f"{prefix}joint_acc5"]
        assert "{} Acc@1 {:.3f} Acc@5 {:.3f}".format(line, *joint) in shown
    assert record["max_acc"] == record["test_acc1"]  # the best is by the model's own head
    assert {"train_patch.region_mixing", "train_patch.context@embed:norm", "train_ce"} <= set(record)
    total = record["train_ce"] + record["train_patch.region_mixing"] + record["train_patch.context@embed:norm"]
    assert record["train_loss"] == pytest.approx(total, rel=1e-5)  # an undivided sum
    state = saved(tmp_path)
    assert HEAD <= set(state["model"]) == set(state["model_ema"])


def test_evaluation_of_a_checkpoint(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the run's terms both accuracies, those of its log; without them the model's own."""
    words = ["--eval", "--resume", str(run / "checkpoint.pth")]
    assert train(images, None, *RECIPE, *words) == 0
    shown, record = capsys.readouterr().out, log_of(run)[-1]
    for prefix in ("test_", "ema_test_"):
        numbers = record[f"{prefix}joint_acc1"], record[f"{prefix}joint_acc5"]
        assert "* Joint Acc@1 {:.3f} Acc@5 {:.3f}".format(*numbers) in shown
    assert train(images, None, *words) == 0
    plain = capsys.readouterr().out
    assert "Joint" not in plain and f"* Acc@1 {record['test_acc1']:.3f}" in plain


def test_a_checkpoint_with_another_number_of_heads_is_named(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {k: v for k, v in saved(run)["model"].items() if k not in HEAD}}, tmp_path / "one.pth")
    assert train(images, None, *RECIPE, "--eval", "--resume", str(tmp_path / "one.pth")) == 2
    assert "of a model with one head, and the model has two: patch.region_mixing" in capsys.readouterr().err
    words = ["--resume", str(run / "checkpoint.pth"), "--no-resume-opt", "--epochs", "3"]
    assert train(images, None, "--model-kwargs", "drop_rate=0.2", *words) == 2
    assert "of a model with two heads, and the model has one" in capsys.readouterr().err


def test_context_alone_goes_with_mixup(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        train(images, tmp_path, "--reg", "patch.context=1", "--measure", "patch.cosine@norm", "--epochs", "1") == 0
    )
    assert "Joint" not in capsys.readouterr().out
    (record,) = log_of(tmp_path)
    assert not HEAD & set(saved(tmp_path)["model"])
    assert 0 <= record["test_patch.cosine@norm"] <= 1 and record["train_patch.context@embed:norm"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--cosub", "--drop-path", "0.2"],
        ["--bce-loss", "--smoothing", "0"],
        ["--monitor-redundancy", "1", "--grad-accum-steps", "3"],
        ["--grad-checkpointing", "--mixup", "0.8", "--mixup-mode", "elem", "--amp-dtype", "bfloat16"],
        ["--model", "deit_tiny_distilled_patch16_224"],
        ["--remedy", "talking_heads:random", "--remedy", "attnscale"],
        ["--mixup-prob", "0", "--batch-size", "3", "--reg", "patch.cosine@embed,norm=0.1"],
    ],
    ids=" ".join,
)
def test_it_goes_with_other_flags(images: Path, flags: list[str]) -> None:
    assert train(images, None, *RECIPE, "--epochs", "1", *flags) == 0


def test_terms_of_two_schemes_are_refused(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, None, *RECIPE, "--reg", "patch.mixing=1", "--epochs", "1") == 2
    assert "mix images in different ways: drop one of them" in capsys.readouterr().err


def test_images_that_are_not_square(images: Path, tmp_path: Path) -> None:
    """Rectangles and neighbours in a grid of 2 x 4."""
    assert train(images, tmp_path, *RECIPE, "--img-size", "8", "16", "--epochs", "1") == 0
    assert log_of(tmp_path)[0]["train_patch.context@embed:norm"] > 0


def test_models_that_cannot_are_refused_in_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [
        "--data-path",
        str(images),
        "--output_dir",
        str(tmp_path / "no"),
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    for flags, said in (
        (["--model", "resnet10t", *TERMS], "is not a vision transformer"),
        (
            ["--model", "pvt_v2_b0", *TERMS],
            "layers embed and norm cannot be compared, their patches x width differ",
        ),
    ):
        assert main.main([*where, "--device", "cpu", "--input-size", "64", *flags]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("main.py: error")]
        assert said in line and not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------------------
# Continued, compiled, on several processes


def test_a_run_goes_on_exactly_within_an_epoch(run: Path, images: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle of the first epoch: equal bit for bit, patch_head and average too."""
    (inside,) = (
        path.name
        for path in run.glob("checkpoint*.pth")
        if (saved(run, path.name)["epoch"], saved(run, path.name)["step"]) == (-1, 2)
    )
    shutil.copy(run / inside, tmp_path / "checkpoint.pth")
    often = ["--save-interval-steps", "2", "--checkpoint-hist", "9", "--drop-path", "0.3"]
    assert train(images, tmp_path, *RECIPE, "--epochs", "2", *often, "--resume", "auto") == 0
    assert (run / "log.txt").read_text() == (tmp_path / "log.txt").read_text()
    one, other = ({k: v for k, v in saved(folder).items() if k != "args"} for folder in (run, tmp_path))
    assert_same(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_it_gives_the_same_numbers(images: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    for name, flags in (("eager", []), ("compiled", ["--torchcompile", "aot_eager"])):
        assert train(images, tmp_path / name, *RECIPE, "--drop-path", "0", "--epochs", "1", *flags) == 0
    eager, compiled = (log_of(tmp_path / name)[0] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_two_processes_with_and_without_shards(images: Path, tmp_path: Path) -> None:
    """DDP and FSDP take the same steps; each process draws its own rectangles."""
    words = [*FLAGS, *RECIPE, "--data-path", str(images), "--drop-path", "0", "--epochs", "1", "--batch-size", "2"]
    words += ["--model-kwargs", "drop_rate=0"]  # masks are drawn otherwise in shards
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp"])):
        done = forks.run(2, "main.py", *words, "--output_dir", str(tmp_path / name), *flags, env=ENV)
        assert done.returncode == 0, done.stderr[-3000:]
    ddp, fsdp = (saved(tmp_path / name) for name in ("ddp", "fsdp"))
    for weights in ("model", "model_ema"):
        assert HEAD <= set(ddp[weights]) == set(fsdp[weights])
        for name, value in ddp[weights].items():
            torch.testing.assert_close(fsdp[weights][name], value, rtol=1e-3, atol=1e-5, msg=name)
    first, second = (process["streams"]["mixup"]["state"]["key"] for process in ddp["processes"])
    assert not torch.equal(first, second)
    assert log_of(tmp_path / "fsdp")[0] == pytest.approx(log_of(tmp_path / "ddp")[0], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Stage two


def resumed(images: Path, checkpoint: Path, *flags: str) -> RunState:
    """The run that these flags continue, before its first step."""
    words = [*FLAGS, *RECIPE, "--data-path", str(images), "--resume", str(checkpoint), *flags]
    args = config.resolve(words)
    earlier = resumption.find(args)
    assert earlier is not None
    args = resumption.in_force(args, earlier)
    backbone = build.build_backbone(args, 2)
    diversity, measure = build.build_diversity(args, backbone)
    model = build.build_student(args, backbone, diversity, measure, 2, CPU.device)
    return runs.build_run(args, model, CPU, build.build_mixing(args, backbone, diversity), None, earlier)


def test_a_fresh_optimizer_and_all_else_goes_on(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, average, epoch, best, log and streams are the checkpoint's; another optimizer is no mistake."""
    state = saved(run)
    flags = ["--epochs", "400", "--drop-path", "0.75", "--no-resume-opt", "--opt", "sgd", "--sched", "poly"]
    found = resumed(images, run / "checkpoint.pth", *flags)
    shown = capsys.readouterr().out
    assert "note: from here on fresh optimizer, and the flags' own schedule" in shown
    assert "note: from here on --drop-path 0.75, before 0.3" in shown and "--opt sgd, before adamw" in shown
    assert found.ema is not None
    assert_same(dict(found.model.backbone.state_dict()), dict(state["model"]))
    assert_same(dict(found.ema.module.backbone.state_dict()), dict(state["model_ema"]))
    assert (found.epoch, found.max_acc, found.log) == (1, state["max_acc"], state["log"])
    assert found.best._asdict() == state["best"] and found.running.updates == state["updates"]
    assert isinstance(found.optimizer, torch.optim.SGD) and not found.optimizer.state
    assert any("after epoch 2: fresh optimizer" in change for change in found.changes)
    assert isinstance(found.mixing, PatchGrid)
    found.restore_streams()
    key = found.mixing.random.get_state(legacy=False)["state"]["key"]
    assert key.tolist() == state["processes"][0]["streams"]["mixup"]["state"]["key"].tolist()


def test_the_schedule_of_400_epochs_is_entered_at_300(run: Path, images: Path, tmp_path: Path) -> None:
    """The rate of the run's 301st epoch is that of an uninterrupted run: one epoch late, as all are."""
    torch.save({**saved(run), "epoch": 299}, tmp_path / "stage1.pth")
    flags = ["--epochs", "400", "--lr", "4e-3", "--min-lr", "1e-7", "--warmup-epochs", "5", "--no-resume-opt"]
    found = resumed(images, tmp_path / "stage1.pth", *flags)
    expected = 1e-7 + (4e-3 - 1e-7) * (1 + math.cos(math.pi * 299 / 400)) / 2
    assert found.epoch == 299 and [group["lr"] for group in found.optimizer.param_groups] == pytest.approx(
        [expected] * 2
    )


def test_the_second_stage_as_a_run(run: Path, images: Path, tmp_path: Path) -> None:
    """Into a folder of its own; its checkpoint then goes on like any other, with the optimizer's state."""
    stage2 = [*RECIPE, "--epochs", "4", "--drop-path", "0.5", "--checkpoint-hist", "4"]
    first = ["--resume", str(run / "checkpoint.pth"), "--no-resume-opt"]
    assert train(images, tmp_path / "whole", *stage2, *first) == 0
    assert [record["epoch"] for record in log_of(tmp_path / "whole")] == [0, 1, 2, 3]
    steps = {float(moments["step"]) for moments in saved(tmp_path / "whole")["optimizer"]["state"].values()}
    assert steps == {6.0}  # two epochs of three steps
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint.1.pth", tmp_path / "again" / "checkpoint.pth")
    assert train(images, tmp_path / "again", *stage2, "--resume", "auto") == 0
    one, other = ({k: v for k, v in saved(tmp_path / n).items() if k != "args"} for n in ("whole", "again"))
    assert_same(one, other)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume", "auto", "--output_dir", "x"], "would drop the optimizer's state at every restart"),
        ([], "continues a run with a fresh optimizer: give --resume FILE, or drop it"),
        (["--eval", "--resume", __file__], "continues a run with a fresh optimizer: give --resume FILE"),
    ],
)
def test_where_a_fresh_optimizer_means_nothing(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.resolve(["--no-resume-opt", "--data-set", "DIGITS", *flags])


def test_a_fresh_optimizer_begins_an_epoch(run: Path, images: Path) -> None:
    inside = next(path for path in run.glob("checkpoint*.pth") if saved(run, path.name)["step"])
    with pytest.raises(UserError, match="written in the middle of an epoch, and --no-resume-opt begins one"):
        resumed(images, inside, "--epochs", "4", "--no-resume-opt", "--drop-path", "0.3")


# ------------------------------------------------------------------------------------------------------------
# The checkpoint elsewhere


def test_fine_tuning_keeps_or_drops_the_head(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = saved(run)["model"]
    words = [*FLAGS, "--data-path", str(images), "--finetune", str(run / "checkpoint.pth")]
    with_terms = build.build_backbone(config.resolve([*words, *RECIPE]), 2)
    assert "patch_head" not in capsys.readouterr().out
    assert torch.equal(with_terms.patch_head.weight, state["patch_head.weight"])
    without = build.build_backbone(config.resolve(words), 2)
    assert "dropped: patch_head.weight, patch_head.bias" in capsys.readouterr().out
    assert not hasattr(without, "patch_head") and torch.equal(without.head.weight, state["head.weight"])
    other_classes = build.build_backbone(config.resolve([*words, *RECIPE]), 3)
    shown = capsys.readouterr().out
    assert "new: " in shown and "patch_head.weight" in shown
    assert other_classes.patch_head.weight.shape == (3, 12)
    assert 0.01 < other_classes.patch_head.weight.std() < 0.03 and not other_classes.patch_head.bias.any()


def test_weights_without_such_a_head_start_one(run: Path) -> None:
    """As those of timm: the head is new, and said to be."""
    plain = {name: value for name, value in saved(run)["model"].items() if name not in HEAD}
    backbone = read_trained(str(run / "checkpoint.pth")).backbone
    build.RegionHead.attach(backbone)
    before = backbone.patch_head.weight.clone()
    assert load_for_finetuning(backbone, plain, "x.pth").new == ["patch_head.weight", "patch_head.bias"]
    assert torch.equal(backbone.patch_head.weight, before)


def test_timms_weights_start_one(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of the recipes that fine-tune from ImageNet-22k: here from a folder in timm's form."""
    trained = read_trained(str(run / "checkpoint.pth"), "raw")
    export(trained, tmp_path, "timm")
    words = [word for word in FLAGS if "=" not in word and word not in ("--model", "deit_tiny_patch16_224")]
    words.remove("--model-kwargs")
    words += ["--model", f"local-dir:{tmp_path}", "--pretrained", "--data-path", str(images), *RECIPE]
    backbone = build.build_backbone(config.resolve(words), 2)
    assert "new: patch_head.weight, patch_head.bias" in capsys.readouterr().out
    assert torch.equal(backbone.head.weight, trained.backbone.head.weight)
    assert not torch.equal(backbone.patch_head.weight, saved(run)["model"]["patch_head.weight"])


def test_exported_it_is_a_plain_timm_model(run: Path, images: Path, tmp_path: Path) -> None:
    trained = read_trained(str(run / "checkpoint.pth"), "raw")
    assert not hasattr(trained.backbone, "patch_head")
    for form in ("timm", "torch"):
        export(trained, tmp_path, form)
    assert not HEAD & set(load_file(tmp_path / "model.safetensors"))
    model = build.build_backbone(config.resolve([*FLAGS, *RECIPE, "--data-path", str(images)]), 2).eval()
    model.load_state_dict(saved(run)["model"])
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(trained.backbone(pixels), model(pixels))
    wrapped = DiverseViT(model, build.Needs(patch_logits=True), head=build.RegionHead)
    from export import plain_backbone

    assert not hasattr(plain_backbone(wrapped), "patch_head") and hasattr(model, "patch_head")


def test_the_report_reads_it(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says in words that it does not look before and after all blocks."""
    where = ["--data-path", str(images), "--output", str(tmp_path / "report"), "--images", "4", "--device", "cpu"]
    metrics = ["--metrics", "patch.cosine", "--measure", "patch.cosine@norm", "--measure", "patch.context@0:1"]
    assert report_redundancy([f"run={run / 'checkpoint.pth'}", *where, *metrics]) == 0
    text = "".join(path.read_text() for path in (tmp_path / "report").glob("*.json"))
    assert "the report looks at blocks and at the input of the first, not at norm" in text
    assert "patch.context@0:1" in text


def test_a_teacher_may_have_such_a_head(run: Path, images: Path) -> None:
    words = [*FLAGS, "--data-path", str(images), "--teacher-path", str(run / "checkpoint.pth"), "--teacher-model"]
    words += ["deit_tiny_patch16_224", "--teacher-model-kwargs", "patch_size=4", "embed_dim=12", "depth=2"]
    words += ["num_heads=2", "--distillation-type", "hard"]
    args = config.resolve(words)
    assert not hasattr(build.build_teacher(args, 2, CPU.device), "patch_head")
    assert build_model("deit_tiny_patch16_224", img_size=8, patch_size=4) is not None
