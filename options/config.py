"""A run's configuration: flags, the YAML file, their precedence (defaults < file < command line), and args.yaml.

`resolve` returns one namespace with nothing left to interpret: `terms` holds the parsed regularizers, `measures`
what to measure. The flags themselves are in flags.py.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.optim import list_optimizers

from errors import UserError, did_you_mean
from options.flags import dashed, get_args_parser
from regularizers import REFERENCE_FLAGS, Spec, parse_spec

LARGEST = sys.float_info.max
LARGEST_SEED = 2**31
# Smallest and largest value of each number that has limits here; the data's and Mixup's are checked there.
LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "epochs", "input_size", "print_freq", "world_size"), (1, LARGEST)),
    **dict.fromkeys(("grad_accum_steps", "nonfinite_patience", "checkpoint_hist", "dist_timeout"), (1, LARGEST)),
    **dict.fromkeys(("save_interval_steps", "save_interval_minutes"), (0, LARGEST)),
    **dict.fromkeys(
        ("start_epoch", "warmup_epochs", "cooldown_epochs", "patience_epochs", "num_workers"), (0, LARGEST)
    ),
    **dict.fromkeys(("lr", "min_lr", "warmup_lr", "weight_decay", "opt_eps", "lr_noise_std"), (0, LARGEST)),
    **dict.fromkeys(("model_ema_decay", "momentum", "distillation_alpha", "drop", "drop_path"), (0, 1)),
    **dict.fromkeys(
        ("clip_grad", "decay_epochs", "decay_rate", "distillation_tau", "lr_noise_pct"), (1e-9, LARGEST)
    ),
    "seed": (0, LARGEST_SEED),
}
# What `resolve` adds to the namespace; everything else is a flag's value and is written to args.yaml.
DERIVED = ("terms", "measures")


# ------------------------------------------------------------------------------------------------------------
# Precedence


def resolve(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and its --config file.

    Returns:
        A namespace of every flag, with `terms` (Specs whose coefficient is not 0) and `measures` (Specs).
    Raises:
        UserError: an unknown flag or key, or a value that cannot be.
    """
    parser = get_args_parser()
    parser.parse_args(argv)  # --help and errors, with the defaults in place
    defaults = vars(parser.parse_args([]))
    given = _given_on_command_line(argv)
    file = read_config(given["config"], parser) if given.get("config") else {}
    args = argparse.Namespace(**{**defaults, **file, **given})
    args.model_kwargs = {**file.get("model_kwargs", {}), **given.get("model_kwargs", {})}
    terms = _collect_terms(file, given.get("config", "")) | _collect_terms(given, "the command line")
    args.terms = [spec for spec in terms.values() if spec.coef > 0]
    args.reg = [f"{spec.name}={spec.coef!r}" for spec in args.terms]
    for flag, term in REFERENCE_FLAGS.items():
        setattr(args, flag, next((spec.coef for spec in args.terms if spec.name == term), 0))
    args.measures = [parse_spec(text, with_coef=False) for text in args.measure]
    check(args)
    return args


def _given_on_command_line(argv: Sequence[str] | None) -> dict[str, Any]:
    """Only what the command line says, without defaults."""
    parser = get_args_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _collect_terms(values: Mapping[str, Any], source: str) -> dict[str, Spec]:
    """The terms that one source gives, by name; the reference's flags and --reg are the same thing."""
    texts = [f"{term}={values[flag]!r}" for flag, term in REFERENCE_FLAGS.items() if flag in values]
    terms: dict[str, Spec] = {}
    for text in [*texts, *values.get("reg", [])]:
        spec = parse_spec(text)
        if spec.name in terms and terms[spec.name].coef != spec.coef:
            raise UserError(
                f"{source} gives {spec.name} twice, with {terms[spec.name].coef:g} and {spec.coef:g}: keep one"
            )
        terms[spec.name] = spec
    return terms


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML file of flags (either spelling, without dashes in front) and `regularizers:`.

    `regularizers` maps specs to coefficients, or lists "spec=coef".

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest), or a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold 'flag: value' lines")
    actions = {
        option.lstrip("-").replace("-", "_"): action
        for option, action in parser._option_string_actions.items()
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == "regularizers":
            values["reg"] = [*values.get("reg", []), *_regularizer_list(value, path)]
        elif name in actions and actions[name].dest in values and name != "reg":
            raise UserError(f"{path}: {key} says again what another key says: keep one")
        elif name in actions:
            values[actions[name].dest] = _cast(actions[name], name, value, path)
        else:
            raise UserError(f"{path}: unknown key {key!r}.{did_you_mean(name, [*actions, 'regularizers'])}")
    return values


def _regularizer_list(value: Any, path: str) -> list[str]:
    if isinstance(value, dict):
        return [f"{spec}={coef}" for spec, coef in value.items()]
    if isinstance(value, list):
        return [str(spec) for spec in value]
    raise UserError(f"{path}: regularizers must map specs to coefficients, e.g. 'patch.cosine@last: 0.5'")


def _cast(action: argparse.Action, name: str, value: Any, path: str) -> Any:
    """A YAML value as the flag's type: YAML reads 5e-4 as a string, and 1 as an int where a float is meant."""
    if isinstance(action.const, bool):  # a switch
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name} must be true or false, not {value!r}")
        return value if name == action.dest else (action.const if value else not action.const)
    if action.dest == "model_kwargs":
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} must map names to values, not {value!r}")
        return value
    if value is None and action.default is None:
        return None
    many = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    if many != isinstance(value, list):
        raise UserError(f"{path}: {name} must be {'a list' if many else 'one value'}, not {value!r}")
    convert: Any = action.type or str
    try:
        result = [convert(str(one)) for one in value] if many else convert(str(value))
    except ValueError as error:
        raise UserError(f"{path}: {name} must be of type {convert.__name__}, not {value!r}") from error
    if action.choices is not None and result not in action.choices:
        raise UserError(f"{path}: {name} must be one of {', '.join(action.choices)}, not {value!r}")
    return result


