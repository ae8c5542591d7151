"""A segmentation run's configuration: flags with nothing left to interpret, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError, shown
from options.config import Resolved, resolve_as
from options.flags import Args, sides
from options.parser import dashed
from regularizers import MEASURES
from segmentation.masks import read_names
from segmentation.options import Flags, get_args_parser
from segmentation.transforms import RECIPES, Recipe

FILES = ("backbone", "head_weights", "class_file")  # flags that name one
STARTS = ("backbone", "head_weights")  # those that a run begins with, and nothing reads afterwards
OF_UPERNET = ("channels", "auxiliary_channels", "auxiliary_coef", "head_drop")  # --head linear has none of it
OF_BLOCKS = ("drop_path", "layer_decay", "grad_checkpointing")  # --frozen does not train them


@dataclass(frozen=True)
class Settings(Flags, Resolved):
    """The flags of a run. An epoch is what lies between two evaluations, `eval_interval` steps."""


def resolve(argv: Sequence[str] | None = None, with_files: bool = True) -> Settings:
    """Parse the command line and its --config file.

    Args:
        with_files: whether the files that flags name must be there.
    Raises:
        UserError: an unknown flag or key, or a value that cannot be.
    """
    args = resolve_as(Settings, get_args_parser(), argv)
    check(args)
    if with_files:
        check_files(args)
    return replace(args, epochs=args.iterations // args.eval_interval)


def check(args: Settings) -> None:
    """Refuse what cannot work, before anything is built or created.

    Raises:
        UserError: with what to do instead.
    """
    if args.iterations % args.eval_interval:
        raise UserError(
            f"--iterations {args.iterations} are not a multiple of --eval-interval {args.eval_interval}: there "
            "is an evaluation after each interval, the last one included"
        )
    for name in ("resize", "test_resize", "stride"):
        if len(getattr(args, name)) > 2:
            raise UserError(f"--{dashed(name)} takes one or two numbers of pixels, not {len(getattr(args, name))}")
    for name in ("resize", "test_resize"):
        if 0 in getattr(args, name) and any(getattr(args, name)):
            raise UserError(f"--{dashed(name)} 0 is not to resize at all: drop the other number, or the 0")
    if args.scale_range and (len(args.scale_range) != 2 or args.scale_range[0] > args.scale_range[1]):
        raise UserError("--scale-range takes two factors, the smaller one first")
    labelled = [spec.name for spec in args.terms if MEASURES[spec.measure].takes == "labels"]
    if labelled:
        raise UserError(f"{labelled[0]} takes the label of a whole image, and pixels have their own: drop it")
    if args.backbone and args.pretrained:
        raise UserError("--backbone and --pretrained both say what weights to start from: drop one of the two")
    if not (args.backbone or args.model or args.resume or args.check_data):
        raise UserError("there is no network: give --backbone FILE, or --model NAME, perhaps with --pretrained")
    if args.class_file and args.data_set != "FOLDER":
        raise UserError(f"--class-file is for --data-set FOLDER, not {args.data_set}, whose classes have names")
    if args.predictions and not args.eval:
        raise UserError("--predictions is written by --eval: give both")
    if args.pictures != Flags().pictures and not args.predictions:
        raise UserError("--pictures is for the page of --predictions: give both, or drop it")
    if args.frozen and args.terms:
        raise UserError(f"--frozen trains the heads alone, and {args.terms[0].name} trains the backbone: drop one")
    if args.head == "linear" and args.neck != Flags().neck:
        raise UserError(f"--head linear reads the last map alone: drop --neck {args.neck}")
    if args.head == "linear" and args.map_layers:
        raise UserError("--head linear reads the last map alone: drop --map-layers")
    twice = next((name for name, count in Counter(args.class_names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"--class-names has {shown(twice)} more than once: names must differ")
    if args.inference == "whole" and args.stride:
        raise UserError("--stride is that of --inference slide: give both, or drop it")


def without_effect(args: Settings) -> list[str]:
    """The flags that were given, but that this run does not use, each with the reason."""
    default = Flags()
    unused: dict[str, str] = {}
    if args.warmup_iterations == 0:
        unused["warmup_share"] = "--warmup-iterations 0 has no warm-up"
    if args.auxiliary_coef == 0:
        unused["auxiliary_channels"] = "--auxiliary-coef 0 has no auxiliary head"
    if args.head == "linear":
        unused |= dict.fromkeys(OF_UPERNET, "--head linear is one layer on the last map")
    if args.frozen:
        unused |= dict.fromkeys(OF_BLOCKS, "--frozen does not train the backbone")
    return [
        f"--{dashed(name)} has no effect: {why}"
        for name, why in unused.items()
        if getattr(args, name) != getattr(default, name)
    ]


def check_files(args: Settings) -> None:
    """Refuse files that are not there. Those that a trained network began with may be gone where it is evaluated.

    Raises:
        UserError: with the flag.
    """
    for name in FILES:
        path = "" if args.eval and args.resume and name in STARTS else getattr(args, name)
        if path and not path.startswith("https://") and not Path(path).is_file():
            raise UserError(f"--{dashed(name)} {shown(str(path))}: no such file")


def recipe_of(args: Settings) -> Recipe:
    """The sizes of images and crops."""
    own = RECIPES[args.data_set]
    return own._replace(
        crop=sides(args.input_size),
        train_fit=_fit(args.resize, own.train_fit),
        test_fit=_fit(args.test_resize, own.test_fit),
        ratios=(args.scale_range[0], args.scale_range[1]) if args.scale_range else own.ratios,
        flip=own.flip if args.flip_prob is None else args.flip_prob,
        distort=own.distort if args.distort is None else args.distort,
    )


def _fit(given: Sequence[int], own: tuple[int, int] | None) -> tuple[int, int] | None:
    if not given:
        return own
    return None if 0 in given else (max(given), min(given))


def stride_of(args: Settings) -> tuple[int, int]:
    """Of sliding windows: by default two thirds of the crop, rounded down."""
    crop = sides(args.input_size)
    if not args.stride:
        return max(crop[0] * 2 // 3, 1), max(crop[1] * 2 // 3, 1)
    return args.stride[0], args.stride[-1]


def names_of(args: Settings) -> list[str]:
    """The names in --class-file, else those of --class-names; none without."""
    return read_names(args.class_file) if args.class_file else args.class_names


def described(args: Settings, saved: Args | dict[str, Any]) -> Settings:
    """The settings with the model and the colours that a checkpoint's flags describe, where these give none.

    Its channels count in any case on a --backbone, as they do where a run begins.
    """
    flags = saved if isinstance(saved, dict) else vars(saved)
    args = replace(args, mean=args.mean or flags.get("mean"), std=args.std or flags.get("std"))
    if args.backbone:
        args = replace(args, in_chans=flags.get("in_chans", args.in_chans))
    if args.model or not flags.get("model"):
        return args
    kwargs = {**(flags.get("model_kwargs") or {}), **args.model_kwargs}
    return replace(args, model=flags["model"], model_kwargs=kwargs, remedy=list(flags.get("remedy") or []))
