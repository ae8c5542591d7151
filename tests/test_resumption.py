"""What a resumed run makes of flags that are not what they were, and that plan, args.yaml and checkpoint say so."""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from pictures import save_photo
from small_runs import FLAGS, assert_same, make_images, saved, train
from timm.layers import set_fused_attn
from timm.optim import list_optimizers

import main
from errors import UserError
from options import config
from options.flags import SCHEDULES, Args
from options.parser import Resume, declared, flag, switch
from regularizers import REFERENCE_FLAGS
from state.resumption import Earlier, differences, in_force

# What each flag does in a resumed run, written down a second time. A new flag is missing here until its rule has
# been thought about.
STAYS = """model model_kwargs remedy input_size in_chans mean std class_names inat_category opt opt_kwargs
    layer_decay sched"""
SAVED = "start_epoch finetune pretrained weights"
EPOCH = """reg mixing_coef emb_cos_within_coef emb_contrast_cross_coef attn_cos_within_coef
    weight_mha_cond_orth_coef data_set image_key target_key batch_size repeated_aug group_repeats fast_resize
    color_jitter aa three_augment src smoothing bce_loss cosub
    train_interpolation reprob remode recount resplit mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob
    mixup_mode grad_accum_steps seed teacher_model teacher_model_kwargs teacher_input_size
    teacher_weights distillation_type distillation_alpha distillation_tau"""
NOW = """crop_pct crop_mode interpolation train_mode measure monitor_redundancy drop drop_path model_ema
    model_ema_decay model_ema_warmup amp_dtype val_labels skip_bad_images opt_eps opt_betas
    nonfinite nonfinite_patience clip_grad clip_mode val_interval momentum weight_decay epochs lr
    scale_lr_flag warmup_epochs warmup_lr min_lr decay_epochs decay_milestones decay_rate
    cooldown_epochs patience_epochs lr_noise lr_noise_pct lr_noise_std"""
FREE = """model_ema_force_cpu torchcompile grad_checkpointing data_path download single_class num_workers pin_mem
    check_data teacher_path teacher_eval config output_dir device deterministic explicit_terms
    resume save_interval_steps
    save_interval_minutes checkpoint_hist eval print_freq dist_eval fsdp world_size dist_url dist_timeout
    log_with project run_name resume_opt"""
RULES = {
    name: rule
    for rule, names in zip(Resume, (STAYS, SAVED, EPOCH, NOW, FREE), strict=True)
    for name in names.split()
}
OF_TYPE = {int: (2, 3), float: (0.25, 0.5), str: ("a", "b"), bool: (True, False), list: (["a"], ["b"])}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


# ------------------------------------------------------------------------------------------------------------
# All flags


def two_values(name: str) -> tuple[Any, Any]:
    """Two values that a flag may have, of its type."""
    kind = get_type_hints(Args)[name]
    kind = next((part for part in get_args(kind) if part is not type(None)), kind) if "|" in str(kind) else kind
    if kind == list[float]:
        return [0.1, 0.2], [0.1, 0.3]
    if get_origin(kind) is dict:
        return {"depth": 2}, {"depth": 3}
    return OF_TYPE[get_origin(kind) or kind]


def test_every_flag_has_a_rule():
    assert {name: entry.resume for name, entry in declared(Args).items()} == RULES
    with pytest.raises(TypeError):
        flag(1, help="a flag without a rule")
    with pytest.raises(TypeError):
        switch(True, on="a switch without a rule")


@pytest.mark.parametrize("step", [0, 7], ids=["between epochs", "within one"])
@pytest.mark.parametrize("name", [entry.name for entry in fields(Args)])
def test_every_rule_does_what_it_says(name, step, capsys):
    was, now = two_values(name)
    before = config.resolve(["--data-set", "DIGITS"])
    args = replace(before, **{name: now})
    earlier = Earlier("x.pth", {"args": {**config.plain(before), name: was}, "step": step})
    rule = RULES[name]
    if name in REFERENCE_FLAGS or name == "class_names":  # `reg` says it; classes are compared with the data's
        assert in_force(args, earlier) == args and earlier.changes == []
    elif rule is Resume.STAYS or (rule is Resume.EPOCH and step):
        with pytest.raises(UserError, match=r"^x\.pth was (trained|written in the middle of an epoch) with .*"):
            in_force(args, earlier)
    elif rule is Resume.SAVED:
        assert getattr(in_force(args, earlier), name) == was
        (line,) = capsys.readouterr().out.splitlines()
        assert "has no effect" in line
    elif rule is Resume.FREE:
        assert in_force(args, earlier) == args and capsys.readouterr().out == ""
    else:
        assert in_force(args, earlier) == args and earlier.was == {name: was}
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("note: from here on") and "before" in line
    earlier = Earlier("x.pth", {"args": {**config.plain(before), name: now}, "step": step})
    assert in_force(args, earlier) == args and capsys.readouterr().out == ""


