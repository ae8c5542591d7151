"""main.py as a user runs it: whole runs on small data, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import forks
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import build
import datasets
import main
import trainer
from datasets import LabelledImages
from images.found import Found, Samples
from models import build_model
from models.weights import model_weights
from options import config
from state import checkpoint

ROOT = Path(__file__).parents[1]
SMALL_VIT = ["--model-kwargs", "patch_size=4", "embed_dim=24", "depth=2", "num_heads=2"]
DIGITS = ["--data-set", "DIGITS", "--model", "deit_tiny_patch16_224", "--input-size", "16", "--device", "cpu"]
QUICK = ["--batch-size", "64", "--num_workers", "0", "--aa", "none", "--reprob", "0", "--warmup-epochs", "0"]
RUN = [*DIGITS, *SMALL_VIT, *QUICK, "--lr", "2e-3", "--unscale-lr"]
RECIPE = ["--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--emb_contrast_cross_coef", "0.5"]
RECIPE += ["--attn_cos_within_coef", "1e-4", "--weight_mha_cond_orth_coef", "5e-4"]

# torch's compiler meets this warning of its own, hides it when it would be shown, but not where it is an error
hidden_by_torch = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


COUNTS = {True: 768, False: 120}  # digits to train with and to evaluate: these runs need no more


@pytest.fixture(scope="module", autouse=True)
def fewer_digits() -> Iterator[None]:
    """All runs of this process take the first digits of either half."""
    read = datasets.digits

    def first(is_train: bool, size: tuple[int, int]) -> Found:
        found, count = read(is_train, size), COUNTS[is_train]
        return found._replace(samples=Samples(found.samples.sources[:count], found.samples.labels[:count]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "digits", first)
        yield


@pytest.fixture
def four_steps(monkeypatch) -> None:
    """Of 64 images, in each epoch of this test."""
    monkeypatch.setitem(COUNTS, True, 256)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def weights_of(folder: Path, key: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)[key]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two epochs of the full recipe."""
    folder = tmp_path_factory.mktemp("run")
    measure = ["--measure", "patch.pairwise_cosine@last", "--measure", "attn.pairwise_cosine@0"]
    argv = [*RUN, *RECIPE, *measure, "--epochs", "2", "--model-ema-decay", "0.9", "--output_dir", str(folder)]
    assert main.main(argv) == 0
    return folder


# ------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_leaves_its_files(trained):
    checkpoints = {"checkpoint.pth", "checkpoint.1.pth", "checkpoint_best.pth"}
    assert {p.name for p in trained.iterdir()} == {"args.yaml", "log.txt", "summary.csv", *checkpoints}
    lines = log_of(trained)
    assert [line["epoch"] for line in lines] == [0, 1]
    terms = [
        "ce",
        "patch.mixing",
        "patch.cosine@last",
        "patch.contrastive@first:last",
        "attn.cosine@0",
        "weight.cno@all",
    ]
    for line in lines:
        assert line["train_dropped"] == 0
        assert {"train_loss", "train_lr", *(f"train_{term}" for term in terms)} <= set(line)
        assert {"test_loss", "test_acc1", "test_acc5", "ema_test_acc1", "n_parameters", "max_acc"} <= set(line)
        assert 0 < line["test_patch.pairwise_cosine@last"] < 1 and 0 < line["test_attn.pairwise_cosine@0"] < 1
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["max_acc"] == max(line["test_acc1"] for line in lines)
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 1 and state["max_acc"] == lines[-1]["max_acc"]
    assert state["args"]["reg"] == yaml.safe_load((trained / "args.yaml").read_text())["reg"]
    assert lines[0]["n_parameters"] == sum(v.numel() for v in state["model"].values())


