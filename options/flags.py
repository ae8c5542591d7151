"""Every flag of main.py, in one table: type, default, help text, limits. --help, YAML files and mypy read it.

The flags are DeiT's, plus the reference's five coefficients and a few of timm's names. Nothing is imported here
that takes time, so that a mistyped flag is answered before torch is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError, is_first_on_machine, shown
from loggers.backends import BACKENDS
from mixing import MODES
from options.parser import Formatter, KeyValues, Parser, Resume, Size, flag, switch
from options.yaml_file import read_config


class Names(tuple[str, ...]):
    """Choices of `--data-set`. A name with a slash is let through: its prefix is looked at when it is opened."""

    def __contains__(self, name: object) -> bool:
        return "/" in str(name) or super().__contains__(name)


DATA_SETS = Names(["CIFAR", "IMNET", "INAT", "INAT19", "DIGITS", "tar", "wds/FOLDER", "hfds/NAME", "torch/NAME"])
AMP_DTYPES = ("float32", "bfloat16", "float16")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
# Of models/remedies, which imports torch.
REMEDIES = (
    *("attnscale", "featscale", "gfsa", "contranorm", "neutreno", "reattention", "talking_heads"),
    *("layerscale", "registers", "differential", "qk_norm"),
)
CLIP_MODES = ("norm", "value", "agc")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant")
# Which of a checkpoint's weights are taken: those that were trained, or their moving average.
WEIGHTS = ("auto", "raw", "ema")
FORMATS = ("timm", "torch", "onnx")  # of script/export_model.py: what a model is written as

# What --pretrained's models have: how images are cropped for evaluation, and resized by Pillow.
CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

# Limits of numbers. Those of the augmentation's and of Mixup's are checked where they are used.
LARGEST = sys.float_info.max
FROM_0, FROM_1, ABOVE_0 = (0, LARGEST), (1, LARGEST), (1e-9, LARGEST)
SHARE = (0, 1)
SEEDS = (0, 2**31)

# What a resumed run makes of another value, in short. A flag that says which images come next, or what an epoch's
# means are means of, cannot change within an epoch.
STAYS, SAVED, EPOCH, NOW, FREE = Resume

DIVERSITY = "diversity (all off by default: plain DeiT)"
AS_REG = "the reference's spelling of --reg "


@dataclass(frozen=True)
class Args:
    """The flags' values. A flag with `group` opens a group of --help.

    Attributes:
        withheld: the flags that a program built on this table does not offer, and the values that they have there.
        starts_from: the flag whose file a run's first weights are from, chosen by `weights`.
    """

    withheld: ClassVar[Mapping[str, Any]] = {}
    starts_from: ClassVar[str] = "finetune"

    mixing_coef: float = flag(
        0, EPOCH, AS_REG + "patch.mixing=C: classify every patch token as well", "--mixing_coef", group=DIVERSITY
    )
    emb_cos_within_coef: float = flag(0, EPOCH, AS_REG + "patch.cosine@last=C", "--emb_cos_within_coef")
    emb_contrast_cross_coef: float = flag(
        0, EPOCH, AS_REG + "patch.contrastive@first:last=C", "--emb_contrast_cross_coef"
    )
    attn_cos_within_coef: float = flag(0, EPOCH, AS_REG + "attn.cosine@0=C", "--attn_cos_within_coef")
    weight_mha_cond_orth_coef: float = flag(0, EPOCH, AS_REG + "weight.cno@all=C", "--weight_mha_cond_orth_coef")
    reg: list[str] = flag(
        [],
        EPOCH,
        "add a diversity term (repeatable); 0 switches off a term of the config file",
        action="append",
        metavar="LEVEL.MEASURE[:OPTIONS][@LAYERS]=COEF",
    )
    measure: list[str] = flag(
        [],
        NOW,
        "measure redundancy on the evaluation set after each epoch, without training on it (repeatable)",
        action="append",
        metavar="LEVEL.MEASURE[:OPTIONS][@LAYERS]",
    )

    monitor_redundancy: int = flag(
        0,
        NOW,
        "measure redundancy of all layers on 16 evaluation images every N epochs, and after the last; 0: never",
        "--monitor-redundancy",
        limits=FROM_0,
    )

    model: str = flag(
        "deit_base_patch16_224", STAYS, "any timm model; _diverse and layer24 names of the reference", group="model"
    )
    model_kwargs: dict[str, Any] = flag(
        {},
        STAYS,
        "arguments of the model's constructor, e.g. patch_size=4 depth=6",
        nargs="*",
        action=KeyValues,
        metavar="KEY=VALUE",
    )
    remedy: list[str] = flag(
        [],
        STAYS,
        f"build a remedy for redundancy into the model (repeatable), see docs/methods.md: {', '.join(REMEDIES)}",
        action="append",
        metavar="NAME[:OPTIONS][@LAYERS]",
    )
    input_size: int | list[int] = flag(
        224,
        STAYS,
        "image size in pixels; of images that are not square height and width",
        "--input-size",
        "--img-size",
        nargs="+",
        action=Size,
        metavar=("H", "W"),
        limits=FROM_1,
    )
    in_chans: int = flag(3, STAYS, "channels of the images: 3 (colours), or 1 (grey)", limits=(1, 3))
    pretrained: bool = switch(
        False,
        SAVED,
        on="start from timm's weights of --model, which may also be hf-hub:NAME or local-dir:FOLDER; a head of "
        "another number of classes is new",
    )
    drop: float = flag(
        0.0, NOW, "dropout after the position embedding and in the blocks' projections", limits=SHARE
    )
    drop_path: float = flag(0.1, NOW, "stochastic depth rate of the last block", limits=SHARE)
    model_ema: bool = switch(True, NOW, on="keep a moving average of the weights (the default)", off="keep none")
    model_ema_decay: float = flag(0.99996, NOW, "decay of the moving average, per step", limits=SHARE)
    model_ema_warmup: bool = switch(
        False, NOW, on="begin the average with a small decay: 1 - (1 + step)^(-2/3), as long as that is smaller"
    )
    model_ema_force_cpu: bool = switch(False, FREE, on="keep the average in host memory")
    amp_dtype: str = flag(
        "auto",
        NOW,
        "autocast's dtype; auto: on CUDA bfloat16 where it has it, else float16; elsewhere float32",
        choices=["auto", *AMP_DTYPES],
    )
    torchcompile: str = flag(
        "",
        FREE,
        "compile the forward pass and the loss before the first step (inductor if no backend is named)",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
    )
    grad_checkpointing: bool = switch(
        False, FREE, on="recompute the blocks in the backward pass: less memory, about a third more time"
    )

    data_path: str | None = flag(
        None, FREE, "folder of the data set (DIGITS needs none; hfds/: a cache, if given)", group="data"
    )
    data_set: str = flag(
        "IMNET",
        EPOCH,
        "IMNET: folders train (or train_new) and val; tar: the same in train.tar and val.tar; wds/FOLDER: "
        "WebDataset's shards; CIFAR (CIFAR-100), INAT, INAT19, DIGITS; hfds/NAME: a Hugging Face data set of that "
        "name, or in that folder; torch/NAME: torchvision's cifar10, mnist, fashion_mnist, ...",
        choices=DATA_SETS,
        metavar="NAME",
    )
    image_key: str = flag(
        "", EPOCH, "column of the images (hfds/); by default the one of that type", "--image-key", "--input-key"
    )
    target_key: str = flag("", EPOCH, "column of the labels (hfds/); by default the one of that type")
    download: bool = switch(False, FREE, on="fetch the data set, if it is missing (torch/)")
    val_labels: str = flag(
        "",
        NOW,
        "labels of evaluation images that lie in no class folders (IMNET, tar): LOC_val_solution.csv, lines of a "
        "file name and a class, or a class a line in the order of the file names",
        metavar="FILE",
    )
    single_class: bool = switch(False, FREE, on="allow a data set with one class")
    class_names: list[str] = flag(
        [],
        STAYS,
        "names of the classes in the order of their labels: checked against the data's own, or given to classes "
        "that have none; checkpoints, args.yaml and exports keep them",
        nargs="+",
        metavar="CLASS",
    )
    inat_category: str = flag("name", STAYS, "which label of iNaturalist", choices=list(INAT_CATEGORIES))
    batch_size: int = flag(128, EPOCH, "images per process; evaluation takes 1.5 times as many", limits=FROM_1)
    num_workers: int | None = flag(
        None,
        FREE,
        "loader processes per process; by default ten, but not more than its share of the cores",
        "--num_workers",
        limits=FROM_0,
    )
    pin_mem: bool = switch(
        True, FREE, on="pin host memory for faster transfer to CUDA (the default)", off="do not pin"
    )
    repeated_aug: bool = switch(
        True,
        EPOCH,
        on="three differently augmented copies of each image (the default)",
        off="each image once an epoch",
    )
    group_repeats: bool = switch(
        False,
        EPOCH,
        on="keep the copies of an image in the process that makes them; the global batch stays the same",
    )
    fast_resize: bool = switch(
        False,
        EPOCH,
        on="crop and resize with torch instead of Pillow: faster, with other bytes (of 255 a crop's differ by 0.04 "
        "on average and up to 7, those of an image resized for evaluation by 0.004 and up to 1)",
    )
    mean: list[float] | None = flag(
        None,
        STAYS,
        "of the channels, of 0 to 1; these five are by default those of the weights that --pretrained, --finetune "
        "or --eval starts from, else DeiT's: ImageNet's mean and deviation, crop 0.875, center, bicubic",
        nargs="+",
    )
    std: list[float] | None = flag(None, STAYS, "deviation of the channels", nargs="+")
    crop_pct: float | None = flag(
        None,
        NOW,
        "evaluation: side of the crop, as a share of the resized image",
        "--crop-pct",
        "--eval-crop-ratio",
        metavar="CROP_PCT",
        limits=(0.01, 1),
    )
    crop_mode: str | None = flag(
        None,
        NOW,
        "evaluation: center resizes the shorter side and keeps the shape, squash resizes both",
        choices=list(CROP_MODES),
    )
    interpolation: str | None = flag(None, NOW, "evaluation: how images are resized", choices=list(INTERPOLATIONS))
    skip_bad_images: bool = switch(
        False,
        NOW,
        on="train on the next image where one cannot be decoded; in evaluation, whose accuracy that would change, "
        "it is always an error",
    )
    check_data: bool = switch(
        False, FREE, on="read every image of both halves once, list those that cannot be read, and stop"
    )

    color_jitter: float = flag(
        0.4, EPOCH, "colour jitter; timm applies it only where --aa is off", group="augmentation"
    )
    aa: str = flag("rand-m9-mstd0.5-inc1", EPOCH, "RandAugment or AutoAugment policy; none: off")
    three_augment: bool = switch(
        False,
        EPOCH,
        on={
            "--three-augment": "DeiT III's, in place of --aa: grey, solarised or blurred, then colour jitter",
            "--ThreeAugment": "the same, as DeiT spells it",
        },
    )
    src: bool = switch(
        False,
        EPOCH,
        on="with --three-augment: resize, then crop out of 4 pixels of padding, in place of the random "
        "resized crop",
    )
    smoothing: float = flag(0.1, EPOCH, "label smoothing")
    train_interpolation: str = flag("bicubic", EPOCH, "random, bilinear or bicubic")
    reprob: float = flag(0.25, EPOCH, "probability of random erasing")
    remode: str = flag("pixel", EPOCH, "what is put into the erased box: const, rand or pixel")
    recount: int = flag(1, EPOCH, "number of erased boxes")
    resplit: bool = switch(False, EPOCH, on="erase nothing in the first half of each batch")

    mixup: float = flag(0.8, EPOCH, "Mixup's Beta parameter; 0: no Mixup", group="Mixup and CutMix")
    cutmix: float = flag(1.0, EPOCH, "CutMix's Beta parameter; 0: no CutMix")
    cutmix_minmax: list[float] | None = flag(None, EPOCH, "range of the box's sides; overrides --cutmix", nargs="+")
    mixup_prob: float = flag(1.0, EPOCH, "probability of mixing at all")
    mixup_switch_prob: float = flag(0.5, EPOCH, "probability of CutMix where both are on")
    mixup_mode: str = flag(
        "batch", EPOCH, "draw for each batch, each pair of partners, or each image", choices=list(MODES)
    )

    bce_loss: bool = switch(
        False,
        EPOCH,
        on="binary cross-entropy, as in DeiT III: a mixed image has all its classes whole",
        group="loss",
    )
    cosub: bool = switch(
        False,
        EPOCH,
        on="train two submodels, drawn by drop path, on each image, by its label and by each other: twice the work",
    )

    opt: str = flag("adamw", STAYS, "any optimizer that timm knows", group="optimizer")
    opt_eps: float = flag(1e-8, NOW, "epsilon", limits=FROM_0)
    opt_kwargs: dict[str, Any] = flag(
        {},
        STAYS,
        "further arguments of the optimizer's constructor, e.g. amsgrad=True",
        nargs="*",
        action=KeyValues,
        metavar="KEY=VALUE",
    )
    opt_betas: list[float] | None = flag(None, NOW, "betas; the optimizer's own by default", nargs="+")
    grad_accum_steps: int = flag(
        1, EPOCH, "batches whose gradients make one step; the global batch grows by it", limits=FROM_1
    )
    nonfinite: str = flag(
        "skip",
        NOW,
        "a step that is not finite on any process: skip drops it on all, stop ends the run",
        choices=["skip", "stop"],
    )
    nonfinite_patience: int = flag(10, NOW, "that many dropped steps in a row end the run", limits=FROM_1)
    clip_grad: float | None = flag(
        None, NOW, "limit of the gradient, see --clip-mode; none by default", limits=ABOVE_0
    )
    clip_mode: str = flag(
        "norm",
        NOW,
        "what --clip-grad limits: the norm of the whole gradient, each value, or the norm of each unit (agc), as a "
        "share of its weights' norm",
        choices=list(CLIP_MODES),
    )
    momentum: float = flag(0.9, NOW, "momentum of SGD and its kin", limits=SHARE)
    layer_decay: float | None = flag(
        None, STAYS, "factor of the rate from each block to the one before it; none by default", limits=(1e-9, 1)
    )
    weight_decay: float = flag(0.05, NOW, "weight decay; none on biases, norms and embeddings", limits=FROM_0)

    epochs: int = flag(300, NOW, "epochs to train", group="schedule", limits=FROM_1)
    start_epoch: int = flag(0, SAVED, "first epoch; --resume sets it", "--start_epoch", limits=FROM_0)
    lr: float = flag(5e-4, NOW, "learning rate for a global batch of 512 images", limits=FROM_0)
    scale_lr_flag: bool = switch(
        True,
        NOW,
        off={
            "--scale_lr_flag": "take --lr as it is, whatever the batch",
            "--unscale-lr": "the same as --scale_lr_flag, by a clearer name",
        },
    )
    sched: str = flag("cosine", STAYS, "timm's schedule", choices=list(SCHEDULES))
    warmup_epochs: int = flag(5, NOW, "epochs of linear warm-up", limits=FROM_0)
    warmup_lr: float = flag(1e-6, NOW, "rate the warm-up starts from", limits=FROM_0)
    min_lr: float = flag(1e-5, NOW, "rate the schedule ends with", limits=FROM_0)
    decay_epochs: float = flag(
        30, NOW, "epochs between decays (step), or of the decay at the end (wsd, rsqrt)", limits=ABOVE_0
    )
    decay_milestones: list[int] = flag([90, 180, 270], NOW, "epochs after which to decay (multistep)", nargs="+")
    decay_rate: float = flag(
        0.1,
        NOW,
        "factor of a decay (step, plateau), power (poly)",
        "--decay-rate",
        "--dr",
        metavar="DECAY_RATE",
        limits=ABOVE_0,
    )
    cooldown_epochs: int = flag(
        10, NOW, "part of the schedule after its end; never trained, as in the reference", limits=FROM_0
    )
    patience_epochs: int = flag(10, NOW, "epochs without a better top-1 before a decay (plateau)", limits=FROM_0)
    lr_noise: list[float] | None = flag(
        None, NOW, "noise on the rate from, and up to, these shares of the epochs", nargs="+"
    )
    lr_noise_pct: float = flag(0.67, NOW, "largest relative noise", limits=ABOVE_0)
    lr_noise_std: float = flag(1.0, NOW, "deviation of the noise", limits=FROM_0)

    teacher_model: str = flag("regnety_160", EPOCH, "any timm model", group="distillation and fine-tuning")
    teacher_path: str = flag("", FREE, "the teacher's checkpoint: a file or an https address")
    distillation_type: str = flag("none", EPOCH, "how the teacher is followed", choices=["none", "soft", "hard"])
    distillation_alpha: float = flag(0.5, EPOCH, "share of the distillation loss", limits=SHARE)
    distillation_tau: float = flag(1.0, EPOCH, "temperature of soft distillation", limits=ABOVE_0)
    teacher_weights: str = flag(
        "auto", EPOCH, "which of the teacher's weights: raw, or their average ema; auto: raw", choices=list(WEIGHTS)
    )
    teacher_eval: bool = switch(False, FREE, on={"--teacher_eval": "evaluate the teacher and stop"})
    teacher_input_size: int | list[int] | None = flag(
        None,
        EPOCH,
        "the teacher's image size in pixels, by default the student's",
        nargs="+",
        action=Size,
        metavar=("H", "W"),
        limits=FROM_1,
    )
    teacher_model_kwargs: dict[str, Any] = flag(
        {}, EPOCH, "arguments of the teacher's constructor", nargs="*", action=KeyValues, metavar="KEY=VALUE"
    )
    finetune: str = flag("", SAVED, "start from this checkpoint's weights: a file or an https address")
    weights: str = flag(
        "auto",
        SAVED,
        "which weights in the file of --finetune, or of --eval --resume: raw, or their average ema; auto: raw to "
        "fine-tune, both to evaluate",
        choices=list(WEIGHTS),
    )
    train_mode: bool | None = switch(
        None,
        NOW,
        on="train with dropout and drop path (the default without --finetune)",
        off="train with both off (the default with --finetune)",
    )

    config: str = flag(
        "", FREE, "flags by name, and regularizers", "-c", "--config", group="run", metavar="FILE.yaml"
    )
    output_dir: str = flag("", FREE, "where checkpoints and logs go; none are written by default", "--output_dir")
    device: str = flag("auto", FREE, "auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps")
    deterministic: bool = switch(
        False, FREE, on="use deterministic algorithms only: equal runs are equal bit for bit, on CUDA more slowly"
    )
    explicit_terms: bool = switch(
        False,
        FREE,
        on="form attention maps for the terms of heads, and the logits of all patches for patch.mixing, where they "
        "could be computed without",
    )
    seed: int = flag(0, EPOCH, "of initialisation, data order, augmentation and mixing", limits=SEEDS)
    resume: str = flag(
        "",
        FREE,
        "continue from this checkpoint: a file, an https address, or auto: the newest in --output_dir, if any",
    )
    resume_opt: bool = switch(
        True,
        FREE,
        on="a resumed run goes on with its optimizer and schedule (the default)",
        off="with --resume FILE: go on with its weights, their average, epoch and log, but with a fresh optimizer "
        "and the flags' own schedule, entered at that epoch",
    )
    save_interval_steps: int = flag(
        0, FREE, "steps between checkpoints within an epoch; 0: only after it", limits=FROM_0
    )
    save_interval_minutes: float = flag(
        0.0, FREE, "minutes between checkpoints; 0: only after each epoch", limits=FROM_0
    )
    checkpoint_hist: int = flag(
        2, FREE, "checkpoints to keep: checkpoint.pth, then checkpoint.1.pth, ...", limits=FROM_1
    )
    val_interval: int = flag(
        1, NOW, "epochs from one evaluation to the next; the last epoch is always evaluated", limits=FROM_1
    )
    eval: bool = switch(False, FREE, on="evaluate (--resume FILE) and stop")
    print_freq: int = flag(10, FREE, "steps between progress lines", limits=FROM_1)
    log_with: list[str] = flag(
        [],
        FREE,
        f"trackers that get each epoch as well, below --output_dir or online: {', '.join(BACKENDS)}",
        nargs="+",
        choices=list(BACKENDS),
        metavar="NAME",
    )
    project: str = flag("diverse-vit", FREE, "what trackers call the project")
    run_name: str = flag("", FREE, "what trackers call the run; by default as the folder --output_dir is called")

    dist_eval: bool = switch(
        True,
        FREE,
        group="processes (torchrun's and SLURM's variables are read by themselves)",
        on="share the evaluation among the processes, exactly (the default)",
        off="let every process evaluate all images; the numbers are the same",
    )
    fsdp: bool = switch(
        False, FREE, on="keep parameters, gradients, optimizer and EMA in shards over all processes (FSDP2)"
    )
    world_size: int = flag(
        1,
        FREE,
        "number of processes, where the launcher sets RANK but no WORLD_SIZE",
        "--world_size",
        limits=FROM_1,
    )
    dist_url: str = flag("env://", FREE, "rendezvous address", "--dist_url")
    dist_timeout: float = flag(
        1800.0, FREE, "seconds that processes wait for one that may have died", limits=FROM_1
    )


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size as the flags have it."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def shape_of(args: Args) -> tuple[int, int, int]:
    """Channels, height and width of the images."""
    return args.in_chans, *sides(args.input_size)


# ------------------------------------------------------------------------------------------------------------
# The command line


class _ListRegularizers(argparse.Action):
    """Prints the catalogue of regularizers and exits, like --help."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from regularizers import catalogue

        print(catalogue.as_text())
        parser.exit()