def test_the_references_coefficients_and_reg_are_the_same():
    args = config.resolve(["--data-set", "DIGITS", "--emb_cos_within_coef", "0.5"])
    assert differences({"emb_cos_within_coef": 0.5, "mixing_coef": 0}, args) == []
    (change,) = differences({"emb_cos_within_coef": 0.25}, args)
    assert (change.name, change.was) == ("reg", ["patch.cosine@last=0.25"])


def test_deits_checkpoints_hold_the_scaled_rate(capsys):
    """Its main.py multiplies args.lr before it saves: 5e-4 x 128 / 512."""
    args = config.resolve(["--data-set", "DIGITS"])
    for lr, changed in ((1.25e-4, False), (1e-3, True)):
        earlier = Earlier("x.pth", {"args": argparse.Namespace(lr=lr, batch_size=128, data_set="DIGITS")})
        assert in_force(args, earlier) == args and ("lr" in earlier.was) == changed


def test_a_step_beyond_the_epoch_is_refused(images, tmp_path, capsys):
    assert train(images, tmp_path, "--epochs", "1") == 0
    torch.save({**saved(tmp_path), "epoch": -1, "step": 99}, tmp_path / "checkpoint.pth")
    (tmp_path / "checkpoint_best.pth").unlink()
    assert train(images, tmp_path, "--epochs", "1", "--resume", str(tmp_path / "checkpoint.pth")) == 2
    assert "99 steps into an epoch of 3" in capsys.readouterr().err


