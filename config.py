"""Every flag, the YAML file, and their precedence: defaults < file < command line.

The flags are DeiT's, plus the reference's five coefficients and a few of timm's names. `resolve` returns one
namespace with nothing left to interpret: `terms` holds the parsed regularizers, `measures` what to measure.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.optim import list_optimizers
from timm.utils.misc import ParseKwargs

from datasets import DATA_SETS
from engine import AMP_DTYPES
from mixup import MODES
from regularizers import REFERENCE_FLAGS, Spec, parse_spec
from utils import UserError, did_you_mean

INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "constant")
LARGEST = sys.float_info.max
LARGEST_SEED = 2**31
# Smallest and largest value of each number that has limits here; the data's and Mixup's are checked there.
LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "epochs", "input_size", "print_freq", "world_size"), (1, LARGEST)),
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


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, with the nearest flags."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        known = [option for option in self._option_string_actions if option.startswith("--")]
        hint = did_you_mean(unknown[0].partition("=")[0], known) if unknown else ""
        raise UserError(f"{message}.{hint} --help lists every flag")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each flag, and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=112)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = isinstance(action.const, bool) or action.default in (None, "", [], {})
        return action.help if says_nothing else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = list(action.option_strings)
        action.option_strings = [
            s for i, s in enumerate(spellings) if _dashed(s) not in map(_dashed, spellings[:i])
        ]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


def _dashed(option: str) -> str:
    return option.replace("_", "-")


class _KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, added to those given before, with an error for a word that is none."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for word in values:
            if "=" not in word:
                raise argparse.ArgumentError(self, f"{word!r} is not KEY=VALUE")
        before = getattr(namespace, self.dest, None) or {}
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, {**before, **getattr(namespace, self.dest)})


class _Group:
    """Adds flags to one group of the help, each in both spellings."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def flag(self, *names: str, help: str, **options: Any) -> None:
        both = [spelling for name in names for spelling in _spellings(name)]
        options.setdefault("dest", names[0].lstrip("-").replace("-", "_"))
        self._group.add_argument(*both, help=help, **options)

    def value(self, name: str, type: Any, default: Any, help: str, **options: Any) -> None:
        if "choices" not in options:
            options["metavar"] = {float: "X", int: "N", str: "TEXT"}[type]
        self.flag(name, type=type, default=default, help=help, **options)

    def switch(self, name: str, dest: str, sets: bool, default: bool, help: str) -> None:
        action = "store_true" if sets else "store_false"
        self.flag(name, dest=dest, action=action, default=default, help=help)


def _spellings(name: str) -> list[str]:
    if not name.startswith("--"):
        return [name]
    stem = name[2:]
    return list(dict.fromkeys([name, "--" + stem.replace("_", "-"), "--" + stem.replace("-", "_")]))


# ------------------------------------------------------------------------------------------------------------
# The flags


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of main.py's command line."""
    parser = _Parser(
        prog="main.py",
        usage="main.py --data-path FOLDER [--config FILE.yaml] [FLAGS]",
        description="Train and evaluate vision transformers, diverse at the patch, attention and weight level.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    for add in (
        _add_diversity,
        _add_model,
        _add_data,
        _add_augmentation,
        _add_mixup,
        _add_optimizer,
        _add_schedule,
        _add_distillation,
        _add_run,
        _add_processes,
    ):
        add(parser)
    return parser


