"""Flags, YAML and their precedence; what is refused before anything is built."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from errors import UserError
from options import config, flags

# The reference's command line: (flag, destination, type, default, choices, takes several values). Switches have
# type "on" or "off". Three defaults differ on purpose: --device (cuda), --data-path (a path of its own), and
# --num_workers (10, more than some machines have cores).
CATEGORIES = ["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"]
REFERENCE = [
    ("--mixing_coef", "mixing_coef", float, 0, None, False),
    ("--emb_cos_within_coef", "emb_cos_within_coef", float, 0, None, False),
    ("--emb_contrast_cross_coef", "emb_contrast_cross_coef", float, 0, None, False),
    ("--attn_cos_within_coef", "attn_cos_within_coef", float, 0, None, False),
    ("--weight_mha_cond_orth_coef", "weight_mha_cond_orth_coef", float, 0, None, False),
    ("--batch-size", "batch_size", int, 128, None, False),
    ("--epochs", "epochs", int, 300, None, False),
    ("--scale_lr_flag", "scale_lr_flag", "off", True, None, False),
    ("--model", "model", str, "deit_base_patch16_224", None, False),
    ("--input-size", "input_size", int, 224, None, False),
    ("--drop", "drop", float, 0.0, None, False),
    ("--drop-path", "drop_path", float, 0.1, None, False),
    ("--model-ema", "model_ema", "on", True, None, False),
    ("--no-model-ema", "model_ema", "off", True, None, False),
    ("--model-ema-decay", "model_ema_decay", float, 0.99996, None, False),
    ("--model-ema-force-cpu", "model_ema_force_cpu", "on", False, None, False),
    ("--opt", "opt", str, "adamw", None, False),
    ("--opt-eps", "opt_eps", float, 1e-8, None, False),
    ("--opt-betas", "opt_betas", float, None, None, True),
    ("--clip-grad", "clip_grad", float, None, None, False),
    ("--momentum", "momentum", float, 0.9, None, False),
    ("--weight-decay", "weight_decay", float, 0.05, None, False),
    ("--sched", "sched", str, "cosine", None, False),
    ("--lr", "lr", float, 5e-4, None, False),
    ("--lr-noise", "lr_noise", float, None, None, True),
    ("--lr-noise-pct", "lr_noise_pct", float, 0.67, None, False),
    ("--lr-noise-std", "lr_noise_std", float, 1.0, None, False),
    ("--warmup-lr", "warmup_lr", float, 1e-6, None, False),
    ("--min-lr", "min_lr", float, 1e-5, None, False),
    ("--decay-epochs", "decay_epochs", float, 30, None, False),
    ("--warmup-epochs", "warmup_epochs", int, 5, None, False),
    ("--cooldown-epochs", "cooldown_epochs", int, 10, None, False),
    ("--patience-epochs", "patience_epochs", int, 10, None, False),
    ("--decay-rate", "decay_rate", float, 0.1, None, False),
    ("--dr", "decay_rate", float, 0.1, None, False),
    ("--color-jitter", "color_jitter", float, 0.4, None, False),
    ("--aa", "aa", str, "rand-m9-mstd0.5-inc1", None, False),
    ("--smoothing", "smoothing", float, 0.1, None, False),
    ("--train-interpolation", "train_interpolation", str, "bicubic", None, False),
    ("--repeated-aug", "repeated_aug", "on", True, None, False),
    ("--no-repeated-aug", "repeated_aug", "off", True, None, False),
    ("--reprob", "reprob", float, 0.25, None, False),
    ("--remode", "remode", str, "pixel", None, False),
    ("--recount", "recount", int, 1, None, False),
    ("--resplit", "resplit", "on", False, None, False),
    ("--mixup", "mixup", float, 0.8, None, False),
    ("--cutmix", "cutmix", float, 1.0, None, False),
    ("--cutmix-minmax", "cutmix_minmax", float, None, None, True),
    ("--mixup-prob", "mixup_prob", float, 1.0, None, False),
    ("--mixup-switch-prob", "mixup_switch_prob", float, 0.5, None, False),
    ("--mixup-mode", "mixup_mode", str, "batch", None, False),
    ("--teacher-model", "teacher_model", str, "regnety_160", None, False),
    ("--teacher-path", "teacher_path", str, "", None, False),
    ("--distillation-type", "distillation_type", str, "none", ["none", "soft", "hard"], False),
    ("--distillation-alpha", "distillation_alpha", float, 0.5, None, False),
    ("--distillation-tau", "distillation_tau", float, 1.0, None, False),
    ("--finetune", "finetune", str, "", None, False),
    ("--data-path", "data_path", str, None, None, False),
    ("--data-set", "data_set", str, "IMNET", ["CIFAR", "IMNET", "INAT", "INAT19"], False),
    ("--inat-category", "inat_category", str, "name", CATEGORIES, False),
    ("--output_dir", "output_dir", str, "", None, False),
    ("--device", "device", str, "auto", None, False),
    ("--seed", "seed", int, 0, None, False),
    ("--resume", "resume", str, "", None, False),
    ("--start_epoch", "start_epoch", int, 0, None, False),
    ("--eval", "eval", "on", False, None, False),
    ("--teacher_eval", "teacher_eval", "on", False, None, False),
    ("--dist-eval", "dist_eval", "on", False, None, False),
    ("--num_workers", "num_workers", int, None, None, False),
    ("--pin-mem", "pin_mem", "on", True, None, False),
    ("--no-pin-mem", "pin_mem", "off", True, None, False),
    ("--world_size", "world_size", int, 1, None, False),
    ("--dist_url", "dist_url", str, "env://", None, False),
]
SAMPLES = {float: "0.25", int: "3", str: "word"}


def parse(*argv: str) -> argparse.Namespace:
    return flags.get_args_parser().parse_args(argv)


@pytest.mark.parametrize(
    ("flag", "dest", "kind", "default", "choices", "many"), REFERENCE, ids=lambda v: str(v)[:24]
)
def test_reference_flag(flag, dest, kind, default, choices, many):
    """Name, destination, type and default are the reference's, in both spellings."""
    assert getattr(parse(), dest) == default and type(getattr(parse(), dest)) in (type(default), int)
    for spelling in {"--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")}:
        if kind in ("on", "off"):
            assert getattr(parse(spelling), dest) is (kind == "on")
            continue
        word = choices[-1] if choices else {"--mixup-mode": "pair", "--sched": "step"}.get(flag, SAMPLES[kind])
        values = [word, word] if many else [word]
        expected = [kind(word)] * 2 if many else kind(word)
        parsed = getattr(parse(spelling, *values), dest)
        assert parsed == expected and type(parsed) is (list if many else kind)
    for choice in choices or []:
        assert getattr(parse(flag, choice), dest) == choice
    if choices:
        with pytest.raises(UserError, match="invalid choice"):
            parse(flag, "nonsense")


