"""A run's configuration: flags, the YAML file, their precedence (defaults < file < command line), and args.yaml.

`resolve` returns the flags with nothing left to interpret. The flags themselves are in flags.py.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from timm.optim import list_optimizers

from errors import UserError, did_you_mean, shown
from loggers.backends import check_packages
from models.remedies import parse_remedies
from options.flags import LARGEST, Args, get_args_parser
from options.parser import Parser, dashed, declared
from options.paths import usable
from options.yaml_file import read_config
from regularizers import REFERENCE_FLAGS, Spec, parse_spec
from utils import write_atomically

# Arguments of every optimizer that have a flag.
OF_FLAGS = {
    **{"lr": "lr", "weight_decay": "weight-decay", "momentum": "momentum", "layer_decay": "layer-decay"},
    **{"eps": "opt-eps", "betas": "opt-betas", "opt": "opt"},
}


@dataclass(frozen=True)
class Resolved(Args):
    """The flags of a run.

    Attributes:
        terms: what to train on: the regularizers whose coefficient is not 0.
        measures: what to measure only.
    """

    terms: list[Spec] = field(default_factory=list)
    measures: list[Spec] = field(default_factory=list)


R = TypeVar("R", bound=Resolved)

# ------------------------------------------------------------------------------------------------------------
# Precedence


def resolve(argv: Sequence[str] | None = None) -> Resolved:
    """Parse main.py's command line and its --config file.

    Raises:
        UserError: an unknown flag or key, or a value that cannot be.
    """
    return resolve_as(Resolved, get_args_parser(), argv)


def resolve_as(table: type[R], parser: Parser, argv: Sequence[str] | None = None) -> R:
    """Parse a command line and its --config file, whose flags are those of a table.

    Raises:
        UserError: as `resolve`.
    """
    given = usable(parser.given(argv))
    file = read_config(given["config"], parser) if given.get("config") else {}
    values = {**file, **given}
    for flag in ("model_kwargs", "teacher_model_kwargs"):
        values[flag] = {**file.get(flag, {}), **given.get(flag, {})}
    if values.get("eval") and file.get(table.starts_from) and "weights" not in given:
        values["weights"] = "auto"  # the file's are those that its run started from
    every = _collect_terms(file, given.get("config", "")) | _collect_terms(given, "the command line")
    terms = [spec for spec in every.values() if spec.coef > 0]
    values["reg"] = [f"{spec.name}={spec.coef!r}" for spec in terms]
    for flag, term in REFERENCE_FLAGS.items():
        values[flag] = next((spec.coef for spec in terms if spec.name == term), 0)
    measures = [parse_spec(text, with_coef=False) for text in values.get("measure", [])]
    values["remedy"] = [str(remedy) for remedy in parse_remedies(values.get("remedy", []))]
    args = table(**{**table.withheld, **values}, terms=terms, measures=measures)
    check(args)
    return args


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


# ------------------------------------------------------------------------------------------------------------
# Checks that need neither data nor model


def check(args: Resolved) -> None:
    """Refuse what cannot work, before anything is built or created.

    Raises:
        UserError: with what to do instead.
    """
    check_limits(args)
    optimizers = [str(name) for name in list_optimizers()]
    if args.opt.lower().removeprefix("lookahead_") not in optimizers:
        raise UserError(f"unknown optimizer {args.opt!r}.{did_you_mean(args.opt, optimizers)}")
    check_lists(args)
    check_arguments(args)
    check_combinations(args)
    if args.clip_mode == "agc":
        check_agc(args)
    if args.fsdp:
        check_fsdp(args)
    check_files(args)
    if args.log_with:
        check_trackers(args)


def check_limits(args: Args) -> None:
    """Refuse numbers out of their range.

    Raises:
        UserError: with the range.
    """
    for name, flag in declared(type(args)).items():
        if flag.limits is not None:
            _check_limits(name, getattr(args, name), *flag.limits)


def _check_limits(name: str, value: Any, low: float, high: float) -> None:
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    value = next((number for number in numbers if not low <= number <= high), None)
    if value is None:
        return
    limit = f"at most {high}" if high < value < LARGEST else f"at least {low:g}"
    if high <= 1:
        limit = f"between {low:g} and {high:g}"
    raise UserError(f"--{dashed(name)} must be {limit}, not {value}")


def check_lists(args: Args) -> None:
    """Refuse flags with too few or too many values, or values out of range.

    Raises:
        UserError: with what they take.
    """
    if args.cutmix_minmax is not None and len(args.cutmix_minmax) != 2:
        raise UserError("--cutmix-minmax takes two numbers, the smallest and the largest share of the sides")
    if args.opt_betas is not None and not (len(args.opt_betas) >= 2 and all(0 <= b < 1 for b in args.opt_betas)):
        raise UserError("--opt-betas takes two (or, for some optimizers, three) numbers from 0 to less than 1")
    if args.lr_noise is not None and not (len(args.lr_noise) <= 2 and all(0 <= n <= 1 for n in args.lr_noise)):
        raise UserError("--lr-noise takes one or two shares of the epochs, from 0 to 1")
    milestones = args.decay_milestones
    if not milestones or milestones[0] < 1 or milestones != sorted(set(milestones)):
        raise UserError("--decay-milestones takes epochs in rising order, from 1 on")


def check_arguments(args: Args) -> None:
    """Refuse arguments of a model or optimizer that neither args.yaml nor a checkpoint can hold, or that are flags.

    Raises:
        UserError: one is neither a number, nor text, nor None, nor a list, tuple or dict of these.
    """
    for flag in ("model_kwargs", "opt_kwargs"):
        for key, value in getattr(args, flag).items():
            if not _is_plain(value):
                raise UserError(
                    f"--{dashed(flag)} {shown(key)}={shown(repr(value))} is a {type(value).__name__}, which cannot "
                    "be saved: give numbers, text, True, False, None, or lists of these"
                )
    for key in OF_FLAGS.keys() & args.opt_kwargs.keys():
        raise UserError(f"--opt-kwargs {key}=... has a flag of its own: give --{OF_FLAGS[key]}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_combinations(args: Args) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: with what to do instead.
    """
    if mixing_is_on(args) and args.batch_size % 2 and not (args.eval or args.teacher_eval):
        raise UserError(
            f"--batch-size {args.batch_size} is odd, but Mixup and CutMix mix images in pairs: "
            "choose an even one, or switch mixing off with --mixup 0 --cutmix 0"
        )
    if args.distillation_type != "none" and args.finetune:
        raise UserError("distillation cannot be combined with --finetune: drop one of the two")
    if args.weights != "auto" and not (getattr(args, args.starts_from) or (args.eval and args.resume)):
        raise UserError(
            f"--weights {args.weights} chooses among a checkpoint's weights: give --{args.starts_from} FILE, or "
            "--eval with --resume FILE"
        )
    if args.teacher_weights != "auto" and not args.teacher_path:
        raise UserError(
            f"--teacher-weights {args.teacher_weights} is for the weights of --teacher-path FILE: give it"
        )
    check_losses(args)
    check_remedies(args)
    if args.clip_mode != "norm" and args.clip_grad is None:
        raise UserError(f"--clip-mode {args.clip_mode} needs a limit: give --clip-grad X")
    if args.in_chans not in (1, 3):
        raise UserError(f"--in-chans {args.in_chans}: images are read in 3 channels (colours) or in 1 (grey)")
    if args.group_repeats and not args.repeated_aug:
        raise UserError("--group-repeats keeps copies together, and --no-repeated-aug makes none: drop one of them")