def test_equal_seeds_give_equal_runs_and_the_recorded_arguments_repeat_them(trained, tmp_path):
    assert main.main(["--config", str(trained / "args.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/log.txt").read_text() == (trained / "log.txt").read_text()
    for key in ("model", "model_ema"):
        for name, value in weights_of(trained, key).items():
            assert torch.equal(value, weights_of(tmp_path / "again", key)[name])
    assert main.main([*RUN, *RECIPE, "--epochs", "1", "--seed", "1", "--output_dir", str(tmp_path / "other")]) == 0
    assert not torch.equal(weights_of(trained)["head.weight"], weights_of(tmp_path / "other")["head.weight"])


def test_eval_prints_the_accuracy_lines(trained, capsys):
    assert main.main([*RUN, "--eval", "--resume", str(trained / "checkpoint.pth")]) == 0
    shown = capsys.readouterr().out
    last = log_of(trained)[-1]
    expected = f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}"
    assert expected in shown
    assert f"Accuracy of the network on the 120 test images: {last['test_acc1']:.1f}%" in shown
    assert f"Accuracy of the EMA network on the 120 test images: {last['ema_test_acc1']:.1f}%" in shown


@pytest.mark.parametrize("how", [[], ["--torchcompile", "aot_eager"]])
def test_eval_reads_each_image_once_for_model_and_ema(trained, tmp_path, capsys, monkeypatch, how):
    """Against checkpoints that hold the one or the other: the same lines."""
    argv = [*RUN, "--eval", "--measure", "patch.pairwise_cosine@last", *how, "--resume"]
    alone = []
    for key in ("model", "model_ema"):
        torch.save({"model": weights_of(trained, key)}, tmp_path / f"{key}.pth")
        assert main.main([*argv, str(tmp_path / f"{key}.pth")]) == 0
        alone.append(capsys.readouterr().out.splitlines())
    decoded, decode = [], LabelledImages.decode
    monkeypatch.setattr(LabelledImages, "decode", lambda self, index: decoded.append(index) or decode(self, index))
    assert main.main([*argv, str(trained / "checkpoint.pth")]) == 0
    ema_lines = [line.replace("network", "EMA network") for line in alone[1][:2]]
    assert capsys.readouterr().out.splitlines() == alone[0] + ema_lines
    assert sorted(decoded) == list(range(120))


def test_an_epoch_reads_each_validation_image_once(four_steps, tmp_path, monkeypatch):
    """Also where the EMA is kept in host memory."""
    decoded, decode = Counter(), LabelledImages.decode
    monkeypatch.setattr(
        LabelledImages,
        "decode",
        lambda self, index: decoded.update([len(self)]) or decode(self, index),
    )
    assert main.main([*RUN, "--epochs", "2", "--model-ema-force-cpu", "--output_dir", str(tmp_path)]) == 0
    assert decoded[120] == 2 * 120 and "ema_test_acc1" in log_of(tmp_path)[1]


def test_eval_measures_redundancy_of_any_weights(trained, tmp_path, capsys):
    torch.save(weights_of(trained), tmp_path / "weights.pth")
    measure = ["--measure", "patch.pairwise_cosine@last", "--measure", "weight.so@all"]
    assert main.main([*RUN, "--eval", "--resume", str(tmp_path / "weights.pth"), *measure]) == 0
    shown = capsys.readouterr().out
    value = log_of(trained)[-1]["test_patch.pairwise_cosine@last"]
    assert f"patch.pairwise_cosine@last {value:.6g}" in shown and "weight.so@all " in shown
    assert "EMA" not in shown


def test_resume_continues(trained, tmp_path, capsys):
    """Two epochs, then two more: schedule, best accuracy, EMA and log go on where they stopped."""
    flags = [*RUN, *RECIPE, "--model-ema-decay", "0.9", "--output_dir", str(tmp_path)]
    assert main.main([*flags, "--epochs", "4", "--resume", str(trained / "checkpoint.pth")]) == 0
    shown = capsys.readouterr().out
    assert "resumed" in shown
    lines = log_of(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3] and lines[:2] == log_of(trained)
    before, after = lines[1:3]
    assert after["max_acc"] >= before["max_acc"]
    assert abs(after["ema_test_loss"] - before["ema_test_loss"]) < abs(2.4 - before["ema_test_loss"])
    assert "note: from here on --epochs 4, before 2" in shown
    assert main.main([*flags, "--epochs", "2", "--resume", str(trained / "checkpoint.pth")]) == 0
    assert "nothing to train: 2 of 2 epochs are done" in capsys.readouterr().out


def test_fine_tuning_starts_from_the_weights(trained, tmp_path, capsys):
    kwargs = ["--model-kwargs", "patch_size=4", "embed_dim=24", "depth=2", "num_heads=2"]
    argv = [
        *DIGITS,
        *kwargs,
        *QUICK,
        "--input-size",
        "24",
        "--epochs",
        "1",
        "--lr",
        "0",
        "--opt",
        "sgd",
        "--min-lr",
        "0",
    ]
    argv += ["--warmup-lr", "0", "--finetune", str(trained / "checkpoint.pth"), "--output_dir", str(tmp_path)]
    assert main.main(argv) == 0
    assert "fine-tuning from" in capsys.readouterr().out
    tuned, source = weights_of(tmp_path), weights_of(trained)
    assert tuned["pos_embed"].shape[1] == 37 and torch.equal(tuned["head.weight"], source["head.weight"])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_with_diversity(four_steps, tmp_path, kind):
    teacher = ["--teacher-model", "resnet10t", "--teacher-path", str(tmp_path / "teacher.pth")]
    torch.save({"model": build_model("resnet10t", num_classes=10).state_dict()}, tmp_path / "teacher.pth")
    student = [*RUN, "--model", "deit_tiny_distilled_patch16_224", *RECIPE, "--epochs", "1"]
    options = ["--distillation-type", kind, "--distillation-alpha", "0.3", "--distillation-tau", "3"]
    assert main.main([*student, *teacher, *options, "--output_dir", str(tmp_path / "student")]) == 0
    line = log_of(tmp_path / "student")[0]
    coefs = {
        "patch.cosine@last": 0.5,
        "patch.contrastive@first:last": 0.5,
        "attn.cosine@0": 1e-4,
        "weight.cno@all": 5e-4,
    }
    label = (line["train_ce"] + 16 * line["train_patch.mixing"]) / 17
    expected = 0.7 * label + 0.3 * line["train_distillation"]
    expected += sum(coef * line[f"train_{name}"] for name, coef in coefs.items())
    assert line["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert "head_dist.weight" in weights_of(tmp_path / "student")


def test_teacher_eval(tmp_path, capsys):
    torch.save(build_model("resnet10t", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    argv = [*RUN, "--teacher_eval", "--teacher-model", "resnet10t", "--teacher-path", str(tmp_path / "teacher.pth")]
    assert main.main([*argv, "--output_dir", str(tmp_path / "never")]) == 0
    assert "Accuracy of the teacher on the 120 test images: " in capsys.readouterr().out
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup", "0"],
        ["--mixup", "0", "--cutmix", "0", "--batch-size", "63"],
        ["--mixup-mode", "elem", "--mixup-prob", "0.5"],
        ["--mixup-mode", "pair", "--cutmix-minmax", "0.2", "0.8"],
        ["--resplit", "--reprob", "0.5", "--remode", "rand", "--recount", "2"],
        ["--no-repeated-aug", "--aa", "rand-m9-mstd0.5-inc1", "--train-interpolation", "bilinear"],
        ["--fast-resize", "--group-repeats", "--num_workers", "2"],
        ["--drop", "0.1", "--drop-path", "0", "--clip-grad", "1", "--no-model-ema"],
        ["--amp-dtype", "bfloat16"],
        ["--model-ema-force-cpu", "--opt", "momentum", "--print-freq", "3"],
        ["--smoothing", "0", "--color-jitter", "0", "--num_workers", "1", "--no-pin-mem", "--no-dist-eval"],
        ["--model", "deit_small_layer24_patch16_224_diverse"],
        ["--reg", "patch.gradient_diversity=1e-3", "--reg", "attn.mhs@all=0.1", "--reg", "weight.mgd@last=1e-4"],
    ],
    ids=lambda flags: " ".join(flags)[:40],
)
def test_flags_train(four_steps, tmp_path, flags):
    assert main.main([*RUN, *RECIPE, "--epochs", "1", "--output_dir", str(tmp_path), *flags]) == 0
    assert np.isfinite(log_of(tmp_path)[0]["train_loss"])


@hidden_by_torch
def test_compiling_and_recomputing_change_no_number(four_steps, tmp_path):
    """With the last, smaller batch of the evaluation, the EMA and a measure that training does not capture."""
    argv = [*RUN, *RECIPE, "--epochs", "2", "--model-ema-decay", "0.9", "--measure", "attn.cosine@all"]
    fast = ["--torchcompile", "aot_eager", "--grad-checkpointing"]
    assert main.main([*argv, "--output_dir", str(tmp_path / "eager")]) == 0
    assert main.main([*argv, "--output_dir", str(tmp_path / "fast"), *fast]) == 0
    for plain, compiled in zip(log_of(tmp_path / "eager"), log_of(tmp_path / "fast"), strict=True):
        assert list(plain) == list(compiled)
        for name, value in plain.items():
            assert compiled[name] == pytest.approx(value, rel=1e-4), name
    assert list(weights_of(tmp_path / "fast")) == list(weights_of(tmp_path / "eager"))


def test_explicit_terms_change_no_number(four_steps, tmp_path):
    """Without attention maps and logits of patches, trained and measured, the log is the same but for rounding."""
    argv = [*RUN, *RECIPE, "--epochs", "1", "--measure", "attn.pairwise_cosine@all"]
    argv += ["--measure", "attn.cosine_cross@0:1"]
    for name, flags in (("without", []), ("explicit", ["--explicit-terms"])):
        assert main.main([*argv, "--output_dir", str(tmp_path / name), *flags]) == 0
    (one,), (other,) = (log_of(tmp_path / name) for name in ("without", "explicit"))
    assert one.keys() == other.keys() and one != other  # it is rounded otherwise
    assert one == pytest.approx(other, rel=1e-3)


@hidden_by_torch
def test_nothing_is_compiled_after_the_first_step(four_steps, tmp_path, capsys, monkeypatch):
    """Three epochs of Mixup, CutMix and unmixed batches; evaluation ends with a smaller batch; then --eval."""
    torch._dynamo.reset()
    warm_up, counts = trainer.warm_up, []

    def counted(*args, **kwargs):
        seconds = warm_up(*args, **kwargs)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return seconds

    monkeypatch.setattr(trainer, "warm_up", counted)
    argv = [*RUN, *RECIPE, "--mixup-prob", "0.7", "--reprob", "0.25", "--measure", "patch.cosine", "--epochs", "3"]
    argv += ["--torchcompile", "aot_eager", "--output_dir", str(tmp_path)]
    torch._dynamo.utils.counters.clear()
    assert main.main(argv) == 0
    assert counts == [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    assert re.search(r"^compiled with aot_eager in \d+ s$", capsys.readouterr().out, re.MULTILINE)

    eager = [*argv, "--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--torchcompile"]
    compiled_again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert main.main([*eager, "aot_eager"]) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled_again
    last = log_of(tmp_path)[-1]
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f}" in capsys.readouterr().out


def test_a_backend_that_fails_is_one_line(tmp_path, capsys):
    @torch._dynamo.register_backend
    def broken_for_this_test(graph, inputs):
        raise ImportError("no such compiler")

    argv = [*RUN, "--epochs", "1", "--torchcompile", "broken_for_this_test", "--output_dir", str(tmp_path)]
    assert main.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "main.py: error: --torchcompile does not work here, drop it: backend='broken_for_this_test'"
    )
    assert "ImportError: no such compiler" in line


def test_maps_between_channels_are_named_as_such(tmp_path, capsys):
    model = ["--model", "xcit_nano_12_p16_224", "--model-kwargs", "patch_size=8", "depth=1", "embed_dim=24"]
    argv = [*RUN, "--epochs", "1", *model, "num_heads=3", "--input-size", "32", "--reg", "attn.cosine=0.1"]
    assert main.main(argv) == 0
    note = "note: the attention maps of Xcit are between the channels of a head, not its tokens\n"
    assert note in capsys.readouterr().out


def test_drop_reaches_the_model():
    args = config.resolve([*RUN, "--drop", "0.3", "--drop-path", "0.2"])
    backbone = build.build_backbone(args, 10)
    assert backbone.pos_drop.p == backbone.blocks[0].attn.proj_drop.p == backbone.blocks[0].mlp.drop1.p == 0.3
    assert backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2) and backbone.head_drop.p == 0


