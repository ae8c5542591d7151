"""The time of a training step: diversity terms against plain, plain against timm's own step, and textbook forms.

    python benchmarks/step.py                            # DeiT-S, batch 128, on whatever device is there
    python benchmarks/step.py --device cpu --batch-size 8 --steps 1 --rounds 12
    python benchmarks/step.py --variants plain patch.mixing=1 weight.cno@all=5e-4
    python benchmarks/step.py --quick                    # a small model: for the machinery, not the figures

All variants train DeiT-S, at 224 unless --size says otherwise, with the settings of configs/deit_small.yaml (Mixup,
CutMix, EMA, AdamW) on random images that are already decoded:

    timm        the step as timm's own training script makes it: timm's model, Mixup, loss, optimizer and EMA
    plain       ours without diversity
    five_terms  configs/deit_small_diverse.yaml
    all_layers  patch.cosine@all + attn.cosine@all + weight.cno@all
    released    Patch Diversification's two terms, with its mix and its second head
    textbook    the five terms as the equations stand: n x n matrices, loops over patches and over weight matrices
    SPEC        ours with this term alone, e.g. patch.mixing=1: what each costs
    X_explicit  the variant X with --explicit-terms: attention maps, and the logits of all patches
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from common import (
    CLASSES,
    Batches,
    Recipe,
    get_args_parser,
    machine,
    main,
    ratio,
    seconds,
    spread,
    take_turns,
    timed,
    write,
)
from textbook import TEXTBOOK
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engine import Precision
from utils import pick_device, seed_everything

ALL_LAYERS = ["patch.cosine@all=0.5", "attn.cosine@all=1e-4", "weight.cno@all=5e-4"]
RELEASED = ["patch.region_mixing=1", "patch.context=1"]
VARIANTS = ["timm", "plain", "five_terms", "all_layers", "released", "textbook"]
RATIOS = [
    ("five_terms", "plain"),
    ("plain", "timm"),
    ("all_layers", "plain"),
    ("released", "plain"),
    ("textbook", "plain"),
    ("textbook", "five_terms"),
    ("five_terms_explicit", "plain"),
    ("all_layers_explicit", "plain"),
]
EXPLICIT = "_explicit"


class Timm:
    """timm's own step, with the recipe's settings."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        args = recipe.args
        seed_everything(args.seed)
        self.precision = Precision(recipe.precision.device, args.amp_dtype)
        options: dict[str, Any] = {
            "num_classes": classes,
            "drop_path_rate": args.drop_path,
            "img_size": args.input_size,
        }
        self.model = timm.create_model("deit_small_patch16_224", **options, **args.model_kwargs)
        self.model.to(self.precision.device)
        self.mixup = Mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=classes,
        )
        self.criterion = SoftTargetCrossEntropy()
        self.optimizer = create_optimizer_v2(
            self.model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, eps=args.opt_eps
        )
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay)
        if args.torchcompile:
            self.model.compile(backend=args.torchcompile)

    def train(self, batches: Batches) -> None:
        self.model.train()
        for images, targets in batches:
            mixed, labels = self.mixup(images.clone(), targets)
            with self.precision.autocast():
                output = self.model(mixed)
                loss = self.criterion(output, labels)
            self.optimizer.zero_grad()
            self.precision.scaler.scale(loss).backward()
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
            self.ema.update(self.model)
        loss.item()


def textbook(recipe: Recipe) -> Recipe:
    """The same terms as the equations stand."""
    for term in recipe.objective.diversity.terms:
        ours: Any = term.function
        term.function = partial(TEXTBOOK[term.spec.measure], **ours.keywords)
    return recipe


def build(name: str, flags: argparse.Namespace, device: torch.device) -> Recipe | Timm:
    """A variant, ready to train."""
    argv = ["--batch-size", str(flags.batch_size), "--amp-dtype", flags.amp_dtype, "--input-size", str(flags.size)]
    argv += ["--seed", str(flags.seed), "--min-lr", "0"]
    argv += ["--torchcompile"] if flags.torchcompile else []
    argv += ["--explicit-terms"] if name == "textbook" or name.endswith(EXPLICIT) else []
    if flags.quick:
        argv += ["--model-kwargs", "depth=3", "embed_dim=96", "num_heads=3"]
    name = name.removesuffix(EXPLICIT)
    diverse = name in ("five_terms", "textbook")
    added = {"all_layers": ALL_LAYERS, "released": RELEASED}.get(name, [] if name in VARIANTS else [name])
    argv += [f"--reg={spec}" for spec in added]
    recipe = Recipe("deit_small_diverse.yaml" if diverse else "deit_small.yaml", device, argv, flags.classes)
    if name == "timm":
        return Timm(recipe, flags.classes)
    return textbook(recipe) if name == "textbook" else recipe


