"""The command line: every flag, in groups, each in both spellings (--batch-size, --batch_size).

The flags are DeiT's, plus the reference's five coefficients and a few of timm's names.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from timm.utils.misc import ParseKwargs

from errors import UserError, did_you_mean
from regularizers import catalogue


class Names(tuple[str, ...]):
    """Choices of `--data-set`. A name with a slash is let through: its prefix is looked at when it is opened."""

    def __contains__(self, name: object) -> bool:
        return "/" in str(name) or super().__contains__(name)


DATA_SETS = Names(["CIFAR", "IMNET", "INAT", "INAT19", "DIGITS", "tar", "wds/FOLDER", "hfds/NAME"])
AMP_DTYPES = ("float32", "bfloat16", "float16")
MIXUP_MODES = ("batch", "pair", "elem")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "constant")


class Parser(argparse.ArgumentParser):
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
        action.option_strings = [s for i, s in enumerate(spellings) if dashed(s) not in map(dashed, spellings[:i])]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


def dashed(option: str) -> str:
    return option.replace("_", "-")


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, added to those given before, with an error for a word that is none."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for word in values:
            if "=" not in word:
                raise argparse.ArgumentError(self, f"{word!r} is not KEY=VALUE")
        before = getattr(namespace, self.dest, None) or {}
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, {**before, **getattr(namespace, self.dest)})


class _ListRegularizers(argparse.Action):
    """Prints the catalogue of regularizers and exits, like --help."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(catalogue.as_text())
        parser.exit()


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
    parser = Parser(
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
    group.flag(
        "--list-regularizers",
        action=_ListRegularizers,
        nargs=0,
        dest="help",  # has no value and is no key of a config file, like --help
        default=argparse.SUPPRESS,
        help="list every LEVEL.MEASURE with its equation, layers, cost and source, and exit",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "model")
    group.value(
        "--model", str, "deit_base_patch16_224", "any timm model; _diverse and layer24 names of the reference"
    )
    group.flag(
        "--model-kwargs",
        nargs="*",
        action=KeyValues,
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
    group.flag(
        "--torchcompile",
        nargs="?",
        type=str,
        const="inductor",
        default="",
        metavar="BACKEND",
        help="compile the forward pass and the loss before the first step (inductor if no backend is named)",
    )
    recompute = "recompute the blocks in the backward pass: less memory, about a third more time"
    group.switch("--grad-checkpointing", "grad_checkpointing", True, False, recompute)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "data")
    group.value("--data-path", str, None, "folder of the data set (DIGITS needs none; hfds/: a cache, if given)")
    group.flag(
        "--data-set",
        type=str,
        default="IMNET",
        choices=DATA_SETS,
        metavar="NAME",
        help="IMNET: folders train (or train_new) and val; tar: the same in train.tar and val.tar; wds/FOLDER: "
        "WebDataset's shards; CIFAR (CIFAR-100), INAT, INAT19, DIGITS; hfds/NAME: a Hugging Face data set of that "
        "name, or in that folder",
    )
    group.value("--inat-category", str, "name", "which label of iNaturalist", choices=list(INAT_CATEGORIES))
    group.value("--batch-size", int, 128, "images per process; evaluation takes 1.5 times as many")
    workers = "loader processes per process; by default ten, but not more than its share of the cores"
    group.value("--num_workers", int, None, workers)
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
    group.switch(
        "--group-repeats",
        "group_repeats",
        True,
        False,
        "keep the copies of an image in one process, where it is decoded once; the global batch stays the same",
    )
    fast = (
        "crop and resize with torch instead of Pillow: faster, with other bytes (of 255 a crop's differ by 0.04 on "
    )
    fast += "average and up to 7, those of an image resized for evaluation by 0.004 and up to 1)"
    group.switch("--fast-resize", "fast_resize", True, False, fast)
    skip = "train on the next image where one cannot be decoded; in evaluation, whose accuracy that would change, "
    group.switch("--skip-bad-images", "skip_bad_images", True, False, skip + "it is always an error")


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
    group.value("--mixup-mode", str, "batch", modes, choices=list(MIXUP_MODES))


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "optimizer")
    group.value("--opt", str, "adamw", "any optimizer that timm knows")
    group.value("--opt-eps", float, 1e-8, "epsilon")
    group.value("--opt-betas", float, None, "betas; the optimizer's own by default", nargs="+")
    group.value("--grad-accum-steps", int, 1, "batches whose gradients make one step; the global batch grows by it")
    skip = "a step that is not finite on any process: skip drops it on all, stop ends the run"
    group.value("--nonfinite", str, "skip", skip, choices=["skip", "stop"])
    group.value("--nonfinite-patience", int, 10, "that many dropped steps in a row end the run")
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
    exact = "use deterministic algorithms only: equal runs are equal bit for bit, on CUDA more slowly"
    group.switch("--deterministic", "deterministic", True, False, exact)
    group.value("--seed", int, 0, "of initialisation, data order, augmentation and mixing")
    newest = "continue from this checkpoint: a file, an https address, or auto: the newest in --output_dir, if any"
    group.value("--resume", str, "", newest)
    group.value("--save-interval-steps", int, 0, "steps between checkpoints within an epoch; 0: only after it")
    group.value("--save-interval-minutes", float, 0.0, "minutes between checkpoints; 0: only after each epoch")
    group.value("--checkpoint-hist", int, 2, "checkpoints to keep: checkpoint.pth, then checkpoint.1.pth, ...")
    group.switch("--eval", "eval", True, False, "evaluate (--resume FILE) and stop")
    group.value("--print-freq", int, 10, "steps between progress lines")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "processes (torchrun's and SLURM's variables are read by themselves)")
    group.switch("--dist-eval", "dist_eval", True, False, "share the evaluation among the processes, exactly")
    shards = "keep parameters, gradients, optimizer and EMA in shards over all processes (FSDP2)"
    group.switch("--fsdp", "fsdp", True, False, shards)
    group.value("--world_size", int, 1, "number of processes, where the launcher sets RANK but no WORLD_SIZE")
    group.value("--dist_url", str, "env://", "rendezvous address")
    group.value("--dist-timeout", float, 1800.0, "seconds that processes wait for one that may have died")