def check_losses(args: Args) -> None:
    """Refuse flags of DeiT III that contradict others.

    Raises:
        UserError: with what to do instead.
    """
    if args.bce_loss and args.smoothing > 0:
        raise UserError(
            f"--bce-loss makes every class with a label above 0 an image's own, and --smoothing {args.smoothing:g} "
            "gives each class one: add --smoothing 0"
        )
    if args.cosub and args.distillation_type != "none":
        raise UserError(
            "--cosub lets submodels teach each other, --distillation-type a teacher: drop one of the two"
        )
    if args.src and not args.three_augment:
        raise UserError("--src is the crop of --three-augment: give both")
    if args.three_augment and args.aa not in (Args().aa, "none"):
        raise UserError(f"--three-augment takes the place of --aa {args.aa}: drop one of the two")


def check_remedies(args: Args) -> None:
    """Refuse remedies that cannot be combined with how the model is run.

    Raises:
        UserError: with what to do instead.
    """
    for remedy in parse_remedies(args.remedy):
        why = remedy.not_recomputed
        if why and args.grad_checkpointing:
            raise UserError(
                f"--grad-checkpointing runs each block twice, and {remedy.name} {why}: drop one of the two"
            )


def check_agc(args: Resolved) -> None:
    """Refuse --clip-mode agc, which leaves out a model's last layer, where that is not the model's own head.

    Raises:
        UserError: with what to do instead.
    """
    second = [spec.name for spec in args.terms if spec.measure == "region_mixing"]
    if second:
        raise UserError(
            f"--clip-mode agc leaves out a model's last layer, its head, but {second[0]} adds another one behind "
            "it: choose norm or value"
        )