def measure(flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Medians over the rounds of all variants, and the ratios of those that take turns."""
    variants = {name: build(name, flags, device) for name in flags.variants}
    batches = Batches(flags.batch_size, flags.steps, flags.size, device, classes=flags.classes)
    rounds = {name: timed(variant.train, batches, device) for name, variant in variants.items()}
    times = take_turns(rounds, flags.rounds)
    specs = [(name, "plain") for name in flags.variants if name.removesuffix(EXPLICIT) not in VARIANTS]
    pairs = [(above, below) for above, below in [*RATIOS, *specs] if above in times and below in times]
    for above, below in pairs:
        print(f"{above} / {below}: {ratio(times, above, below):.3f}{spread(times, above, below)}")
    counts: dict[str, float] = {}
    if device.type == "cuda":
        counts = {name: kernels(variant.train, batches, device) for name, variant in variants.items()}
    for name, count in counts.items():
        print(f"{name:>12}: {count:8.1f} kernels/step")
    if flags.profile:
        for name, variant in variants.items():
            with profile() as profiler:
                variant.train(batches)
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
            print(f"{name}, {flags.steps} step(s):\n{table}")
    return {
        "kernels_per_step": counts,
        "dtype": next(iter(variants.values())).precision.name,
        "batch_size": flags.batch_size,
        "size": flags.size,
        "classes": flags.classes,
        "rounds": flags.rounds,
        "steps": flags.steps,
        "compiled": flags.torchcompile,
        "seconds_per_step": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {name_of(above, below): ratio(times, above, below) for above, below in pairs},
    }


def kernels(train: Callable[[Batches], object], batches: Batches, device: torch.device) -> float:
    """Kernels that a CUDA device runs in a step, without copies and fills."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds(lambda: train(batches), device)
    on_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device) / len(batches)


def name_of(above: str, below: str) -> str:
    """The key of a ratio: five_terms_over_plain, ..., naive_over_ours."""
    if (above, below) == ("textbook", "five_terms"):
        return "naive_over_ours"
    return f"{above}_over_{below}"


def step_parser(description: str) -> argparse.ArgumentParser:
    """The flags of a step: its images, classes, precision and random numbers."""
    parser = get_args_parser(description)
    parser.add_argument("--batch-size", type=int, help="images per step; 128, or 4 with --quick")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--classes", type=int, default=CLASSES, help="of the classifier")
    parser.add_argument("--amp-dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and their mixes")
    return parser


def parse() -> argparse.Namespace:
    parser = step_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, help="steps in a round; 20, or 1 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds of each variant, after one to warm up; 5")
    parser.add_argument("--torchcompile", action="store_true", help="compile all variants")
    parser.add_argument("--profile", action="store_true", help="then list the operators that take most time")
    names = f"of {', '.join(VARIANTS)} (all by default), or specs of single terms; with {EXPLICIT} behind"
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help=names)
    flags = parser.parse_args()
    flags.batch_size = flags.batch_size or (4 if flags.quick else 128)
    flags.steps = flags.steps or (1 if flags.quick else 20)
    flags.rounds = flags.rounds or 5
    return flags


def run() -> None:
    flags = parse()
    device = pick_device(flags.device)
    what = "a small ViT" if flags.quick else "DeiT-S"
    images = f"{flags.size}, {flags.classes} classes, batch {flags.batch_size}"
    print(f"{what} at {images}, {machine(device)}, {torch.get_num_threads()} threads")
    results = measure(flags, device)
    for name, value in results["seconds_per_step"].items():
        print(f"{name:>12}: {1000 * value:8.1f} ms/step  {flags.batch_size / value:8.1f} images/s")
    write(flags.json, device, results)


if __name__ == "__main__":
    main(run)
