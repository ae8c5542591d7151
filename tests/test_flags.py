"""The table of flags, the command line that it makes, and what is answered before torch is imported."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from processes import PATIENCE
from timm.optim import create_optimizer
from timm.scheduler import create_scheduler
from timm.utils.misc import ParseKwargs

import export
from errors import UserError
from options import config, flags
from options.flags import FREE, Args
from options.parser import KeyValues, Parser, declared, flag, switch
from regularizers import catalogue

ROOT = Path(__file__).parents[1]

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
    ("--dist-eval", "dist_eval", "on", True, None, False),  # off in the reference, where it is not exact
    ("--num_workers", "num_workers", int, None, None, False),
    ("--pin-mem", "pin_mem", "on", True, None, False),
    ("--no-pin-mem", "pin_mem", "off", True, None, False),
    ("--world_size", "world_size", int, 1, None, False),
    ("--dist_url", "dist_url", str, "env://", None, False),
]
SAMPLES = {float: "0.25", int: "3", str: "word"}


def parse(*argv: str) -> Args:
    return Args(**flags.get_args_parser().given(argv))


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
    file = tmp_path / "c.yaml"
    file.write_text("data_set: hfds/Org/Name\n")
    assert config.resolve(["-c", str(file)]).data_set == "hfds/Org/Name"


# ------------------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("name", [entry.name for entry in fields(Args)])
def test_a_default_is_of_its_type_and_within_its_limits(name):
    default, kind, limits = getattr(Args(), name), get_type_hints(Args)[name], declared(Args)[name].limits
    allowed = {get_origin(part) or part for part in get_args(kind) if get_origin(kind) is UnionType} or {
        get_origin(kind) or kind
    }
    assert type(default) in (allowed | {int} if float in allowed else allowed)  # 0 may stand for 0.0
    assert (default is None) == (NoneType in allowed)
    assert limits is None or default is None or limits[0] <= default <= limits[1]


def test_nothing_given_is_nothing():
    assert flags.get_args_parser().given([]) == {}
    assert flags.get_args_parser().given(["--eval", "--epochs", "300"]) == {"eval": True, "epochs": 300}


def test_values_cannot_be_changed_but_copied():
    """As timm's factories take them: attributes of an object."""
    args = parse("--opt", "sgd", "--sched", "step", "--opt-betas", "0.9", "0.99")
    with pytest.raises(FrozenInstanceError):
        args.lr = 0.1
    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer(replace(args, lr=0.25), model)
    schedule, _ = create_scheduler(replace(args, warmup_epochs=0), optimizer)
    schedule.step(30)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == args.momentum
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert parse().reg is not parse().reg


def test_a_table_of_ones_own():
    """The type comes from the annotation; names, limits and the rest from what is declared."""
    parser = Parser(prog="own", allow_abbrev=False)
    groups = parser.add_table(Table)
    assert list(groups) == ["first", "second"]
    assert vars(parser.parse_args([])) == vars(Table())
    text = parser.format_help()
    assert "--step-size N" in text and "--rates X [X ...]" in text and "--kind {a,b}" in text
    words = "--step_size 3 --rates 1 2 --quiet --no-loud --word-by-word x -n y --pairs a=1"
    values = {"step_size": 3, "rates": [1.0, 2.0], "quiet": True, "loud": False, "word": "x", "name": "y"}
    assert parser.given(words.split()) == {**values, "pairs": {"a": 1}}
    assert parser.given(["--soft"]) == {"loud": False}
    assert declared(Table)["step_size"].limits == (1, 5) and declared(Table)["rates"].limits is None
    for unknown in ("--word", "--no-quiet", "--loudly"):
        with pytest.raises(UserError, match=f"unrecognized arguments: {unknown}"):
            parser.given([unknown])


@dataclass
class Table:
    step_size: int = flag(1, FREE, "size", group="first", limits=(1, 5))
    rates: list[float] | None = flag(None, FREE, "rates", nargs="+")
    kind: str = flag("a", FREE, "kind", choices=["a", "b"])
    quiet: bool = switch(False, FREE, on="be quiet", group="second")
    loud: bool = switch(True, FREE, on="be loud", off={"--no-loud": "be quiet", "--soft": "the same"})
    word: str = flag("", FREE, "word", "--word-by-word")
    name: str = flag("", FREE, "name", "-n", "--name")
    pairs: dict[str, int] = flag({}, FREE, "pairs", nargs="*", action=KeyValues, metavar="KEY=VALUE")


# ------------------------------------------------------------------------------------------------------------
# KEY=VALUE


def pairs(action: type[argparse.Action], *words: str) -> dict:
    parser = Parser(exit_on_error=False)
    parser.add_argument("--pairs", nargs="*", action=action, default={})
    return parser.parse_args(["--pairs", *words]).pairs


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
texts = st.text(st.characters(codec="utf-8")) | literals.map(repr) | st.sampled_from(["relu", "(2,2)", "1e-3", ""])


