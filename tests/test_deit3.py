"""DeiT III's flags, and more of timm's: each against DeiT's numbers or timm's own function."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import no_augmentation, photo, to_tensor
from small_runs import assert_same, make_images, saved, train
from timm.data import Mixup as TimmMixup
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_layer_decay
from timm.utils import dispatch_clip_grad
from torch import Tensor

import main
from build import build_objective
from engine import Precision, Updater, train_one_epoch
from images.transforms import build_transform, to_bytes
from losses import LabelLoss, Objective
from mixing.mixup import Mixup
from models import DiverseViT, Needs, build_model
from options import config
from options.config import Resolved
from options.flags import SCHEDULES, Args
from regularizers import Diversity, total
from runs import build_optimizer
from schedules import build_schedule

GOLDEN = np.load(Path(__file__).parent / "golden" / "three_augment.npz")
TINY = {"patch_size": 8, "img_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
CPU = torch.device("cpu")


def seed_all(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


# ------------------------------------------------------------------------------------------------------------
# 3-Augment


@pytest.mark.parametrize("name", GOLDEN.files)
def test_three_augment_is_deits(name):
    """Byte for byte, and the random streams stand where DeiT's stand: the next draw decides the next image."""
    crop, size, seed = name.split("_")
    jitter = 0.3 if size == "40" else 0.0
    args = no_augmentation(
        data_set="IMNET", three_augment=True, src=crop == "src", input_size=int(size), color_jitter=jitter
    )
    seed_all(int(seed))
    assert torch.equal(build_transform(True, args)(photo(int(seed))), to_tensor(GOLDEN[name]))


@pytest.mark.parametrize("src", [False, True])
@pytest.mark.parametrize("size", [24, 64, [48, 80]], ids=str)
def test_three_augment_with_other_flags(src, size):
    """Digits are not flipped, --fast-resize crops near Pillow's crop, and images need not be square."""
    flags = {"three_augment": True, "src": src, "input_size": size, "color_jitter": 0.0}
    args = no_augmentation(data_set="IMNET", **flags)
    exact, fast = (build_transform(True, no_augmentation(data_set="IMNET", **flags, fast_resize=f)) for f in (0, 1))
    image = photo(1, width=90, height=70)
    near = 0
    for seed in range(12):
        seed_all(seed)
        one = exact(image)
        seed_all(seed)
        other = fast(to_bytes(image))
        assert one.shape == other.shape == (3, *([size] * 2 if isinstance(size, int) else size))
        near += bool((one.int() - other.int()).abs().float().mean() < 2)
    assert near >= 10  # solarising turns a value of 127 into another than one of 128
    digits = build_transform(True, replace_set(args, "DIGITS"))
    assert not any("Flip" in type(step).__name__ for step in digits.transforms)


def replace_set(args: Any, name: str) -> Any:
    return type(args)(**{**vars(args), "data_set": name})


# ------------------------------------------------------------------------------------------------------------
# Losses


def mixed_batch(smoothing: float) -> tuple[Tensor, Any, Tensor]:
    """Images, our labels and timm's dense ones, of the same draws."""
    torch.manual_seed(0)
    images, targets = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    ours, draws = (Mixup(smoothing=smoothing, seed=2, patch_size=(8, 8)) for _ in range(2))
    mixed, labels = ours(images, targets)
    (mix,) = draws.draw(6, 16, 16)
    theirs = TimmMixup(0.8, 1.0, label_smoothing=smoothing, num_classes=5)
    theirs._params_per_batch = lambda: (mix.weight, False)  # the label does not depend on the box
    _, dense = theirs(images.clone(), targets)
    return mixed, labels, dense


@pytest.mark.parametrize("terms", [(), ("patch.mixing=1",)], ids=str)
def test_binary_cross_entropy_is_deits(terms):
    mixed, labels, dense = mixed_batch(0.0)
    model, objective = learner(*terms, bce=True)
    captured = model(mixed, labels=labels)
    found = objective(captured, labels)
    targets = dense.gt(0.0).type(dense.dtype)
    expected = torch.nn.BCEWithLogitsLoss()(captured.logits, targets)
    assert torch.equal(found["bce"].value, expected) and found["bce"].coef == 1 / (1 + 4 * len(terms))
    own = F.one_hot(labels.own, 5).bool() | F.one_hot(labels.partner, 5).bool()
    assert torch.equal(targets.bool(), own)  # both classes whole


