"""Export a trained model for use without this repository.

    python script/export_model.py runs/x/checkpoint_best.pth exported
    python script/export_model.py runs/x/checkpoint_best.pth exported --formats timm torch onnx --weights raw
    python script/export_model.py deit_small_patch16_224-cd65a155.pth exported --model deit_small_patch16_224

Formats: timm (model.safetensors, config.json), torch (model.pt2) and onnx (model.onnx, which needs
requirements-export.txt). A network of python -m segmentation goes the same way, for images of any size where its
backbone allows it; timm then holds the backbone.

Exit codes: 0 done, 2 something given cannot work, 75 stopped by a signal, 130 interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import program
from errors import UserError, escaped
from options.flags import FORMATS, WEIGHTS
from options.parser import KeyValues, Parser, Size

if TYPE_CHECKING:
    from export import Exported
    from segmentation.trained import TrainedSegmenter
    from state.trained import Evaluated, Trained

PROGRAM = "export_model.py"
DEFAULT = ("timm", "torch")  # which need nothing more than training does


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or an https address")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="made if need be")
    formats = f"any of {', '.join(FORMATS)}; by default {' '.join(DEFAULT)}"
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT), metavar="FORMAT", help=formats)
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="auto: the better one, or the EMA if the run says nothing",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set; torch's choice by default")
    group = parser.add_argument_group("for checkpoints that do not say it, or say it wrongly")
    group.add_argument("--model", metavar="NAME", help="any timm model")
    arguments = "arguments of the model's constructor, e.g. patch_size=4 depth=6"
    group.add_argument(
        "--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help=arguments
    )
    size = "image size in pixels; of images that are not square height and width. For segmentation: the only one"
    group.add_argument("--input-size", nargs="+", action=Size, type=int, metavar=("H", "W"), help=size)
    group.add_argument("--num-classes", type=int, metavar="N", help="by default the rows of the head's weight")
    return parser


def size_of(path: Path) -> str:
    """A file's size in words."""
    size = path.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def describe(trained: Trained, source: str) -> str:
    """What is exported, and how images are to be prepared for it."""
    from images.tree import few

    parameters = sum(parameter.numel() for parameter in trained.backbone.parameters())
    shape = f"[B, {', '.join(map(str, trained.image_shape))}]"
    names = f" ({few(trained.class_names)})" if trained.class_names else ""
    return (
        f"{architecture(trained)} from {source}: {origin(trained)}\n"
        f"{parameters:,} parameters, {trained.backbone.num_classes} classes{names}, images {shape}\n"
        f"preprocessing: {trained.preprocessing}"
    )


def describe_segmenter(trained: TrainedSegmenter, source: str, size: tuple[int, int] | None) -> str:
    """The same of a network for segmentation."""
    from images.tree import few
    from segmentation.export import takes_any_size

    backbone = trained.backbone
    parameters = sum(parameter.numel() for parameter in trained.network.parameters())
    names = f" ({few(trained.class_names)})" if trained.class_names else ""
    channels, *crop = backbone.image_shape
    any_size = takes_any_size(trained.network, size)
    sides = "H, W" if any_size else ", ".join(map(str, size or crop))
    why = "" if any_size or size else ", the training crop's size, since this backbone cannot be traced for any"
    return (
        f"{trained.head} head on {architecture(backbone)} from {source}: {origin(backbone)}\n"
        f"{parameters:,} parameters, {trained.classes} classes{names}, images [B, {channels}, {sides}]{why}\n"
        f"preprocessing: {backbone.preprocessing.colours}"
    )


def architecture(trained: Trained) -> str:
    """A model's name, with what is built into it."""
    return trained.name + (f" with {', '.join(trained.remedies)}" if trained.remedies else "")


def origin(trained: Trained) -> str:
    """Which of a checkpoint's weights are taken, and how good they are."""
    took = {"ema": "the moving average of the weights (ema)", "raw": "the trained weights (raw)"}[trained.weights]
    return took + accuracy(trained.evaluated, trained.weights)


def accuracy(evaluated: Evaluated, weights: str) -> str:
    """What the run measured of the weights that are taken, and of the others."""
    own, other = (evaluated.ema, evaluated.model) if weights == "ema" else (evaluated.model, evaluated.ema)
    if own is None:
        return ", whose accuracy the checkpoint does not say"
    when = f" {evaluated.steps_ago} steps before" if evaluated.steps_ago else ""
    against = f" ({'raw' if weights == 'ema' else 'ema'}: {other:.2f}%)" if other is not None else ""
    return f", {evaluated.score} {own:.2f}%{when} on the run's evaluation images{against}"


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then write one format after the other.

    What takes seconds to import is imported here, where the command line is known to be right.
    """
    from export import check_folder, check_formats
    from segmentation.trained import holds_segmenter
    from state import checkpoint

    formats = list(dict.fromkeys(args.formats))
    check_formats(formats, args.opset)
    check_folder(args.output_dir)
    state = checkpoint.load(args.checkpoint)
    described, write = (segmenter if holds_segmenter(state, args.checkpoint) else classifier)(args, state)
    print(escaped(described), flush=True)
    for form in formats:
        with program.leaving_nothing(PROGRAM):
            exported = write(form)
        files = ", ".join(f"{path} ({size_of(path)})" for path in exported.files)
        print(f"\n{form}: {files}; largest difference of logits {exported.difference:.2g}", flush=True)
        print(f"    {exported.load}", flush=True)


def classifier(args: argparse.Namespace, state: Any) -> tuple[str, Callable[[str], Exported]]:
    """Of a checkpoint of main.py and others: what it is, and what writes it in a format."""
    from export import export
    from state.trained import read_trained

    trained = read_trained(
        args.checkpoint,
        args.weights,
        model=args.model,
        model_kwargs=args.model_kwargs,
        input_size=args.input_size,
        num_classes=args.num_classes,
        state=state,
    )
    return describe(trained, args.checkpoint), lambda form: export(trained, args.output_dir, form, args.opset)


def segmenter(args: argparse.Namespace, state: Any) -> tuple[str, Callable[[str], Exported]]:
    """The same of a checkpoint of python -m segmentation.

    Raises:
        UserError: a flag for checkpoints that do not say what they hold.
    """
    from options.flags import sides
    from segmentation.export import export
    from segmentation.trained import read_segmenter

    for flag, value in (
        ("model", args.model),
        ("model-kwargs", args.model_kwargs),
        ("num-classes", args.num_classes),
    ):
        if value:
            raise UserError(f"{args.checkpoint} says which network for segmentation it holds: drop --{flag}")
    size = None if args.input_size is None else sides(args.input_size)
    if size is not None and min(size) < 1:
        raise UserError(f"--input-size must be at least 1, not {min(size)}")
    trained = read_segmenter(args.checkpoint, args.weights, state)
    trained.network.maps.covered(
        size or trained.backbone.image_shape[1:]
    )  # refuses what the backbone does not take
    said = describe_segmenter(trained, args.checkpoint, size)
    return said, lambda form: export(trained, args.output_dir, form, args.opset, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    try:
        run(get_args_parser().parse_args(argv))
    except UserError as error:
        print(escaped(f"{PROGRAM}: error: {error}"), file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    program.begin(PROGRAM)
    program.leave(main())