def test_a_switch_is_named_as_one_types_it(capsys):
    before = config.resolve(["--data-set", "DIGITS"])
    for flags, said in (
        ({"scale_lr_flag": False}, "--unscale-lr"),
        ({"model_ema": False}, "--no-model-ema"),
        ({"clip_grad": 1.0}, "--clip-grad 1.0, before (none)"),
        ({"skip_bad_images": True}, "--skip-bad-images, before False"),
    ):
        in_force(replace(before, **flags), Earlier("x.pth", {"args": config.plain(before)}))
        assert said in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# What is in force, in whole runs


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["train_lr"] for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["--epochs", "2"], ["--epochs", "5"]),
        (["--epochs", "2"], ["--epochs", "5", "--lr", "3e-3"]),
        (["--epochs", "2"], ["--epochs", "5", "--min-lr", "1e-3", "--warmup-epochs", "3", "--warmup-lr", "1e-4"]),
        (["--epochs", "2", "--sched", "step"], ["--epochs", "5", "--sched", "step", "--decay-epochs", "2"]),
        (
            ["--epochs", "2", "--sched", "wsd", "--decay-epochs", "1"],
            ["--epochs", "5", "--sched", "wsd", "--decay-epochs", "2"],
        ),
        (["--epochs", "2", "--lr-noise", "0"], ["--epochs", "5", "--lr-noise", "0", "--lr-noise-pct", "0.1"]),
    ],
)
def test_a_changed_schedule_goes_on_as_if_it_had_always_been_so(images, tmp_path, first, then, capsys):
    assert train(images, tmp_path / "a", *first) == 0
    capsys.readouterr()
    assert train(images, tmp_path / "a", *then, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert train(images, tmp_path / "b", *then) == 0
    assert rates(tmp_path / "a")[2:] == rates(tmp_path / "b")[2:]
    changed = dict(zip(then[::2], then[1::2], strict=True))
    for name, value in changed.items():
        if f"{name} {value}" not in " ".join(first):
            assert out.count(f"from here on {name} ") == 1
    peak = float(changed.get("--lr", "1e-2"))
    assert f"peak learning rate {peak:.4g}" in out
    flags = yaml.safe_load((tmp_path / "a" / "args.yaml").read_text())
    state = saved(tmp_path / "a")
    assert flags["epochs"] == state["args"]["epochs"] == 5
    assert flags["lr"] == state["args"]["lr"] == peak
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [
        group["lr"] for group in saved(tmp_path / "b")["optimizer"]["param_groups"]
    ]
    assert "# changed after epoch 2: --epochs 5, before 2" in (tmp_path / "a" / "args.yaml").read_text()
    assert any("--epochs 5" in change for change in state["changes"])


def test_optimizer_options_hold_from_here_on(images, tmp_path):
    assert train(images, tmp_path, "--epochs", "1") == 0
    flags = ["--weight-decay", "0.3", "--opt-betas", "0.8", "0.9", "--opt-eps", "1e-6", "--clip-grad", "1"]
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto", *flags) == 0
    plain, decayed = saved(tmp_path)["optimizer"]["param_groups"]
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    assert list(plain["betas"]) == list(decayed["betas"]) == [0.8, 0.9] and decayed["eps"] == 1e-6


def test_a_changed_number_of_groups_is_refused(images, tmp_path, capsys):
    assert train(images, tmp_path, "--epochs", "1") == 0
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto", "--weight-decay", "0") == 2
    assert "in 2 groups, but the model has 32 in 1: repeat the flags of its args.yaml" in capsys.readouterr().err


def test_a_changed_world_or_batch_changes_the_peak(images, tmp_path, capsys):
    flags = [*FLAGS, "--data-path", str(images), "--output_dir", str(tmp_path), "--min-lr", "0", "--warmup-lr", "0"]
    flags.remove("--unscale-lr")
    assert main.main([*flags, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main.main([*flags, "--epochs", "2", "--resume", "auto", "--grad-accum-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "from here on the peak learning rate" not in out  # one line, in the form of all others
    assert f"peak learning rate {1e-2 * 8 / 512:.4g}, before {1e-2 * 4 / 512:.4g} (global batch 8, before 4)" in out
    assert saved(tmp_path)["optimizer"]["param_groups"][0]["initial_lr"] == 1e-2 * 8 / 512
    state = saved(tmp_path)
    torch.save({**state, "processes": state["processes"] * 2}, tmp_path / "checkpoint.pth")
    assert main.main([*flags, "--epochs", "3", "--resume", "auto", "--grad-accum-steps", "2"]) == 0
    assert "(global batch 8, before 16)" in capsys.readouterr().out


def test_other_terms_hold_from_the_next_epoch_on(images, tmp_path, capsys):
    """Within an epoch its means would be of two quantities."""
    one, two = ["--reg", "patch.cosine=0.5"], ["--reg", "attn.cosine@0=0.1", "--mixing_coef", "1"]
    assert (
        train(images, tmp_path, "--epochs", "2", "--save-interval-steps", "2", "--checkpoint-hist", "9", *one) == 0
    )
    inside = next(path for path in tmp_path.glob("checkpoint.*.pth") if saved(tmp_path, path.name)["step"])
    copy = tmp_path / "inside"
    copy.mkdir()
    shutil.copy(inside, copy / "checkpoint.pth")
    capsys.readouterr()
    assert train(images, copy, "--epochs", "2", "--resume", "auto", *two) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in the middle of an epoch with --reg patch.cosine@last=0.5, not " in line
    assert train(images, tmp_path, "--epochs", "3", "--resume", "auto", *two) == 0
    first, *_, last = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert "train_patch.cosine@last" in first and "train_patch.cosine@last" not in last
    assert "train_attn.cosine@0" in last and "train_patch.mixing" in last


def test_another_seed_is_another_stream(images, tmp_path):
    """Streams of the checkpoint are of the seed before."""
    for folder, flags in (("a", []), ("b", ["--seed", "5"])):
        assert train(images, tmp_path / folder, "--epochs", "1") == 0
        assert train(images, tmp_path / folder, "--epochs", "2", "--resume", "auto", *flags) == 0
    ours = saved(tmp_path / "b")["processes"][0]["streams"]["mixup"]
    assert not torch.equal(
        saved(tmp_path / "a")["processes"][0]["streams"]["mixup"]["state"]["key"], ours["state"]["key"]
    )


def test_the_average_is_dropped_with_a_word(images, tmp_path, capsys):
    assert train(images, tmp_path, "--epochs", "1") == 0
    assert train(images, tmp_path, "--epochs", "2", "--resume", "auto", "--no-model-ema") == 0
    assert "note: --no-model-ema drops the moving average of " in capsys.readouterr().out
    assert "model_ema" not in saved(tmp_path)


def one_more(root: Path) -> None:
    save_photo(root / "train" / "class0" / "more.png", width=9, height=9)


def another_name(root: Path) -> None:
    (root / "train" / "class0" / "0.png").rename(root / "train" / "class0" / "zero.png")


def another_class(root: Path) -> None:
    (root / "train" / "class0" / "0.png").rename(root / "train" / "class1" / "00.png")


def another_size(root: Path) -> None:
    save_photo(root / "train" / "class0" / "0.png", seed=99, width=19, height=19)


@pytest.mark.parametrize(
    ("change", "packed"),
    [(one_more, True), (another_name, False), (another_class, False), (another_size, False), (another_size, True)],
)
def test_images_that_changed(tmp_path, change, packed, capsys):
    images = make_images(tmp_path / "data")
    flags = ["--data-set", "tar"] if packed else []
    pack(images, packed)
    often = ["--save-interval-steps", "2", "--checkpoint-hist", "9"]
    assert train(images, tmp_path, "--epochs", "1", *often, *flags) == 0
    for name in [
        path.name for path in tmp_path.glob("checkpoint.*.pth") if saved(tmp_path, path.name)["step"] == 2
    ]:
        (tmp_path / "inside").mkdir(exist_ok=True)
        shutil.copy(tmp_path / name, tmp_path / "inside" / "checkpoint.pth")
    moved = tmp_path / "elsewhere"
    shutil.move(images, moved)  # which is no change
    assert train(moved, tmp_path / "inside", "--epochs", "1", "--resume", "auto", *flags) == 0
    shutil.copy(tmp_path / "checkpoint.1.pth", tmp_path / "inside" / "checkpoint.pth")
    (tmp_path / "inside" / "checkpoint_best.pth").unlink()
    change(moved)
    pack(moved, packed)
    capsys.readouterr()
    assert saved(tmp_path / "inside")["step"] > 0
    assert train(moved, tmp_path / "inside", "--epochs", "1", "--resume", "auto", *flags) == 2
    assert "in the middle of an epoch, and the training images are not those of the" in capsys.readouterr().err
    assert train(moved, tmp_path, "--epochs", "2", "--resume", "auto", *flags) == 0
    assert (
        capsys.readouterr().out.count("note: from here on the training images are not those of the checkpoint") == 1
    )
    assert "after epoch 1: other training images" in saved(tmp_path)["changes"]


def pack(root: Path, wanted: bool) -> None:
    for half in ("train", "val") if wanted else ():
        with tarfile.open(root / f"{half}.tar", "w") as file:
            file.add(root / half, arcname=half)


# ------------------------------------------------------------------------------------------------------------
# Every schedule and every optimizer goes on exactly


def goes_on_exactly(images: Path, root: Path, epochs: int, *flags: str) -> None:
    """A run, and one that is continued from its first epoch's checkpoint, end with equal checkpoints."""
    flags = ("--epochs", str(epochs), "--checkpoint-hist", str(epochs), *flags)
    assert train(images, root / "whole", *flags) == 0
    (root / "stopped").mkdir()
    shutil.copy(root / "whole" / f"checkpoint.{epochs - 1}.pth", root / "stopped" / "checkpoint.pth")
    assert saved(root / "stopped")["epoch"] == 0
    assert train(images, root / "stopped", *flags, "--resume", "auto") == 0
    assert (root / "whole" / "log.txt").read_text() == (root / "stopped" / "log.txt").read_text()
    one, other = (
        {key: value for key, value in saved(root / name).items() if key != "args"} for name in ("whole", "stopped")
    )
    assert_same(one, other)


NOISE = ["--lr-noise", "0.1", "0.9", "--lr-noise-pct", "0.3", "--lr-noise-std", "0.2"]


@pytest.mark.parametrize("sched", SCHEDULES)
def test_every_schedule_goes_on_exactly(images, tmp_path, sched):
    """With noise, which is added to the schedule's own rate: an error in either shows in the sum."""
    flags = [
        "--decay-epochs",
        "2",
        "--decay-milestones",
        "1",
        "3",
        "--patience-epochs",
        "0",
        "--cooldown-epochs",
        "0",
    ]
    goes_on_exactly(images, tmp_path, 3, "--sched", sched, *flags, *NOISE)


ELSEWHERE = ("bnb", "fused")  # optimizers of other packages, for CUDA
OPTIMIZERS = [name for name in list_optimizers() if not name.startswith(ELSEWHERE)]
SMALLER = ["--model-kwargs", "patch_size=4", "embed_dim=8", "depth=1", "num_heads=2"]  # kron takes long


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning")  # kron
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # adahessian
@pytest.mark.parametrize("opt", [*OPTIMIZERS, "lookahead_adamw"])
def test_every_optimizer_goes_on_exactly(images, tmp_path, opt):
    set_fused_attn(opt != "adahessian")  # which needs second derivatives
    try:
        with torch.compiler.set_stance("force_eager"):  # kron would compile for minutes
            goes_on_exactly(images, tmp_path, 2, "--opt", opt, *SMALLER)
    finally:
        set_fused_attn(True)