@pytest.mark.parametrize("bce", [False, True])
def test_two_submodels_are_deits(bce):
    """Its line of four quarters, in the same training mode: the submodels' drop paths are drawn for one batch."""
    mixed, labels, dense = mixed_batch(0.0 if bce else 0.1)
    model, objective = learner(bce=bce, cosub=True, drop_path_rate=0.5)
    model.train()
    twice = mixed.repeat(objective.submodels, 1, 1, 1)
    torch.manual_seed(3)
    terms = objective(model(twice), labels.repeat(objective.submodels))
    torch.manual_seed(3)
    one, other = model.backbone(torch.cat((mixed, mixed), dim=0)).split(len(mixed))
    criterion = torch.nn.BCEWithLogitsLoss()
    targets = dense.gt(0.0).type(dense.dtype) if bce else dense
    expected = 0.25 * criterion(one, targets) + 0.25 * criterion(other, targets)
    expected = expected + 0.25 * criterion(one, other.detach().sigmoid())
    expected = expected + 0.25 * criterion(other, one.detach().sigmoid())
    torch.testing.assert_close(total(terms), expected, rtol=1e-6, atol=0)
    ours, theirs = (
        torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        for value in (total(terms), expected)
    )
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-7)
    assert not torch.equal(one, other) and set(terms) == {"bce", "mutual"}


def learner(*specs: str, bce: bool = False, cosub: bool = False, **changes: Any) -> tuple[DiverseViT, Objective]:
    torch.manual_seed(1)
    diversity = Diversity([config.parse_spec(spec) for spec in specs], depth=3)
    model = DiverseViT(build_model("deit_tiny_patch16_224", **TINY, **changes), Needs(**diversity.needs))
    return model, Objective(LabelLoss(binary=bce, cosub=cosub), diversity)


def test_the_flags_reach_the_objective():
    args = resolved("--bce-loss", "--smoothing", "0", "--cosub")
    loss = build_objective(args, Diversity([], depth=0), 5, CPU).label_loss
    assert loss.binary and loss.cosub and build_objective(args, Diversity([], depth=0), 5, CPU).submodels == 2


def resolved(*argv: str) -> Resolved:
    return config.resolve(["--data-set", "DIGITS", *argv])


