"""What each remedy adds to a training step: time, peak memory and parameters, against the plain step.

    python benchmarks/remedies.py                                  # DeiT-S, batch 8, on whatever device is there
    python benchmarks/remedies.py --device cpu --rounds 24 --only gfsa contranorm:dual
    python benchmarks/remedies.py --quick                          # a small model: for the machinery

The step is that of configs/deit_small.yaml at 224 pixels (Mixup, CutMix, EMA, AdamW), on random images. Each
variant takes turns with a plain recipe, round by round, so that drift and a busy machine cancel. Both are gone when
the next pair is built. Variants are:

    explicit_map            plain, with attention that forms its map instead of the fused kernel
    NAME                    each remedy with its defaults, in all blocks
    SPEC                    any other spec of --remedy, e.g. gfsa:order=3@6-11
    patch_diversification   Patch Diversification's step: its mixing and both terms
    patch_diversification_talking_heads   the same with talking heads in all blocks, as its code has them
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any, NamedTuple

import torch
from common import (
    ROOT,
    Batches,
    Recipe,
    get_args_parser,
    machine,
    main,
    processor_time,
    ratio,
    spread,
    take_turns,
    timed,
    write,
)
from memory import peak_of

from errors import UserError
from models import find_layout
from models.remedies import REMEDIES
from options import config
from utils import pick_device

PLAIN, EXPLICIT = "plain", "explicit_map"


def remedy(spec: str) -> list[str]:
    """The flags of a variant that is one remedy."""
    return [f"--remedy={spec}"]


PATCH_DIVERSIFICATION = [
    *("--reg=patch.region_mixing=1", "--reg=patch.context=1"),
    *("--mixup=0", "--mixup-switch-prob=0", "--cutmix=1"),
]
VARIANTS: dict[str, list[str]] = {
    EXPLICIT: [],
    **{name: remedy(name) for name in REMEDIES},
    "patch_diversification": PATCH_DIVERSIFICATION,
    "patch_diversification_talking_heads": [*PATCH_DIVERSIFICATION, *remedy("talking_heads:random")],
}


class Cost(NamedTuple):
    """What a variant costs.

    Attributes:
        plain, seconds: of a step of the plain recipe and of this one, the medians over the rounds.
        time: the median over the rounds of their ratio.
        quartiles: of it, as text.
        memory: the ratio of the peaks.
        parameters: that it has beside those of the plain model.
    """

    plain: float
    seconds: float
    time: float
    quartiles: str
    memory: float
    parameters: int


def flags_of(name: str) -> list[str]:
    """The flags of main.py that make a variant."""
    return [] if name == PLAIN else VARIANTS.get(name, remedy(name))


def build(name: str, flags: argparse.Namespace, device: torch.device) -> Recipe:
    """A variant, ready to train."""
    argv = ["--batch-size", str(flags.batch_size), "--amp-dtype", flags.amp_dtype, "--unscale-lr", *flags_of(name)]
    if flags.torchcompile:
        argv.append("--torchcompile")
    if flags.model:
        argv += ["--model", flags.model]
    if flags.quick:
        argv += ["--model-kwargs", "depth=3", "embed_dim=96", "num_heads=3"]
    recipe = Recipe("deit_small.yaml", device, argv)
    if name == EXPLICIT:
        layout = find_layout(recipe.model.backbone)
        for attention in (each for block in range(layout.depth) for each in layout.attentions(block)):
            attention.fused_attn = False
    return recipe


def cost(name: str, flags: argparse.Namespace, device: torch.device) -> Cost:
    """What one variant costs beside the plain step. All that is built for it is gone when this returns."""
    names = (PLAIN, name)
    batches = Batches(flags.batch_size, flags.steps, 224, device)
    recipes = {each: build(each, flags, device) for each in names}
    counts = [sum(parameter.numel() for parameter in recipe.model.parameters()) for recipe in recipes.values()]
    clock = processor_time if flags.processor_time else timed
    rounds = {each: clock(recipe.train, batches, device) for each, recipe in recipes.items()}
    times = take_turns(rounds, flags.rounds)
    del recipes, rounds
    once = Batches(flags.batch_size, 1, 224, device)
    peaks = [peak_of(build(each, flags, device), once, device) for each in names]
    return Cost(
        plain=statistics.median(times[PLAIN]),
        seconds=statistics.median(times[name]),
        time=ratio(times, name, PLAIN),
        quartiles=spread(times, name, PLAIN).strip(" ()").removeprefix("quartiles "),
        memory=peaks[1] / peaks[0],
        parameters=counts[1] - counts[0],
    )


def parse() -> argparse.Namespace:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="another model than DeiT-S")
    parser.add_argument("--batch-size", type=int, help="images per step; 8, or 4 with --quick")
    parser.add_argument("--steps", type=int, default=1, help="steps in a round; 1")
    parser.add_argument("--rounds", type=int, help="rounds of each variant, after one to warm up; 12, or 1")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a CPU that has other work, with one thread"
    )
    parser.add_argument("--amp-dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--torchcompile", action="store_true", help="compile all variants")
    names = f"of {', '.join(VARIANTS)} (all by default), or specs of --remedy"
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="VARIANT", help=names)
    flags = parser.parse_args()
    flags.batch_size = flags.batch_size or (4 if flags.quick else 8)
    flags.rounds = flags.rounds or (1 if flags.quick else 12)
    return flags


def run() -> None:
    flags = parse()
    device = pick_device(flags.device)
    if flags.processor_time and device.type != "cpu":
        raise UserError("--processor-time is for the CPU: drop it, or give --device cpu")
    for name in flags.only:  # a mistake is found before anything is measured
        config.resolve(["--config", str(ROOT / "configs" / "deit_small.yaml"), *flags_of(name)])
    what = "a small ViT" if flags.quick else flags.model or "DeiT-S"
    print(f"{what} at 224, batch {flags.batch_size}, {machine(device)}, {torch.get_num_threads()} thread(s)")
    print("processor time\n" if flags.processor_time else "")
    print("| variant | step time / plain | peak memory / plain | parameters added | ms a step, plain beside it |")
    print("|---|---|---|---|---|")
    costs: dict[str, Cost] = {}
    for name in flags.only:
        costs[name] = each = cost(name, flags, device)
        gc.collect()
        quartiles = f" [{each.quartiles}]" if each.quartiles else ""
        print(
            f"| `{name}` | {each.time:.3f}{quartiles} | {each.memory:.3f} | {each.parameters:,} | "
            f"{1000 * each.seconds:.0f}, {1000 * each.plain:.0f} |",
            flush=True,
        )
    found: dict[str, Any] = {"ratios": {}}
    for name, each in costs.items():
        found["ratios"] |= {f"{name}_over_plain": each.time, f"{name}_over_plain_memory": each.memory}
    found |= {"batch_size": flags.batch_size, "rounds": flags.rounds, "steps": flags.steps}
    found |= {"processor_time": flags.processor_time}
    found |= {"compiled": flags.torchcompile, "costs": {name: each._asdict() for name, each in costs.items()}}
    write(flags.json, device, found)


if __name__ == "__main__":
    main(run)