# ------------------------------------------------------------------------------------------------------------
# Checks that need neither data nor model


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is built or created.

    Raises:
        UserError: with what to do instead.
    """
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            limit = f"at least {low:g}" if high in (LARGEST, LARGEST_SEED) else f"between {low:g} and {high:g}"
            raise UserError(f"--{dashed(name)} must be {limit}, not {value}")
    optimizers = [str(name) for name in list_optimizers()]
    if args.opt.lower().removeprefix("lookahead_") not in optimizers:
        raise UserError(f"unknown optimizer {args.opt!r}.{did_you_mean(args.opt, optimizers)}")
    if args.cutmix_minmax is not None and len(args.cutmix_minmax) != 2:
        raise UserError("--cutmix-minmax takes two numbers, the smallest and the largest share of the sides")
    if args.opt_betas is not None and not (len(args.opt_betas) >= 2 and all(0 <= b < 1 for b in args.opt_betas)):
        raise UserError("--opt-betas takes two (or, for some optimizers, three) numbers from 0 to less than 1")
    if args.lr_noise is not None and not (len(args.lr_noise) <= 2 and all(0 <= n <= 1 for n in args.lr_noise)):
        raise UserError("--lr-noise takes one or two shares of the epochs, from 0 to 1")
    if mixing_is_on(args) and args.batch_size % 2 and not (args.eval or args.teacher_eval):
        raise UserError(
            f"--batch-size {args.batch_size} is odd, but Mixup and CutMix mix images in pairs: "
            "choose an even one, or switch mixing off with --mixup 0 --cutmix 0"
        )
    if args.distillation_type != "none" and args.finetune:
        raise UserError("distillation cannot be combined with --finetune: drop one of the two")
    if args.group_repeats and not args.repeated_aug:
        raise UserError("--group-repeats keeps copies together, and --no-repeated-aug makes none: drop one of them")
    if args.fsdp:
        check_fsdp(args)
    if (args.distillation_type != "none" or args.teacher_eval) and not args.teacher_path:
        raise UserError("a teacher needs weights: give --teacher-path FILE (its model is --teacher-model)")
    for name in ("resume", "finetune", "teacher_path"):
        path = getattr(args, name)
        if name == "resume" and path == "auto":
            continue
        if path and not path.startswith("https://") and not Path(path).is_file():
            raise UserError(f"--{dashed(name)} {path}: no such file (and not an https address)")
    if args.resume == "auto" and (args.eval or not args.output_dir):
        needs = "--eval needs one file" if args.eval else "give --output_dir"
        raise UserError(f"--resume auto looks for the newest checkpoint of a run in --output_dir: {needs}")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UserError(f"--output_dir {args.output_dir} is a file, not a folder")


def check_fsdp(args: argparse.Namespace) -> None:
    """Refuse what --fsdp cannot be combined with.

    Raises:
        UserError: with what to do instead.
    """
    twice = [spec.name for spec in args.terms if spec.measure == "gradient_diversity"]
    if twice and not args.eval:
        raise UserError(
            f"{twice[0]} differentiates twice, but --fsdp frees weights after once: drop one of the two"
        )
    if args.torchcompile:
        raise UserError("--torchcompile makes one graph, which --fsdp breaks at every block: drop one of the two")
    if args.model_ema_force_cpu:
        raise UserError("--fsdp keeps a share of the average on every device: drop --model-ema-force-cpu")


def mixing_is_on(args: argparse.Namespace) -> bool:
    """Whether the flags ask for Mixup or CutMix."""
    return args.mixup_prob > 0 and (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None)


# ------------------------------------------------------------------------------------------------------------
# args.yaml


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved flags as plain data: what checkpoints and args.yaml hold."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in DERIVED}


def write_args(args: argparse.Namespace, path: Path) -> None:
    """Write the resolved configuration so that `main.py --config args.yaml` repeats the run.

    Revision and versions stand above it as comments.
    """
    values = plain(args)
    del values["config"]
    for flag in REFERENCE_FLAGS:  # `reg` says the same
        del values[flag]
    lines = [f"# {name}: {value}" for name, value in provenance().items()]
    path.write_text("\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=True), encoding="utf-8")


def provenance() -> dict[str, str]:
    """Command, git revision and library versions of this run."""
    import timm
    import torch
    import torchvision

    return {
        "command": shlex.join(sys.argv).replace("\n", "\\n"),
        "revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def _git_revision() -> str:
    folder = Path(__file__).parents[1]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown (no git)"
    return run.stdout.strip() or "unknown (not a git checkout)"
