"""The flags of `python -m segmentation`: those of main.py that make sense here, and its own.

Nothing is imported here that takes time, so that a mistyped flag is answered before torch is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from options.flags import (
    ABOVE_0,
    EPOCH,
    FREE,
    FROM_0,
    FROM_1,
    NOW,
    SAVED,
    SHARE,
    STAYS,
    WEIGHTS,
    Args,
    add_flags,
)
from options.parser import Formatter, Parser, Size, flag, switch

PROGRAM = "segmentation"
DATA_SETS = ("ADE20K", "CITYSCAPES", "VOC", "FOLDER", "DIGITS")
HEADS = ("uper", "linear")
NECKS = ("scale", "multilevel", "deconv")
INFERENCES = ("whole", "slide")
CLIPPED = ("norm", "value")
PIXELS = (1, 1 << 16)

# What it has of main.py's flags, as they are.
SHARED = (
    *("reg", "model_kwargs", "remedy", "in_chans", "pretrained", "drop_path", "amp_dtype", "torchcompile"),
    *("model_ema", "model_ema_decay", "model_ema_warmup", "model_ema_force_cpu", "grad_checkpointing"),
    *("num_workers", "pin_mem", "skip_bad_images", "check_data", "class_names"),
    *("opt", "opt_eps", "opt_kwargs", "opt_betas", "grad_accum_steps", "nonfinite", "nonfinite_patience"),
    *("clip_grad", "momentum", "layer_decay", "config", "output_dir", "device", "deterministic"),
    *("explicit_terms",),
    *("seed", "resume", "resume_opt", "save_interval_steps", "save_interval_minutes", "checkpoint_hist", "eval"),
    *("print_freq", "log_with", "project", "run_name", "dist_eval", "world_size", "dist_url", "dist_timeout"),
)
# What it has with another default or help text, or other choices; see `Flags`.
OWN = (
    *("model", "input_size", "data_path", "data_set", "batch_size", "mean", "std"),
    *("weights", "lr", "weight_decay", "clip_mode"),
)
# Values of main.py's other flags, where main.py's default is not that of a run without them.
NEUTRAL: dict[str, Any] = {
    **{"repeated_aug": False, "color_jitter": 0.0, "aa": "none", "smoothing": 0.0, "reprob": 0.0},
    **{"mixup": 0.0, "cutmix": 0.0, "mixup_prob": 0.0, "train_mode": True},
    **{"scale_lr_flag": False, "sched": "constant", "warmup_epochs": 0},
}


def _withheld() -> dict[str, Any]:
    """main.py's flags that are neither shared nor this program's own, and their values."""
    defaults = Args()
    rest = (entry.name for entry in fields(Args) if entry.name not in (*SHARED, *OWN))
    return {name: NEUTRAL.get(name, getattr(defaults, name)) for name in rest}


@dataclass(frozen=True)
class Flags(Args):
    """The flags' values."""

    withheld: ClassVar[Mapping[str, Any]] = _withheld()
    starts_from: ClassVar[str] = "backbone"

    model: str = flag(
        "", STAYS, "any timm model; by default the one that --backbone's file says it holds", group="model"
    )
    input_size: int | list[int] = flag(
        512,
        STAYS,
        "what is cropped out of an image to train on, in pixels; if not square height and width",
        "--crop-size",
        "--input-size",
        nargs="+",
        action=Size,
        metavar=("H", "W"),
        limits=PIXELS,
    )
    data_path: str | None = flag(None, FREE, "folder of the data set (DIGITS needs none)", group="data")
    mean: list[float] | None = flag(
        None, STAYS, "of the channels, of 0 to 1; by default that of the backbone's weights", nargs="+"
    )
    std: list[float] | None = flag(None, STAYS, "deviation of the channels; by default as the mean", nargs="+")
    data_set: str = flag(
        "ADE20K",
        EPOCH,
        "ADE20K, CITYSCAPES and VOC as their authors pack them; FOLDER: images and masks; DIGITS: handwritten "
        "digits on a canvas, which need no --data-path",
        choices=list(DATA_SETS),
    )
    batch_size: int = flag(16, EPOCH, "crops per process", limits=FROM_1)
    lr: float = flag(6e-5, NOW, "learning rate, whatever the batch", limits=FROM_0)
    weight_decay: float = flag(0.01, NOW, "weight decay; none on biases, norms and embeddings", limits=FROM_0)
    clip_mode: str = flag(
        "norm",
        NOW,
        "what --clip-grad limits: the norm of the whole gradient, or each value",
        choices=["norm", "value"],
    )

    backbone: str = flag(
        "",
        SAVED,
        "checkpoint of the backbone: a file or an https address; it says its model, or --model does",
        group="segmentation: network",
    )
    head: str = flag("uper", STAYS, "UperNet, or a linear classifier of the last map", choices=list(HEADS))
    neck: str = flag(
        "scale",
        STAYS,
        "how a plain ViT's four maps get their sizes: resized, resized between convolutions, or by transposed ones",
        choices=list(NECKS),
    )
    weights: str = flag(
        "auto",
        SAVED,
        "which weights in the file of --backbone, or of --eval --resume: raw, or their average ema; auto: the "
        "better ones of a backbone, both to evaluate",
        choices=list(WEIGHTS),
    )
    map_layers: list[int] = flag(
        [], STAYS, "blocks of a plain ViT whose output is a map; by default four, evenly spaced", nargs="+"
    )
    channels: int = flag(512, STAYS, "width of the UperNet head", limits=FROM_1)
    auxiliary_channels: int = flag(256, STAYS, "width of the auxiliary head", limits=FROM_1)
    auxiliary_coef: float = flag(0.4, EPOCH, "coefficient of the auxiliary head's loss; 0: none", limits=FROM_0)
    head_drop: float = flag(0.1, NOW, "dropout before each head's classifier", limits=SHARE)
    head_weights: str = flag(
        "", SAVED, "checkpoint of mmsegmentation whose heads (decode_head.*, auxiliary_head.*) to start from"
    )
    frozen: bool = switch(False, STAYS, on="train the heads alone; the backbone stays as it is")

    ignore_label: int | None = flag(
        None,
        STAYS,
        "number in the masks of pixels that count nowhere (FOLDER); by default 255",
        group="segmentation: data",
        limits=(0, 65535),
    )
    reduce_zero_label: bool = switch(
        False, STAYS, on="number 0 in the masks counts nowhere either, and the classes begin with 1 (FOLDER)"
    )
    class_file: str = flag("", FREE, "names of the classes, one in a line (FOLDER)", metavar="FILE")
    resize: list[int] = flag(
        [],
        EPOCH,
        "longer and shorter side that images are made to fit, times --scale-range, before they are cropped; by "
        "default as the set's published recipe has it; 0: not at all",
        nargs="+",
        metavar=("LONG", "SHORT"),
        limits=(0, PIXELS[1]),
    )
    test_resize: list[int] = flag(
        [],
        NOW,
        "the same for evaluation, where images are not cropped; masks keep their size",
        nargs="+",
        metavar=("LONG", "SHORT"),
        limits=(0, PIXELS[1]),
    )
    scale_range: list[float] = flag(
        [],
        EPOCH,
        "range of the factor by which they are scaled; these three are by default as the set's recipe has them",
        nargs="+",
        metavar=("LOW", "HIGH"),
        limits=(0.01, 100),
    )
    flip_prob: float | None = flag(None, EPOCH, "probability that a crop is mirrored", limits=SHARE)
    distort: bool | None = switch(
        None, EPOCH, on="distort brightness, contrast, saturation and hue", off="leave the colours"
    )

    iterations: int = flag(160_000, NOW, "steps to train, in all", group="segmentation: schedule", limits=FROM_1)
    eval_interval: int = flag(
        16_000, STAYS, "steps from one evaluation, log line and checkpoint to the next", limits=FROM_1
    )
    warmup_iterations: int = flag(1500, NOW, "steps of linear warm-up", limits=FROM_0)
    warmup_share: float = flag(1e-6, NOW, "share of the rate that the warm-up starts from", limits=SHARE)
    power: float = flag(1.0, NOW, "of the polynomial by which the rate falls to 0", limits=ABOVE_0)

    inference: str = flag(
        "whole",
        NOW,
        "evaluate whole images, or windows of the crop's size that slide over them",
        group="segmentation: evaluation",
        choices=list(INFERENCES),
    )
    stride: list[int] = flag(
        [], NOW, "of the windows, height and width; by default two thirds of the crop", nargs="+", limits=PIXELS
    )
    test_scales: list[float] = flag(
        [1.0], NOW, "factors of image size whose predictions are averaged", nargs="+", limits=(0.1, 10)
    )
    test_flip: bool = switch(False, NOW, on="average with the prediction of the mirrored image")
    predictions: str = flag(
        "", FREE, "with --eval: write predicted masks, and a page of some of them, to this folder", metavar="FOLDER"
    )
    pictures: int = flag(20, FREE, "images on the page of --predictions", limits=FROM_0)


def get_args_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        usage=f"python -m {PROGRAM} --data-path FOLDER --backbone FILE [--config FILE.yaml] [FLAGS]",
        description="Train a head for semantic segmentation on a vision transformer, and evaluate it.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_flags(parser, Flags)
    return parser