# ------------------------------------------------------------------------------------------------------------
# Real processes


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """An ImageNet-like folder: 3 classes, 5 training and 2 validation images each."""
    root = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for label in "abc":
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                noise = pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / label / f"{i}.png")
    return root


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, trained, images):
    """Each mistake in a process of its own: one line on stderr, nothing created."""
    (tmp_path / "typo.yaml").write_text("epohcs: 3\n")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    never = ["--output_dir", str(tmp_path / "never"), "--device", "cpu"]
    cases = [
        (["--data-path", str(tmp_path / "nowhere")], "nowhere is not a folder"),
        (["--data-set", "IMNET"], "needs --data-path"),
        ([*RUN, "--model", "deit_smal_patch16_224"], "unknown model 'deit_smal_patch16_224'"),
        ([*RUN, "--reg", "patch.cosine@2=1"], "layer 2 is out of range, the model has blocks 0 to 1"),
        ([*RUN, "--resume", str(tmp_path / "junk.pth")], "is not a checkpoint"),
    ]
    for argv, message in cases:
        process = forks.run(1, "main.py", *argv, *never, env=os.environ)
        assert process.returncode == 2, process.stderr
        assert message in process.stderr and process.stdout == ""
        assert re.fullmatch(r"main\.py: error: [^\n]+\n", process.stderr), process.stderr
    assert not (tmp_path / "never").exists()