def get_args_parser() -> Parser:
    """The parser of main.py's command line."""
    parser = Parser(
        prog="main.py",
        usage="main.py --data-path FOLDER [--config FILE.yaml] [FLAGS]",
        description="Train and evaluate vision transformers, diverse at the patch, attention and weight level.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_flags(parser, Args)
    return parser


def add_flags(parser: Parser, table: type[Args]) -> None:
    """Add a table's flags, and --list-regularizers beside those of diversity."""
    groups = parser.add_table(table)
    groups[DIVERSITY].add_argument(
        *("--list-regularizers", "--list_regularizers"),
        action=_ListRegularizers,
        nargs=0,
        dest="help",  # has no value and is no key of a config file, like --help
        default=argparse.SUPPRESS,
        help="list every LEVEL.MEASURE with its equation, layers, cost and source, and exit",
    )


def answer_at_once(
    argv: Sequence[str] | None = None,
    make_parser: Callable[[], Parser] = get_args_parser,
    program: str = "main.py",
) -> None:
    """Answer --help, --list-regularizers and what is mistyped, before anything is imported that takes time.

    Args:
        make_parser: of the program's command line.
        program: its name, for messages.
    Raises:
        SystemExit: it was one of them, and is answered.
    """
    parser = make_parser()
    try:
        file = parser.given(argv).get("config")
        if file:
            read_config(file, parser)
    except UserError as error:
        if is_first_on_machine():
            print(shown(f"{program}: error: {error}", 4000), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
