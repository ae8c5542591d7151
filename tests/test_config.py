"""Flags, YAML and their precedence; what is refused before anything is built; args.yaml repeats a run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from options import config
from options.flags import Args, get_args_parser
from options.parser import declared


def test_flags_of_the_loader(tmp_path):
    args = config.resolve(["--group-repeats", "--fast-resize", "--num-workers", "3"])
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


def test_numbers_without_a_point_in_model_kwargs(tmp_path):
    """YAML takes them for texts; here they are numbers, as on the command line, also in lists and mappings."""
    text = "model_kwargs: {init_values: 1e-4, a: [5E+2, x], b: {c: -2e3}, d: 1e-4x, e: 1.5}\n"
    args = config.resolve(["--config", write(tmp_path / "c.yaml", text)])
    assert args.model_kwargs == {
        "init_values": 1e-4,
        "a": [500.0, "x"],
        "b": {"c": -2000.0},
        "d": "1e-4x",
        "e": 1.5,
    }
    given = config.resolve(["--model-kwargs", "init_values=1e-4"]).model_kwargs
    assert given["init_values"] == args.model_kwargs["init_values"]


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


def names(args: config.Resolved) -> dict[str, float]:
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
        (["--seed", "2147483649"], "--seed must be at most 2147483648, not 2147483649"),
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
        (
            ["--clip-mode", "agc", "--clip-grad", "1", "--reg", "patch.region_mixing=1"],
            "patch.region_mixing adds another one behind it: choose norm or value",
        ),
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


# ------------------------------------------------------------------------------------------------------------
# args.yaml repeats any run

LEFT_OUT = {
    *(
        "config",
        "reg",
        "measure",
        "remedy",
        "model_kwargs",
        "teacher_model_kwargs",
        "opt_kwargs",
    ),  # have words of their own, below
    *(
        "resume",
        "resume_opt",
        "finetune",
        "teacher_path",
        "teacher_eval",
        "distillation_type",
        "val_labels",
        "log_with",
    ),  # ask for files
    *("weights", "teacher_weights"),  # choose among those of such a file
    *(
        "group_repeats",
        "fsdp",
        "bce_loss",
        "src",
        "three_augment",
        "clip_mode",
    ),  # contradict others, or ask for them
}
# What `check` asks for beyond a flag's own limits.
ASKED_FOR = {
    "opt": st.sampled_from(["adamw", "sgd", "lookahead_adamw"]),
    "batch_size": st.integers(1, 500).map(lambda half: str(2 * half)),
    "cutmix_minmax": st.lists(st.floats(0, 1).map(repr), min_size=2, max_size=2),
    "opt_betas": st.lists(st.floats(0, 0.999).map(repr), min_size=2, max_size=3),
    "decay_milestones": st.sets(st.integers(1, 10**6), min_size=1).map(
        lambda found: [str(e) for e in sorted(found)]
    ),
    "input_size": st.lists(st.integers(1, 1000).map(str), min_size=1, max_size=2),
    "teacher_input_size": st.lists(st.integers(1, 1000).map(str), min_size=1, max_size=2),
    "in_chans": st.sampled_from(["1", "3"]),
    "lr_noise": st.lists(st.floats(0, 1).map(repr), min_size=1, max_size=2),
}
words = st.text(st.characters(codec="utf-8", exclude_characters="\0~"), max_size=8)
specs = st.sampled_from(["patch.cosine:abs@0,6-11", "attn.so", "weight.cno:q,k@all", "patch.contrastive@0:last"])
coefs = st.floats(0, 1e6).map(repr)
kwargs = st.dictionaries(
    st.from_regex(r"\A[a-z][a-z_0-9]{0,5}\Z"),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.lists(st.integers()) | words,
    max_size=3,
)


def values_of(action: argparse.Action) -> st.SearchStrategy[Any]:
    """Words on the command line that a flag takes."""
    limits = declared(Args)[action.dest].limits or (0, 1e6)
    low, high = limits[0], min(limits[1], 1e6)
    if action.dest in ASKED_FOR:
        return ASKED_FOR[action.dest]
    if action.nargs == 0:
        return st.just([])
    if action.choices is not None:
        return st.sampled_from(sorted(action.choices))
    return {int: st.integers(int(low), int(high)).map(str), float: st.floats(low, high).map(repr), str: words}[
        action.type
    ]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    argv: list[str] = []
    every = get_args_parser().long_names().items()
    known = [(name, action) for name, action in every if action.dest in declared(Args).keys() - LEFT_OUT]
    for name, action in draw(st.lists(st.sampled_from(known), max_size=12)):
        value = draw(values_of(action))
        argv += [name, *value] if isinstance(value, list) else [f"{name}={value}"]
    for spec in draw(st.lists(specs, unique=True)):
        argv += ["--reg", f"{spec}={draw(coefs)}"]
    for spec in draw(st.lists(specs)):
        argv += ["--measure", spec]
    return [*argv, "--model-kwargs", *(f"{key}={value!r}" for key, value in draw(kwargs).items())]


@settings(deadline=None, max_examples=40)
@given(command_lines())
def test_args_yaml_repeats_any_run(argv):
    first = config.resolve(argv)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "provenance", dict)
        path = Path(folder) / "args.yaml"
        config.write_args(first, path)
        second = config.resolve(["--config", str(path)])
    assert replace(second, config="") == first


def test_a_recorded_command_is_the_one_that_was_typed(monkeypatch):
    """Python puts the whole path of a package's program into argv, which is nobody's business."""
    monkeypatch.setattr("sys.argv", ["/home/me/project/segmentation/__main__.py", "--seed", "1"])
    assert config.provenance()["command"] == "-m segmentation --seed 1"
    monkeypatch.setattr("sys.argv", ["main.py", "--project", "a b"])
    assert config.provenance()["command"] == "main.py --project 'a b'"