def one_error(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and error.count("\n") == 1
    return error


def test_more_bad_input(tmp_path, trained, images, capsys):
    (tmp_path / "typo.yaml").write_text("epohcs: 3\n")
    folder = ["--data-path", str(images), *SMALL_VIT, *QUICK, "--input-size", "32", "--device", "cpu"]
    folder += ["--model", "deit_tiny_patch16_224"]
    best = str(trained / "checkpoint.pth")
    teacher = ["--teacher-model", "resnet10t", "--teacher-path", best, "--distillation-type", "hard"]
    cases = [
        (["--config", str(tmp_path / "typo.yaml")], "unknown key 'epohcs'. Did you mean epochs"),
        ([*RUN, "--reg", "patch.cosin=1"], "Did you mean patch.cosine"),
        ([*RUN, "--reg", "patch.cosine@x=1"], "malformed layers 'x'"),
        ([*RUN, "--batch-size", "63"], "is odd"),
        ([*RUN, "--resume", str(tmp_path / "nowhere.pth")], "no such file"),
        ([*RUN, *teacher, "--finetune", best], "cannot be combined with --finetune"),
        ([*RUN, *teacher], "needs a student with a distillation token"),
        ([*RUN, *teacher, "--model", "deit_tiny_distilled_patch16_224"], "does not fit ResNet"),
        (
            [*DIGITS, *QUICK, "--model", "resnet10t", "--reg", "patch.so=1"],
            "not a vision",
        ),
        ([*RUN, "--model-kwargs", "dept=2"], "cannot be built with"),
        ([*RUN, "--resume", best, "--model-kwargs", "patch_size=4", "depth=3"], "keep it, or start from its"),
        (folder, "at least 256 training images"),
        ([*folder, "--no-repeated-aug"], "fewer than one batch of 64"),
        ([*RUN, "--output_dir", "/proc/forbidden"], "cannot write to --output_dir"),
        ([*RUN, "--world_size", "2"], "no launcher set RANK"),
        ([*RUN, "--model-kwargs", "in_chans=1"], "cannot take images of 3 x 16 x 16 pixels"),
        ([*RUN, "--model-kwargs", "num_classes=5"], "returns [5] numbers an image, the data has 10 classes"),
        ([*RUN, "--model-kwargs", "patch_size=0"], "cannot be built"),
        ([*RUN, "--model-kwargs", "norm_layer=foo"], "cannot be built"),
        ([*RUN, "--model", "deit_tiny_patch16_224.foo"], "cannot be built"),
        ([*RUN, "--model", "local-dir:/nowhere"], "cannot be built"),
        ([*RUN, "--opt", "bnbadam8bit"], "--opt bnbadam8bit cannot be built"),
        ([*RUN, "--opt", "adahessian"], "set the environment variable TIMM_FUSED_ATTN=0"),
        ([*RUN, "--resume", best, "--opt", "sgd"], "was trained with --opt adamw, not sgd"),
        ([*RUN, "--resume", best, "--sched", "step"], "was trained with --sched cosine, not step"),
        ([*RUN, "--measure", "patch.gradient_diversity"], "not measured"),
    ]
    for argv, message in cases:
        argv = [*argv, "--epochs", "1"] + (
            [] if "--output_dir" in argv else ["--output_dir", str(tmp_path / "never")]
        )
        assert message in one_error(capsys, argv), argv
    assert not (tmp_path / "never").exists()


def test_a_small_image_folder_trains(images, tmp_path):
    flags = [*SMALL_VIT, *QUICK, "--input-size", "32", "--device", "cpu", "--model", "deit_tiny_patch16_224"]
    argv = ["--data-path", str(images), *flags, "--no-repeated-aug", "--batch-size", "4", "--epochs", "1"]
    assert main.main([*argv, "--output_dir", str(tmp_path)]) == 0
    assert weights_of(tmp_path)["head.weight"].shape[0] == 3


def test_divergence_stops_with_exit_code_1_and_keeps_the_last_checkpoint(trained, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    assert (
        main.main([*RUN, *RECIPE, "--epochs", "1", "--lr", "1e30", "--opt", "sgd", "--output_dir", str(tmp_path)])
        == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: the loss is not finite, 10 step(s) in a row up to step 11; the first")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_fresh_run_sets_the_old_log_aside(four_steps, tmp_path):
    for _ in range(2):
        assert main.main([*RUN, "--epochs", "1", "--output_dir", str(tmp_path)]) == 0
    assert (
        len(log_of(tmp_path)) == 1 and (tmp_path / "log.old.txt").read_text() == (tmp_path / "log.txt").read_text()
    )


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "checkpoint_trial.tmp.tmp",
            "cannot write checkpoints to {folder}: No space left on device; choose another",
        ),
        ("args.yaml.tmp", "cannot write to --output_dir {folder}: No space left on device"),
        ("log.txt.tmp", "cannot write {folder}/log.txt: No space left on device; the old one is still there"),
        ("checkpoint_best.pth.tmp", "what was there before is still there"),
        (
            "checkpoint.pth.tmp",
            "cannot save {folder}/checkpoint.pth: No space left on device; what was there",
        ),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint(four_steps, tmp_path, monkeypatch, capsys, file, message):
    """Full for one file after the other: before training begins, before its evaluation, and after it."""
    checkpoint.save({"epoch": 1}, tmp_path / "checkpoint.pth")
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{file}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    error = one_error(capsys, [*RUN, "--epochs", "1", "--output_dir", str(tmp_path)])
    assert message.format(folder=tmp_path) in error
    saved = {"log.txt.tmp": (-1, 4), "checkpoint_best.pth.tmp": (0, 0)}  # the epoch's training; all of it
    assert checkpoint.progress(tmp_path / "checkpoint.pth") == saved.get(file, (1, 0))
    assert not list(tmp_path.glob("*.tmp"))


def test_interruption(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", interrupted)
    assert main.main(DIGITS) == 130
    assert "interrupted" in capsys.readouterr().err


def test_exported_weights_load_into_timm(trained):
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("deit_tiny_patch16_224", **kwargs)
    model.load_state_dict(model_weights(checkpoint.load(str(trained / "checkpoint.pth")), ""), strict=True)