def test_every_flag_has_both_spellings_and_a_help_text():
    for action in flags.get_args_parser()._actions:
        assert action.help and len(action.help) > 3
        for option in (o for o in action.option_strings if o.startswith("--")):
            assert "--" + option[2:].replace("-", "_") in action.option_strings
            assert "--" + option[2:].replace("_", "-") in action.option_strings


def test_help_shows_groups_and_one_spelling(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.get_args_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in (
        "diversity",
        "model",
        "data",
        "augmentation",
        "Mixup",
        "optimizer",
        "schedule",
        "distillation",
        "run",
    ):
        assert f"\n{group}" in text
    assert "--batch-size" in text and "--batch_size" not in text


def test_data_sets_with_a_prefix_may_have_any_name(tmp_path):
    """What the prefix may be is found out where the data is opened."""
    assert parse("--data-set", "hfds/Org/Name").data_set == "hfds/Org/Name"
    file = write(tmp_path / "c.yaml", "data_set: hfds/Org/Name\n")
    assert config.resolve(["-c", file]).data_set == "hfds/Org/Name"


def test_flags_of_the_loader(tmp_path):
    args = parse("--group-repeats", "--fast-resize", "--num-workers", "3")
    assert args.group_repeats and args.fast_resize and args.num_workers == 3
    args = config.resolve([])
    assert not args.group_repeats and not args.fast_resize
    config.write_args(args, tmp_path / "args.yaml")
    assert config.resolve(["-c", str(tmp_path / "args.yaml")]).num_workers is None


def test_unscale_lr_is_the_readable_twin():
    assert (
        config.resolve(["--unscale-lr"]).scale_lr_flag is config.resolve(["--scale_lr_flag"]).scale_lr_flag is False
    )


# ------------------------------------------------------------------------------------------------------------
# YAML


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_model_kwargs_are_merged(tmp_path):
    file = write(tmp_path / "c.yaml", "model_kwargs: {depth: 6, patch_size: 4}\n")
    args = config.resolve(["-c", file, "--model-kwargs", "depth=2", "--model-kwargs", "num_heads=3"])
    assert args.model_kwargs == {"depth": 2, "patch_size": 4, "num_heads": 3}


def test_precedence_defaults_file_command_line(tmp_path):
    file = write(
        tmp_path / "c.yaml", "epochs: 7\nbatch-size: 32\nlr: 5e-4\nrepeated_aug: false\nno_model_ema: true\n"
    )
    args = config.resolve(["-c", file, "--epochs", "9"])
    assert (args.epochs, args.batch_size, args.seed) == (9, 32, 0)
    assert args.lr == 5e-4 and isinstance(args.lr, float)  # YAML reads 5e-4 as a string
    assert args.repeated_aug is False and args.model_ema is False
    assert config.resolve(["--config", file, "--epochs", "300"]).epochs == 300  # a default given aloud still wins


def test_yaml_types(tmp_path):
    text = "opt_betas: [0.9, 99e-2]\nclip-grad: null\nmodel_kwargs: {depth: 6, patch_size: 4}\naa: none\n"
    args = config.resolve(["--config", write(tmp_path / "c.yaml", text)])
    assert args.opt_betas == [0.9, 0.99] and args.clip_grad is None and args.aa == "none"
    assert args.model_kwargs == {"depth": 6, "patch_size": 4}
    assert config.resolve(["--model-kwargs", "depth=6", "act_layer=relu"]).model_kwargs == {
        "depth": 6,
        "act_layer": "relu",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs: 3\n", "unknown key 'epohcs'. Did you mean epochs"),
        ("regularizer:\n  patch.cosine: 1\n", "Did you mean regularizers"),
        ("epochs: many\n", "epochs must be of type int"),
        ("epochs: [1, 2]\n", "epochs must be one value"),
        ("opt_betas: 0.9\n", "opt_betas must be a list"),
        ("repeated_aug: 1\n", "repeated_aug must be true or false"),
        ("data_set: MNIST\n", "data_set must be one of"),
        ("model_kwargs: 3\n", "model_kwargs must map names to values"),
        ("regularizers: 3\n", "regularizers must map specs"),
        ("regularizers:\n  patch.cosin: 1\n", "unknown regularizer 'patch.cosin'. Did you mean patch.cosine"),
        ("- epochs\n", "must hold 'flag: value' lines"),
        ("epochs: [\n", "is not YAML"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("seed: null\n", "seed must be of type int, not None"),
        ("measure: null\n", "measure must be a list"),
        ("batch_size: 4\nbatch-size: 8\n", "batch-size says again what another key says"),
        ("model_ema: true\nno_model_ema: true\n", "no_model_ema says again"),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        config.resolve(["--config", write(tmp_path / "c.yaml", text)])
    assert "\n" not in str(error.value)


def test_missing_config():
    with pytest.raises(UserError, match=r"cannot read --config nowhere\.yaml: No such file"):
        config.resolve(["--config", "nowhere.yaml"])


def test_args_yaml_repeats_the_run(tmp_path):
    argv = [
        "--epochs",
        "3",
        "--reg",
        "patch.cosine:abs@all=0.5",
        "--mixing_coef",
        "1",
        "--opt-betas",
        "0.9",
        "0.95",
    ]
    argv += [
        "--model-kwargs",
        "depth=2",
        "--measure",
        "attn.cosine@0",
        "--no-model-ema",
        "--cutmix-minmax",
        "0.2",
        "0.8",
    ]
    first = config.resolve(argv)
    config.write_args(first, tmp_path / "args.yaml")
    second = config.resolve(["--config", str(tmp_path / "args.yaml")])
    assert second.terms == first.terms and second.measures == first.measures
    assert config.plain(second) | {"config": ""} == config.plain(first)
    head = (tmp_path / "args.yaml").read_text()
    assert "# revision: " in head and "# timm: " in head and "# torch: " in head
    assert yaml.safe_load(head)["epochs"] == 3


# ------------------------------------------------------------------------------------------------------------
# Regularizers


def names(args: argparse.Namespace) -> dict[str, float]:
    return {spec.name: spec.coef for spec in args.terms}


def test_reference_flags_are_spellings_of_reg():
    flags = ["--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--emb_contrast_cross_coef", "0.5"]
    flags += ["--attn_cos_within_coef", "1e-4", "--weight_mha_cond_orth_coef", "5e-4"]
    regs = ["patch.mixing=1", "patch.cosine=0.5", "patch.contrastive=0.5", "attn.cosine=1e-4", "weight.cno=5e-4"]
    by_reg = config.resolve([word for reg in regs for word in ("--reg", reg)])
    by_flag = config.resolve(flags)
    assert names(by_flag) == names(by_reg) and len(by_flag.terms) == 5
    assert config.plain(by_flag) | {"reg": None} == config.plain(by_reg) | {"reg": None}


def test_command_line_overrides_and_switches_off_terms_of_the_file(tmp_path):
    text = "regularizers:\n  patch.cosine@last: 5e-1\n  attn.so@0,1: 1\nemb_contrast_cross_coef: 0.5\n"
    file = write(tmp_path / "c.yaml", text)
    assert names(config.resolve(["-c", file])) == {
        "patch.contrastive@first:last": 0.5,
        "patch.cosine@last": 0.5,
        "attn.so@0,1": 1,
    }
    changed = config.resolve(["-c", file, "--emb_cos_within_coef", "0.1", "--reg", "attn.so@0,1=0"])
    assert names(changed) == {"patch.contrastive@first:last": 0.5, "patch.cosine@last": 0.1}
    assert changed.emb_cos_within_coef == 0.1 and changed.emb_contrast_cross_coef == 0.5
    listed = write(tmp_path / "l.yaml", "regularizers: [patch.mhs=1, weight.mgd@0-1=2]\n")
    assert names(config.resolve(["-c", listed])) == {"patch.mhs@last": 1, "weight.mgd@0-1": 2}


def test_one_term_twice_in_one_source_is_refused():
    with pytest.raises(UserError, match=r"gives patch.cosine@last twice, with 0.5 and 0.3"):
        config.resolve(["--emb_cos_within_coef", "0.5", "--reg", "patch.cosine=0.3"])


# ------------------------------------------------------------------------------------------------------------
# Refused at once


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bach-size", "3"], "unrecognized arguments: --bach-size 3. Did you mean --batch-size"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--num_workers", "-1"], "--num-workers must be at least 0"),
        (["--lr", "-1"], "--lr must be at least 0, not -1.0"),
        (["--lr", "nan"], "--lr must be at least 0, not nan"),
        (["--lr", "inf"], "--lr must be at least 0, not inf"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--drop-path", "1.5"], "--drop-path must be between 0 and 1"),
        (["--model-ema-decay", "2"], "--model-ema-decay must be between 0 and 1"),
        (["--distillation-alpha", "5"], "--distillation-alpha must be between 0 and 1"),
        (["--clip-grad", "-1"], "--clip-grad must be at least"),
        (["--decay-epochs", "0"], "--decay-epochs must be at least"),
        (["--opt-betas", "0.9"], "--opt-betas takes two"),
        (["--opt-betas", "0.9", "2"], "--opt-betas takes two"),
        (["--lr-noise", "0.1", "0.2", "0.3"], "--lr-noise takes one or two"),
        (["--batch-size", "63"], "--batch-size 63 is odd.*--mixup 0 --cutmix 0"),
        (["--batch-size", "63", "--mixup", "0"], "is odd"),
        (["--opt", "adamww"], "unknown optimizer 'adamww'. Did you mean adamw"),
        (["--sched", "cosin"], "invalid choice: 'cosin'"),
        (["--model-kwargs", "depth"], "'depth' is not KEY=VALUE"),
        (["--cutmix-minmax", "0.1"], "--cutmix-minmax takes two numbers"),
        (["--distillation-type", "hard", "--finetune", "x.pth"], "cannot be combined with --finetune"),
        (["--fsdp", "--reg", "patch.gradient_diversity=1"], "patch.gradient_diversity@last differentiates twice"),
        (["--fsdp", "--torchcompile"], "one graph, which --fsdp breaks"),
        (["--fsdp", "--model-ema-force-cpu"], "drop --model-ema-force-cpu"),
        (["--distillation-type", "hard"], "a teacher needs weights: give --teacher-path"),
        (["--teacher_eval"], "a teacher needs weights: give --teacher-path"),
        (["--resume", "nowhere.pth"], "--resume nowhere.pth: no such file"),
        (["--finetune", "nowhere.pth"], "--finetune nowhere.pth: no such file"),
        (["--output_dir", __file__], "is a file, not a folder"),
        (["--group-repeats", "--no-repeated-aug"], "--no-repeated-aug makes none: drop one of them"),
        (["--reg", "patch.cosin=1"], "unknown regularizer 'patch.cosin'. Did you mean patch.cosine"),
        (["--reg", "patch.cosine"], "malformed regularizer 'patch.cosine': write"),
        (["--measure", "patch.cosine=1"], "malformed regularizer 'patch.cosine=1': write"),
    ],
)
def test_refused(argv, message):
    with pytest.raises(UserError, match=message) as error:
        config.resolve(argv)
    assert "\n" not in str(error.value)


def test_lookahead_optimizers_are_timms():
    assert config.resolve(["--opt", "lookahead_adamw"]).opt == "lookahead_adamw"


@pytest.mark.parametrize("off", [["--mixup", "0", "--cutmix", "0"], ["--mixup-prob", "0"], ["--eval"]])
def test_odd_batch_without_mixing_is_fine(off):
    assert config.resolve(["--batch-size", "63", *off]).batch_size == 63