@settings(deadline=None)
@given(st.lists(st.tuples(st.from_regex(r"\A[a-z_]+\Z"), texts), max_size=3))
@example([("img_size", "(32, 32)"), ("act_layer", "relu"), ("depth", "6"), ("x", "{'a': [1, None]}"), ("x", "''")])
def test_pairs_are_read_as_timm_reads_them(given_pairs):
    words = [f"{key}={text}" for key, text in given_pairs]
    ours = pairs(KeyValues, *words)
    try:
        timms = pairs(ParseKwargs, *words)
    except (ValueError, SyntaxError):  # timm 1.0.20 does not read "a=b=c" and "a=b c"
        reject()
    assert ours == timms and repr(ours) == repr(timms)


@pytest.mark.parametrize("text", ["{[]: 1}", "(" * 1000, "-" * 100_000 + "1"])
def test_what_python_cannot_read_is_text(text):
    """timm lets some of these end in a traceback."""
    assert pairs(KeyValues, f"x={text}") == {"x": text}


def test_a_value_may_hold_anything():
    given_pairs = {"x": "a=b", "y": "=", "z": "a b", "u": "[]+1"}
    assert pairs(KeyValues, *(f"{key}={text}" for key, text in given_pairs.items())) == given_pairs


def test_pairs_add_up():
    assert parse("--model-kwargs", "a=1", "b=2", "--model-kwargs", "a=3", "--model-kwargs").model_kwargs == {
        "a": 3,
        "b": 2,
    }
    assert Args().model_kwargs == {}


# ------------------------------------------------------------------------------------------------------------
# Answered before anything is imported that takes time


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Environment variables under which importing torch and its like is an error."""
    folder = tmp_path_factory.mktemp("light")
    for name in ("torch", "torchvision", "timm", "numpy", "PIL"):
        (folder / f"{name}.py").write_text("raise SystemExit('something heavy was imported')\n")
    (folder / "mistyped.yaml").write_text("epohcs: 3\n")
    (folder / "fine.yaml").write_text("epochs: 3\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(program: str, *argv: str, env: dict[str, str], **more: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a program, run where `env` puts its modules."""
    command = [sys.executable, str(ROOT / program), *argv]
    ended = subprocess.run(
        command,
        cwd=env["PYTHONPATH"],
        env=env | more,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_help_comes_at_once(light):
    code, out, err = run("main.py", "--help", env=light, COLUMNS="80")
    assert (code, err) == (0, "") and out.startswith("usage: main.py --data-path FOLDER")
    assert out == flags.get_args_parser().format_help()


def test_the_list_of_regularizers_comes_at_once(light):
    code, out, err = run("main.py", "--list-regularizers", env=light)
    assert (code, out, err) == (0, catalogue.as_text() + "\n", "")


@pytest.mark.parametrize(
    "argv",
    [
        ["--bach-size", "3"],
        ["--epochs", "x"],
        ["--epochs"],
        ["--sched", "cosin"],
        ["--model-kwargs", "depth"],
        ["word"],
        ["-c", "mistyped.yaml"],
        ["-c", "nowhere.yaml"],
    ],
)
def test_mistakes_are_answered_at_once(argv, light, monkeypatch):
    """With the line that the whole program would print."""
    code, out, err = run("main.py", *argv, env=light)
    monkeypatch.chdir(light["PYTHONPATH"])
    with pytest.raises(UserError) as error:
        config.resolve(argv)
    assert (code, out, err) == (2, "", f"main.py: error: {error.value}\n")


def test_one_process_of_a_machine_answers(light):
    assert run("main.py", "--bach-size", "3", env=light, LOCAL_RANK="1") == (2, "", "")
    assert run("main.py", "--bach-size", "3", env=light, LOCAL_RANK="0")[2].count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--epochs", "3"], ["-c", "fine.yaml"]])
def test_what_is_right_is_not_answered(argv, light):
    """It goes on to what is heavy: the tests above can fail."""
    assert run("main.py", *argv, env=light) == (1, "", "something heavy was imported\n")


def test_the_export_answers_at_once(light):
    code, out, err = run("script/export_model.py", "--help", env=light)
    assert (code, err) == (0, "") and out.startswith("usage: export_model.py") and "timm, torch, onnx" in out
    code, out, err = run("script/export_model.py", "x.pth", "out", "--wights", "ema", env=light)
    assert (code, out) == (2, "") and "unrecognized arguments: --wights ema. Did you mean --weights?" in err
    code, _, err = run("script/export_model.py", "x.pth", "out", env=light)
    assert (code, err) == (1, "something heavy was imported\n")


def test_choices_of_the_export_are_those_it_knows():
    assert export.FORMATS == flags.FORMATS