# ------------------------------------------------------------------------------------------------------------
# Optimizer


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224"])
def test_layer_decays_groups_are_timms(name):
    backbone = build_model(name, **({**TINY, "depth": 4}))
    args = resolved("--layer-decay", "0.65", "--weight-decay", "0.1", "--lr", "1e-3", "--unscale-lr")
    optimizer = build_optimizer(args, backbone)
    expected = param_groups_layer_decay(backbone, 0.1, backbone.no_weight_decay(), layer_decay=0.65)
    assert len(optimizer.param_groups) == len(expected) > 6
    for ours, theirs in zip(optimizer.param_groups, expected, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert (ours["lr_scale"], ours["weight_decay"]) == (theirs["lr_scale"], theirs["weight_decay"])
    head = next(
        group for group in optimizer.param_groups if any(p is backbone.head.weight for p in group["params"])
    )
    assert head["lr_scale"] == 1


@pytest.mark.parametrize(
    ("sched", "warmup"),
    [(s, w) for s in SCHEDULES for w in "02" if (s, w) != ("rsqrt", "0")],  # which needs one
)
def test_layer_decays_rates_are_timms(sched, warmup):
    argv = ["--layer-decay", "0.65", "--lr", "1e-3", "--unscale-lr", "--epochs", "6", "--warmup-epochs", warmup]
    args = resolved(*argv, "--sched", sched, "--decay-epochs", "2", "--decay-milestones", "2", "4")
    optimizer = build_optimizer(args, build_model("deit_tiny_patch16_224", **TINY))
    schedule = build_schedule(args, optimizer, 1e-3)
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    whole = build_schedule(args, plain, 1e-3)
    for epoch in range(6):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(plain.param_groups[0]["lr"] * group["lr_scale"], rel=1e-12)
        schedule.step(epoch, 50.0 - epoch)
        whole.step(epoch, 50.0 - epoch)


def test_arguments_of_the_optimizer():
    backbone = build_model("deit_tiny_patch16_224", **TINY)
    args = resolved("--opt", "adamw", "--opt-kwargs", "amsgrad=True", "foreach=False")
    ours = build_optimizer(args, backbone)
    theirs = create_optimizer_v2(
        backbone, **optimizer_kwargs(replace(args, lr=ours.defaults["lr"])), amsgrad=True, foreach=False
    )
    assert type(ours) is type(theirs) and ours.defaults == theirs.defaults and ours.defaults["amsgrad"] is True


MODES = {"norm": 0.05, "value": 1e-3, "agc": 0.01}


@pytest.mark.parametrize("mode", MODES)
def test_clip_modes_are_timms(mode):
    """One step of SGD at rate 1 moves the weights by the clipped gradient."""
    model, objective = learner()
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    reference = copy.deepcopy(model.backbone)
    F.cross_entropy(reference.train()(images), targets).backward()
    parameters = list(reference.parameters())
    raw = [p.grad.clone() for p in parameters]
    dispatch_clip_grad(parameters[:-2] if mode == "agc" else parameters, MODES[mode], mode)
    before = [p.detach().clone() for p in model.parameters()]
    updater = Updater(torch.optim.SGD(model.parameters(), 1.0), Precision(CPU), MODES[mode], clip_mode=mode)
    train_one_epoch(model, objective, [(images, targets)], updater, Mixup(0, 0, smoothing=0))
    clipped = False
    for start, parameter, theirs, unclipped in zip(before, model.parameters(), parameters, raw, strict=True):
        torch.testing.assert_close(start - parameter.detach(), theirs.grad, rtol=0, atol=1e-6)
        clipped |= not torch.equal(theirs.grad, unclipped)
    assert clipped
    naive = by_hand(mode, MODES[mode], before, raw)
    for expected, theirs in zip(naive, parameters, strict=True):
        torch.testing.assert_close(expected, theirs.grad, rtol=1e-4, atol=1e-8)


def by_hand(mode: str, limit: float, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Clipped gradients from the definitions."""
    if mode == "norm":
        norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
        return [g * min(1.0, limit / norm) for g in gradients]
    if mode == "value":
        return [g.clamp(-limit, limit) for g in gradients]
    found = []
    for weight, gradient in zip(weights[:-2], gradients[:-2], strict=True):
        units = zip(weight, gradient, strict=True) if weight.ndim > 1 else [(weight, gradient)]
        clipped = []
        for w, g in units:
            most = limit * max(float(w.norm()), 1e-3)
            clipped.append(g if float(g.norm()) < most else g * (most / max(float(g.norm()), 1e-6)))
        found.append(torch.stack(clipped) if weight.ndim > 1 else clipped[0])
    return [*found, *gradients[-2:]]


# ------------------------------------------------------------------------------------------------------------
# Whole runs


def test_some_epochs_are_not_evaluated(images, tmp_path, capsys):
    """Every second one and the last; the weights are those of a run that evaluates each."""
    flags = ["--epochs", "5", "--checkpoint-hist", "5"]
    assert train(images, tmp_path / "each", *flags) == 0
    capsys.readouterr()
    assert train(images, tmp_path / "some", *flags, "--val-interval", "2") == 0
    assert capsys.readouterr().out.count("Accuracy of the network") == 3
    each, some = (lines_of(tmp_path / name) for name in ("each", "some"))
    assert [("test_acc1" in line, "ema_test_loss" in line) for line in some] == [
        (n in (1, 3, 4),) * 2 for n in range(5)
    ]
    for one, other in zip(each, some, strict=True):
        assert {key: one[key] for key in other if key != "max_acc"} == {
            k: v for k, v in other.items() if k != "max_acc"
        }
    assert some[4]["max_acc"] == max(each[n]["test_acc1"] for n in (1, 3, 4))
    assert_same(saved(tmp_path / "each")["model"], saved(tmp_path / "some")["model"])
    assert [("metric" in saved(tmp_path / "some", name)) for name in ("checkpoint.2.pth", "checkpoint.1.pth")] == [
        False,
        True,
    ]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


RUNS = {
    "DeiT III": ["--opt", "lamb", "--bce-loss", "--smoothing", "0", "--three-augment", "--color-jitter", "0.3"],
    "DeiT III, ImageNet-21k": ["--three-augment", "--src", "--opt", "lamb", "--mixup", "0"],
    "cosub": ["--cosub", "--drop-path", "0.3", "--reg", "patch.mixing=1", "--reg", "patch.cosine@last=0.5"],
    "layer decay": ["--layer-decay", "0.7", "--opt-kwargs", "amsgrad=True", "--clip-grad", "0.1"],
    "agc": ["--clip-grad", "0.01", "--clip-mode", "agc"],
    "clipped values": ["--clip-grad", "0.001", "--clip-mode", "value", "--val-interval", "2"],
}


def test_the_digits_in_the_way_of_deit_iii(tmp_path):
    """Three epochs of the recipe: the loss leaves ln 2, with which all classes are as likely as not."""
    recipe = Path(__file__).parents[1] / "configs" / "digits_deit3.yaml"
    shorter = ["--epochs", "3", "--warmup-epochs", "0", "--model-kwargs", "depth=2", "patch_size=16"]
    assert main.main(["--config", str(recipe), *shorter, "--output_dir", str(tmp_path), "--device", "cpu"]) == 0
    losses = [line["train_bce"] for line in lines_of(tmp_path)]
    assert math.log(2) > losses[0] > losses[1] > losses[2] and losses[2] < 0.5


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(images, tmp_path, flags, capsys):
    for folder, epochs in (("whole", ["2"]), ("parts", ["1", "2"])):
        for number in epochs:
            argv = ["--epochs", number, "--sched", "constant", "--resume", "auto", *flags]
            assert train(images, tmp_path / folder, *argv) == 0, capsys.readouterr().err
    whole, parts = (saved(tmp_path / name) for name in ("whole", "parts"))
    for key in ("model", "model_ema", "optimizer", "metric"):
        assert_same(whole[key], parts[key])
    log = lines_of(tmp_path / "whole")[-1]
    assert ("train_bce" in log) == ("--bce-loss" in flags or "--cosub" in flags)
    assert ("train_mutual" in log) == ("--cosub" in flags)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bce-loss"], "--smoothing 0.1 gives each class one: add --smoothing 0"),
        (["--cosub", "--distillation-type", "hard"], "drop one of the two"),
        (["--src"], "--src is the crop of --three-augment: give both"),
        (["--ThreeAugment", "--aa", "augmix-m3"], "--three-augment takes the place of --aa augmix-m3"),
        (
            ["--ThreeAugment", "--src", "--train-interpolation", "random"],
            "--train-interpolation random cannot be used",
        ),
        (["--clip-mode", "agc"], "--clip-mode agc needs a limit: give --clip-grad X"),
        (
            ["--fsdp", "--clip-mode", "agc", "--clip-grad", "1"],
            "--fsdp splits the weights whose norms --clip-mode agc",
        ),
        (["--opt-kwargs", "lr=1"], "--opt-kwargs lr=... has a flag of its own: give --lr"),
        (["--opt-kwargs", "nonsense=1"], "--opt adamw --opt-kwargs nonsense=1 cannot be built"),
        (["--opt-kwargs", "betas"], "'betas' is not KEY=VALUE"),
        (["--layer-decay", "1.5"], "--layer-decay must be"),
        (["--val-interval", "0"], "--val-interval must be at least 1, not 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be(images, argv, message, capsys):
    assert train(images, None, "--epochs", "1", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_cosub_without_what_makes_submodels(images, capsys):
    assert train(images, None, "--epochs", "1", "--cosub", "--drop-path", "0") == 0
    assert "note: --cosub without effect: its two submodels are the same" in capsys.readouterr().out


def test_defaults_are_plain_deit():
    args = Args()
    assert not (
        args.bce_loss or args.cosub or args.three_augment or args.src or args.layer_decay or args.opt_kwargs
    )
    assert (args.val_interval, args.clip_mode, args.in_chans) == (1, "norm", 3)