def _add_diversity(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "diversity (all off by default: plain DeiT)")
    spellings = "the reference's spelling of --reg "
    group.value("--mixing_coef", float, 0, spellings + "patch.mixing=C: classify every patch token as well")
    group.value("--emb_cos_within_coef", float, 0, spellings + "patch.cosine@last=C")
    group.value("--emb_contrast_cross_coef", float, 0, spellings + "patch.contrastive@first:last=C")
    group.value("--attn_cos_within_coef", float, 0, spellings + "attn.cosine@0=C")
    group.value("--weight_mha_cond_orth_coef", float, 0, spellings + "weight.cno@all=C")
    group.flag(
        "--reg",
        action="append",
        default=[],
        metavar="LEVEL.MEASURE[:OPTIONS][@LAYERS]=COEF",
        help="add a diversity term (repeatable); 0 switches off a term of the config file",
    )
    group.flag(
        "--measure",
        action="append",
        default=[],
        metavar="LEVEL.MEASURE[:OPTIONS][@LAYERS]",
        help="measure redundancy on the evaluation set after each epoch, without training on it (repeatable)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "model")
    group.value(
        "--model", str, "deit_base_patch16_224", "any timm model; _diverse and layer24 names of the reference"
    )
    group.flag(
        "--model-kwargs",
        nargs="*",
        action=_KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="arguments of the model's constructor, e.g. patch_size=4 depth=6",
    )
    group.value("--input-size", int, 224, "image size in pixels")
    group.value("--drop", float, 0.0, "dropout after the position embedding and in the blocks' projections")
    group.value("--drop-path", float, 0.1, "stochastic depth rate of the last block")
    group.switch("--model-ema", "model_ema", True, True, "keep a moving average of the weights (the default)")
    group.switch("--no-model-ema", "model_ema", False, True, "keep none")
    group.value("--model-ema-decay", float, 0.99996, "decay of the moving average, per step")
    group.switch("--model-ema-force-cpu", "model_ema_force_cpu", True, False, "keep the average in host memory")
    dtypes = "autocast's dtype; auto: on CUDA bfloat16 where it has it, else float16; elsewhere float32"
    group.value("--amp-dtype", str, "auto", dtypes, choices=["auto", *AMP_DTYPES])


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "data")
    group.value("--data-path", str, None, "folder of the data set (DIGITS needs none)")
    group.value("--data-set", str, "IMNET", "IMNET: folders train (or train_new) and val", choices=list(DATA_SETS))
    group.value("--inat-category", str, "name", "which label of iNaturalist", choices=list(INAT_CATEGORIES))
    group.value("--batch-size", int, 128, "images per process; evaluation takes 1.5 times as many")
    group.value("--num_workers", int, 10, "loader processes per process")
    group.switch("--pin-mem", "pin_mem", True, True, "pin host memory for faster transfer to CUDA (the default)")
    group.switch("--no-pin-mem", "pin_mem", False, True, "do not pin")
    group.switch(
        "--repeated-aug",
        "repeated_aug",
        True,
        True,
        "three differently augmented copies of each image (the default)",
    )
    group.switch("--no-repeated-aug", "repeated_aug", False, True, "each image once an epoch")


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "augmentation")
    group.value("--color-jitter", float, 0.4, "colour jitter; timm applies it only where --aa is off")
    group.value("--aa", str, "rand-m9-mstd0.5-inc1", "RandAugment or AutoAugment policy; none: off")
    group.value("--smoothing", float, 0.1, "label smoothing")
    group.value("--train-interpolation", str, "bicubic", "random, bilinear or bicubic")
    group.value("--reprob", float, 0.25, "probability of random erasing")
    group.value("--remode", str, "pixel", "what is put into the erased box: const, rand or pixel")
    group.value("--recount", int, 1, "number of erased boxes")
    group.switch("--resplit", "resplit", True, False, "erase nothing in the first half of each batch")


