"""The command line of `python -m redundancy`. Nothing is imported here that takes time."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, is_first_on_machine, shown
from options.flags import WEIGHTS, Args, sides
from options.parser import Formatter, KeyValues, Parser, Size
from options.paths import check_path, expand, usable

# Flags of main.py that are the same here, with their texts.
SHARED = frozenset(
    (
        *("in_chans", "data_path", "data_set", "image_key", "target_key", "download", "val_labels", "single_class"),
        *("class_names", "inat_category", "batch_size", "num_workers", "pin_mem", "fast_resize", "mean", "std"),
        *("crop_pct", "crop_mode", "interpolation", "device", "seed", "print_freq"),
        *("world_size", "dist_url", "dist_timeout"),
    )
)
BATCH = 16  # images per process, as main.py counts them: 24 are looked at together
EXAMPLE = "plain=runs/plain/checkpoint_best.pth diverse=runs/diverse/checkpoint_best.pth"


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        words: the models, [LABEL=]NAME or [LABEL=]FILE.
        output: the folder that is made.
        images: how many are drawn.
        metrics, measures: what is measured; no metrics are all.
        examples: how many images the report shows.
        patch: row and column of the patch that the others are compared with in them.
        model, input_size: of checkpoints that do not say it; the size is also that of models by name.
        num_classes: of checkpoints; by default the rows of the head's weight.
        pretrained: whether models by name get timm's weights.
        args: the flags of main.py.
        argv: the command line as it was given.
    """

    words: list[str]
    output: Path
    images: int
    metrics: list[str]
    measures: list[str]
    examples: int
    patch: tuple[int, int] | None
    model: str | None
    input_size: int | list[int] | None
    num_classes: int | None
    pretrained: bool
    args: Args
    argv: list[str]


class _ListMetrics(Action):
    """Prints every metric with its first sentence and exits, like --help."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from redundancy.metrics import choose

        metrics = choose(())
        width = max(len(metric.name) for metric in metrics)
        print("\n".join(f"{metric.name.ljust(width)}  {metric.text.title}" for metric in metrics))
        parser.exit()


def get_args_parser() -> Parser:
    """The parser."""
    parser = Parser(
        prog="python -m redundancy",
        description="Measure how redundant vision transformers are: patches, attention, weights, output.",
        epilog=f"example: python -m redundancy {EXAMPLE} --data-path IMAGENET --output report",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[LABEL=]NAME_OR_CHECKPOINT",
        default=SUPPRESS,
        help="models to compare: names of timm's (also hf-hub:NAME, local-dir:FOLDER), or checkpoints of this "
        "project, of timm or DeiT; several of one label are seeds of one run",
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument("--output", metavar="FOLDER", default=SUPPRESS, help="made for the report; must not exist")
    group.add_argument("--images", type=int, default=256, metavar="N", help="evaluation images, drawn by --seed")
    group.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME",
        help="metrics, or the levels patch, attn, weight, output; by default all (--list-metrics)",
    )
    group.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="LEVEL.MEASURE[:OPTIONS][@LAYERS]",
        help="any regularizer of `main.py --list-regularizers` besides, layer by layer (repeatable)",
    )
    group.add_argument(
        *("--list-metrics", "--list_metrics"),
        action=_ListMetrics,
        nargs=0,
        default=SUPPRESS,
        help="list every metric, and exit",
    )
    group.add_argument("--examples", type=int, default=2, metavar="N", help="images that the report shows")
    group.add_argument(
        "--patch",
        nargs=2,
        type=int,
        default=SUPPRESS,
        metavar=("ROW", "COLUMN"),
        help="patch that the others are compared with there; by default the one in the middle",
    )
    _add_models(parser)
    parser.add_table(Args, SHARED, batch_size=BATCH)
    return parser


def _add_models(parser: Parser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained",
        action="store_true",
        default=True,
        help="models by name get timm's weights (the default)",
    )
    group.add_argument(
        *("--no-pretrained", "--no_pretrained"),
        action="store_false",
        dest="pretrained",
        help="models by name stay untrained",
    )
    group.add_argument(
        "--weights",
        choices=list(WEIGHTS),
        default="auto",
        help="of checkpoints: raw, or their average ema; auto: the better one, or the average if the run says "
        "nothing",
    )
    silent = "of checkpoints that do not say it"
    group.add_argument("--model", default=SUPPRESS, metavar="NAME", help=f"{silent}: any timm model")
    group.add_argument(
        *("--model-kwargs", "--model_kwargs"),
        nargs="*",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="arguments of the constructor, e.g. patch_size=4 depth=6; of models by name, and " + silent,
    )
    group.add_argument(
        *("--input-size", "--input_size", "--img-size", "--img_size"),
        nargs="+",
        type=int,
        action=Size,
        default=SUPPRESS,
        metavar=("H", "W"),
        help=f"image size in pixels, or height and width; of models by name, and {silent}",
    )
    group.add_argument(
        *("--num-classes", "--num_classes"),
        type=int,
        default=SUPPRESS,
        metavar="N",
        help="of checkpoints; by default the rows of the head's weight",
    )


def answer_at_once(argv: Sequence[str] | None = None) -> None:
    """Answer --help and what is mistyped, before anything is imported that takes time.

    Raises:
        SystemExit: it is answered.
    """
    try:
        read_options(argv)
    except UserError as error:
        if is_first_on_machine():
            print(shown(f"redundancy: error: {error}", 4000), file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def read_options(argv: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Raises:
        UserError: an unknown flag, or a value that cannot be.
    """
    said = vars(get_args_parser().parse_args(argv))
    flags = usable({name: said[name] for name in SHARED})
    channels = {} if flags["in_chans"] == 3 else {"in_chans": flags["in_chans"]}
    flags |= {"model_kwargs": channels | said["model_kwargs"], "weights": said["weights"]}
    if not said.get("words"):
        raise UserError(f"which models? e.g. python -m redundancy {EXAMPLE} --data-path IMAGENET --output report")
    if not said.get("output"):
        raise UserError("--output FOLDER is missing: the folder to make for the report")
    output = expand(said["output"], "--output")
    check_path("--output", output)
    for name, least in (("images", 1), ("examples", 0)):
        if said[name] < least:
            raise UserError(f"--{name} must be at least {least}, not {said[name]}")
    size: Any = said.get("input_size")
    if size is not None and min(sides(size)) < 1:
        raise UserError(f"--input-size must be at least 1, not {min(sides(size))}")
    if said.get("num_classes") is not None and said["num_classes"] < 1:
        raise UserError(f"--num-classes must be at least 1, not {said['num_classes']}")
    patch: Any = said.get("patch")
    if patch is not None and min(patch) < 0:
        raise UserError(f"--patch {patch[0]} {patch[1]}: rows and columns count from 0")
    return Options(
        words=said["words"],
        output=Path(output),
        images=said["images"],
        metrics=said["metrics"],
        measures=said["measure"],
        examples=said["examples"],
        patch=tuple(patch) if patch is not None else None,
        model=said.get("model"),
        input_size=size,
        num_classes=said.get("num_classes"),
        pretrained=said["pretrained"],
        args=Args(**flags),
        argv=list(sys.argv[1:] if argv is None else argv),
    )
