"""The peak memory of a training step with diversity terms, against that of the plain step.

    python benchmarks/memory.py                                     # DeiT-S, batch 128, on whatever device is there
    python benchmarks/memory.py --device cpu --batch-size 8
    python benchmarks/memory.py --quick                             # a small model: for the machinery

On CUDA the peak is the caching allocator's (`max_memory_allocated`). On a CPU every allocation that torch makes is
counted by its profiler, and the peak is that of the running sum, on top of what was there before the step: weights,
optimizer state and EMA, which are added. Recipes are those of benchmarks/step.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Batches, Recipe, machine, main, write
from step import build, step_parser

from state import checkpoint
from utils import pick_device

MIB = 2**20
VARIANTS = ["five_terms", "five_terms_explicit", "all_layers", "all_layers_explicit", "textbook"]


def peak_of(recipe: Recipe, batches: Batches, device: torch.device) -> int:
    """Bytes at the peak of a step, after one that makes the optimizer's state."""
    recipe.train(batches)
    gc.collect()
    if device.type != "cuda":
        return peak_on_cpu(recipe, batches)
    torch.cuda.reset_peak_memory_stats(device)
    recipe.train(batches)
    return torch.cuda.max_memory_allocated(device)


def peak_on_cpu(recipe: Recipe, batches: Batches) -> int:
    """Bytes at the peak of a step: what the profiler saw allocated, and what is there all the time."""
    return allocated(lambda: recipe.train(batches)) + resident(recipe)


def allocated(work: Callable[[], object]) -> int:
    """Bytes that some work on the CPU has allocated at its peak, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    now = highest = 0
    for _, size in sorted(sizes):
        now += size
        highest = max(highest, now)
    return highest


def resident(recipe: Recipe) -> int:
    """Bytes of weights, buffers, EMA and optimizer state."""
    held = [recipe.model.state_dict(), recipe.updater.optimizer.state_dict()["state"]]
    if recipe.updater.ema is not None:
        held.append(recipe.updater.ema.module.state_dict())
    return sum(checkpoint.nbytes(state) for state in held)


def peak(name: str, flags: argparse.Namespace, device: torch.device) -> int:
    """Bytes at the peak of a step of one variant, which is built for it and gone after it."""
    recipe = build(name, flags, device)
    assert isinstance(recipe, Recipe)
    return peak_of(recipe, Batches(flags.batch_size, 1, flags.size, device, classes=flags.classes), device)


def parse() -> argparse.Namespace:
    parser = step_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help=f"beside plain; {', '.join(VARIANTS)}")
    flags = parser.parse_args()
    flags.torchcompile = False
    flags.batch_size = flags.batch_size or (4 if flags.quick else 128)
    return flags


def run() -> None:
    flags = parse()
    device = pick_device(flags.device)
    what = "a small ViT" if flags.quick else "DeiT-S"
    print(f"{what} at {flags.size}, {flags.classes} classes, batch {flags.batch_size}, {machine(device)}")
    peaks: dict[str, Any] = {}
    for name in ("plain", *flags.variants):
        peaks[name] = peak(name, flags, device)
        print(f"{name:>19}: {peaks[name] / MIB:10.1f} MiB  {peaks[name] / peaks['plain']:.3f} of plain", flush=True)
    ratios = {
        f"{name}_over_plain_memory": value / peaks["plain"] for name, value in peaks.items() if name != "plain"
    }
    if {"textbook", "five_terms"} <= peaks.keys():
        ratios["naive_over_ours_memory"] = peaks["textbook"] / peaks["five_terms"]
    write(flags.json, device, {"batch_size": flags.batch_size, "peak_bytes": peaks, "ratios": ratios})


if __name__ == "__main__":
    main(run)
