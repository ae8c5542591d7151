"""What measuring redundancy costs: `python -m redundancy` against a plain evaluation of the same images, and
`--monitor-redundancy` against an epoch.

    python benchmarks/report.py --device cpu                  # DeiT-S at 224, 64 images
    python benchmarks/report.py --quick                       # a small model: for the machinery

A round of each variant takes turns with the others. The images are random ones in memory, so nothing is decoded.
Figures and the page are drawn once, and timed by themselves. Peak memory is the process's, of the whole run.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import Recipe, get_args_parser, machine, main, ratio, seconds, spread, take_turns, write
from torch import Tensor

from engine import evaluate
from options.flags import shape_of
from redundancy import assess
from redundancy.metrics.registry import LEVELS
from redundancy.monitor import AT_ONCE, IMAGES, Monitor
from utils import pick_device

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
    flags = parser.parse_args()
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


def run() -> None:
    flags = parse()
    device = pick_device(flags.device)
    argv = ["--model-kwargs", "depth=3", "embed_dim=96", "num_heads=3"] if flags.quick else []
    recipe = Recipe("deit_small.yaml", device, ["--batch-size", str(AT_ONCE), *argv])
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
    write(flags.json, device, {"seconds": results, "page_seconds": drawing, "peak_gib": peak, "ratios": ratios})


if __name__ == "__main__":
    main(run)