def _add_mixup(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "Mixup and CutMix")
    group.value("--mixup", float, 0.8, "Mixup's Beta parameter; 0: no Mixup")
    group.value("--cutmix", float, 1.0, "CutMix's Beta parameter; 0: no CutMix")
    group.value("--cutmix-minmax", float, None, "range of the box's sides; overrides --cutmix", nargs="+")
    group.value("--mixup-prob", float, 1.0, "probability of mixing at all")
    group.value("--mixup-switch-prob", float, 0.5, "probability of CutMix where both are on")
    modes = "draw for each batch, each pair of partners, or each image"
    group.value("--mixup-mode", str, "batch", modes, choices=list(MODES))


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "optimizer")
    group.value("--opt", str, "adamw", "any optimizer that timm knows")
    group.value("--opt-eps", float, 1e-8, "epsilon")
    group.value("--opt-betas", float, None, "betas; the optimizer's own by default", nargs="+")
    group.value("--clip-grad", float, None, "largest norm of the whole gradient; none by default")
    group.value("--momentum", float, 0.9, "momentum of SGD and its kin")
    group.value("--weight-decay", float, 0.05, "weight decay; none on biases, norms and embeddings")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "schedule")
    group.value("--epochs", int, 300, "epochs to train")
    group.value("--start_epoch", int, 0, "first epoch; --resume sets it")
    group.value("--lr", float, 5e-4, "learning rate for a global batch of 512 images")
    group.switch("--scale_lr_flag", "scale_lr_flag", False, True, "take --lr as it is, whatever the batch")
    group.switch("--unscale-lr", "scale_lr_flag", False, True, "the same as --scale_lr_flag, by a clearer name")
    group.value("--sched", str, "cosine", "timm's schedule", choices=list(SCHEDULES))
    group.value("--warmup-epochs", int, 5, "epochs of linear warm-up")
    group.value("--warmup-lr", float, 1e-6, "rate the warm-up starts from")
    group.value("--min-lr", float, 1e-5, "rate the schedule ends with")
    group.value("--decay-epochs", float, 30, "epochs between decays (step)")
    group.flag(
        "--decay-rate",
        "--dr",
        type=float,
        default=0.1,
        help="factor of a decay (step, plateau), power (poly)",
    )
    group.value(
        "--cooldown-epochs", int, 10, "part of the schedule after its end; never trained, as in the reference"
    )
    group.value("--patience-epochs", int, 10, "epochs without a better top-1 before a decay (plateau)")
    group.value(
        "--lr-noise", float, None, "noise on the rate from, and up to, these shares of the epochs", nargs="+"
    )
    group.value("--lr-noise-pct", float, 0.67, "largest relative noise")
    group.value("--lr-noise-std", float, 1.0, "deviation of the noise")


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "distillation and fine-tuning")
    group.value("--teacher-model", str, "regnety_160", "any timm model")
    group.value("--teacher-path", str, "", "the teacher's checkpoint: a file or an https address")
    group.value("--distillation-type", str, "none", "how the teacher is followed", choices=["none", "soft", "hard"])
    group.value("--distillation-alpha", float, 0.5, "share of the distillation loss")
    group.value("--distillation-tau", float, 1.0, "temperature of soft distillation")
    group.switch("--teacher_eval", "teacher_eval", True, False, "evaluate the teacher and stop")
    group.value("--finetune", str, "", "start from this checkpoint's weights: a file or an https address")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "run")
    group.flag(
        "-c",
        "--config",
        dest="config",
        default="",
        metavar="FILE.yaml",
        help="flags by name, and regularizers",
    )
    group.value("--output_dir", str, "", "where checkpoints and logs go; none are written by default")
    group.value("--device", str, "auto", "auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps")
    group.value("--seed", int, 0, "of initialisation, data order, augmentation and mixing")
    group.value("--resume", str, "", "continue from this checkpoint: a file or an https address")
    group.switch("--eval", "eval", True, False, "evaluate (--resume FILE) and stop")
    group.value("--print-freq", int, 10, "steps between progress lines")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "processes (torchrun's and SLURM's variables are read by themselves)")
    group.switch("--dist-eval", "dist_eval", True, False, "share the evaluation among the processes, exactly")
    group.value("--world_size", int, 1, "number of processes, where the launcher sets RANK but no WORLD_SIZE")
    group.value("--dist_url", str, "env://", "rendezvous address")


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
            raise UserError(f"--{_dashed(name)} must be {limit}, not {value}")
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
    if (args.distillation_type != "none" or args.teacher_eval) and not args.teacher_path:
        raise UserError("a teacher needs weights: give --teacher-path FILE (its model is --teacher-model)")
    for name in ("resume", "finetune", "teacher_path"):
        path = getattr(args, name)
        if path and not path.startswith("https://") and not Path(path).is_file():
            raise UserError(f"--{_dashed(name)} {path}: no such file (and not an https address)")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UserError(f"--output_dir {args.output_dir} is a file, not a folder")


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
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown (no git)"
    return run.stdout.strip() or "unknown (not a git checkout)"