def check_fsdp(args: Resolved) -> None:
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
    if args.clip_mode == "agc":
        raise UserError("--fsdp splits the weights whose norms --clip-mode agc compares: choose norm or value")
    if args.model_ema_force_cpu:
        raise UserError("--fsdp keeps a share of the average on every device: drop --model-ema-force-cpu")


def check_files(args: Args) -> None:
    """Refuse checkpoints that do not exist, and an output folder that is a file.

    Raises:
        UserError: with the flag's name.
    """
    if (args.distillation_type != "none" or args.teacher_eval) and not args.teacher_path:
        raise UserError("a teacher needs weights: give --teacher-path FILE (its model is --teacher-model)")
    resume = "" if args.resume == "auto" else args.resume
    for name, path in (("resume", resume), ("finetune", args.finetune), ("teacher-path", args.teacher_path)):
        if path and not path.startswith("https://") and not Path(path).is_file():
            raise UserError(f"--{name} {shown(path)}: no such file (and not an https address)")
    if not args.resume_opt:
        check_fresh_optimizer(args)
    if args.val_labels and not Path(args.val_labels).is_file():
        raise UserError(f"--val-labels {shown(args.val_labels)}: no such file")
    if args.resume == "auto" and (args.eval or not args.output_dir):
        needs = "--eval needs one file" if args.eval else "give --output_dir"
        raise UserError(f"--resume auto looks for the newest checkpoint of a run in --output_dir: {needs}")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UserError(f"--output_dir {shown(args.output_dir)} is a file, not a folder")


def check_fresh_optimizer(args: Args) -> None:
    """Refuse --no-resume-opt where it means nothing, or would throw away what a run has just learned.

    Raises:
        UserError: with what to do instead.
    """
    if args.resume == "auto":
        raise UserError(
            "--no-resume-opt with --resume auto would drop the optimizer's state at every restart: give it once, "
            "with --resume FILE of the run before"
        )
    if not args.resume or args.eval:
        raise UserError("--no-resume-opt continues a run with a fresh optimizer: give --resume FILE, or drop it")


def check_trackers(args: Args) -> None:
    """Refuse trackers that cannot start, as far as that can be known.

    Raises:
        UserError: with what to do instead.
    """
    if not args.output_dir:
        raise UserError(f"--log-with {' '.join(args.log_with)} writes below --output_dir: give one")
    if "/" in args.run_name or args.run_name in (".", ".."):
        raise UserError(f"--run-name {shown(args.run_name)} becomes the name of a folder: drop the '/' or the dots")
    check_packages(args.log_with)


def mixing_is_on(args: Args) -> bool:
    """Whether the flags ask for Mixup or CutMix."""
    return args.mixup_prob > 0 and (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None)


# ------------------------------------------------------------------------------------------------------------
# args.yaml


def plain(args: Args) -> dict[str, Any]:
    """The flags as plain data: what checkpoints and args.yaml hold."""
    return {name: getattr(args, name) for name in sorted(declared(type(args)))}


def write_args(args: Args, path: Path, changes: Sequence[str] = ()) -> None:
    """Write the flags in force so that `main.py --config args.yaml` repeats the run.

    Revision, versions, and what has changed while the run went on stand above them as comments.

    Raises:
        OSError: the file cannot be written.
    """
    values = plain(args)
    del values["config"]
    for flag in REFERENCE_FLAGS:  # `reg` says the same
        values.pop(flag, None)
    lines = [f"# {name}: {shown(value, 10_000)}" for name, value in provenance().items()]
    lines += [f"# changed {shown(change)}" for change in changes]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=True, default_flow_style=None, width=116)
    write_atomically(path, lambda file: file.write(text.encode()))


def provenance() -> dict[str, str]:
    """Command, git revision and library versions of this run."""
    import timm
    import torch
    import torchvision

    return {
        "command": shlex.join(_typed(sys.argv)),
        "revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def _typed(argv: Sequence[str]) -> list[str]:
    """A command as it is typed: of `python -m PROGRAM`, Python names the file of the program."""
    program = Path(argv[0])
    return ["-m", program.parent.name, *argv[1:]] if program.name == "__main__.py" else list(argv)


def _git_revision() -> str:
    folder = Path(__file__).parents[1]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown (no git)"
    return run.stdout.strip() or "unknown (not a git checkout)"
