"""What measuring redundancy costs: `python -m redundancy` against a plain evaluation of the same images, and
`--monitor-redundancy` against an epoch.

    python benchmarks/report.py --device cpu --only time      # evaluation and training: DeiT-S at 224, 64 images
    python benchmarks/report.py --device cpu --only heads     # similarity of heads: DeiT-Ti at 1024, one image
    python benchmarks/report.py --quick                       # a small model: for the machinery

A round of each variant takes turns with the others. The images are random ones in memory, so nothing is decoded.
Figures and the page are drawn once, and timed by themselves. Peak memory is the process's, of the whole run.

`heads` measures `attn.cosine_abs` and `attn.across` by themselves, which need no attention map, and beside
`attn.entropy`, which does. Their peaks are counted as in benchmarks/memory.py, the trial of the model included.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from common import Recipe, get_args_parser, machine, main, ratio, seconds, spread, take_turns, write
from memory import MIB, allocated
from torch import Tensor

from engine import evaluate
from options.flags import shape_of
from redundancy import assess
from redundancy.examples import Look
from redundancy.metrics.registry import LEVELS
from redundancy.monitor import AT_ONCE, IMAGES, Monitor
from utils import pick_device

PARTS = ("time", "heads")
HEADS = ["attn.cosine_abs", "attn.across"]
SMALL = ["--model-kwargs", "depth=3", "embed_dim=96", "num_heads=3"]
BATCH = 24  # as the command takes them by default


class Drawn:
    """Random images in memory, in place of an evaluation set: uint8 [C, H, W], label, no boxes."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self.images = torch.randint(256, (count, *shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, int, list[object]]:
        return self.images[place], place % 10, []


def parse() -> argparse.Namespace:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=64, metavar="N", help="that are measured")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each variant; 3, or 1 with --quick")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what is measured; all by default")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="of heads; 1024, or 224 with --quick")
    flags = parser.parse_args()
    flags.size = flags.size or (224 if flags.quick else 1024)
    flags.rounds = flags.rounds or (1 if flags.quick else 3)
    return flags


def variants(recipe: Recipe, images: int, device: torch.device) -> dict[str, Callable[[], float]]:
    """Evaluation, all metrics, those of each level, the monitor and a training step of as many images."""
    pixels = torch.randn(images, *shape_of(recipe.args))
    labels = torch.arange(images) % 10
    batches = list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
    backbone = recipe.model.backbone
    args = recipe.args.__class__(**{**vars(recipe.args), "monitor_redundancy": 1})
    monitor = Monitor(args, backbone, Drawn(IMAGES, shape_of(args)))  # type: ignore[arg-type]
    watched = recipe.model.__class__(backbone, measured=monitor.needs)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: seconds(work, device)

    found = {
        "evaluation": timed(lambda: evaluate(recipe.model, batches, recipe.precision)),
        "all metrics": timed(lambda: assess(backbone, batches)),
    }
    for level in LEVELS:
        found[level] = timed(lambda level=level: assess(backbone, batches, metrics=[level]))  # type: ignore[misc]
    found["monitor"] = timed(lambda: monitor.measure(0, watched, recipe.precision))
    step = [(pixels[:AT_ONCE].to(device), labels[:AT_ONCE].to(device))]
    found["step"] = timed(lambda: recipe.train(step))  # type: ignore[arg-type]
    return found


def page(recipe: Recipe, images: int) -> float:
    """Seconds that the figures and the page take."""
    report = assess(recipe.model.backbone, [torch.randn(images, *shape_of(recipe.args))])
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: report.save(Path(folder) / "report"), torch.device("cpu"))


def measure_time(flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of every variant, and their ratios."""
    recipe = Recipe("deit_small.yaml", device, ["--batch-size", str(AT_ONCE), *SMALL * flags.quick])
    what = "a small ViT" if flags.quick else "DeiT-S"
    print(f"{what} at 224, {flags.images} images, {machine(device)}, {torch.get_num_threads()} thread(s)")
    results = take_turns(variants(recipe, flags.images, device), flags.rounds)
    ratios = {}
    for name, each in results.items():
        against = ratio(results, name, "evaluation")
        ratios[f"{name.replace(' ', '_')}_over_evaluation"] = against
        print(
            f"{name:>12}: {statistics.median(each):8.2f} s  {against:6.2f} of an evaluation"
            f"{spread(results, name, 'evaluation')}"
        )
    ratios["monitor_over_step_image"] = ratio(results, "monitor", "step") * AT_ONCE
    print(f"the monitor takes as long as training on {ratios['monitor_over_step_image']:.0f} images")
    drawing = page(recipe, 4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"figures and page: {drawing:.1f} s; peak memory of all of this: {peak:.2f} GiB")
    return {"seconds": results, "page_seconds": drawing, "peak_gib": peak, "ratios": ratios}


def measure_heads(flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Peaks of similarity of heads, without attention maps and with them."""
    small: dict[str, Any] = {"depth": 3, "embed_dim": 96, "num_heads": 3} if flags.quick else {}
    model = timm.create_model("deit_tiny_patch16_224", img_size=flags.size, **small).to(device)
    image = torch.randn(1, 3, flags.size, flags.size)
    peaks = {}
    for name, metrics in {"without_maps": HEADS, "with_maps": [*HEADS, "attn.entropy"]}.items():
        measured = partial(assess, model, [image], metrics=metrics, look=Look(count=0))
        peaks[name], took = peak(measured, device)
        print(f"heads at {flags.size} pixels, {name.replace('_', ' ')}: {peaks[name] / MIB:,.0f} MiB, {took:.0f} s")
    ratios = {"without_maps_over_with_maps_memory": peaks["without_maps"] / peaks["with_maps"]}
    return {"peak_bytes": peaks, "ratios": ratios}


def peak(work: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Bytes that some work has allocated at its peak, and the seconds that it took."""
    start = time.perf_counter()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        found = torch.cuda.max_memory_allocated(device) - before
    else:
        found = allocated(work)
    return found, time.perf_counter() - start


def run() -> None:
    flags = parse()
    device = pick_device(flags.device)
    measured = {"time": measure_time, "heads": measure_heads}
    results: dict[str, Any] = {"ratios": {}}
    for part in flags.only:
        found = measured[part](flags, device)
        results |= found | {"ratios": results["ratios"] | found["ratios"]}
    write(flags.json, device, results)


if __name__ == "__main__":
    main(run)
