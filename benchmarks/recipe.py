"""What the diversity terms cost: the recipe's training step against plain DeiT's, on random images.

    python benchmarks/recipe.py                                     # DeiT-S, batch 128, on whatever device is there
    python benchmarks/recipe.py --batch-size 8 --steps 3 --device cpu

The settings are those of script/run_deit_small_diverse.sh and script/run_deit_small.sh, through the real
`train_one_epoch` with Mixup, CutMix and EMA; only the images are random and already decoded. The two runs take
turns, round by round, so that a busy machine slows both alike; printed are the medians and their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import build
import config
from engine import Precision, Updater, train_one_epoch
from models import DiverseViT
from utils import pick_device, seed_everything

CONFIGS = Path(__file__).parents[1] / "configs"


class Batches:
    """The same random, ImageNet-shaped batch, `steps` times."""

    def __init__(self, batch_size: int, steps: int, size: int, device: torch.device) -> None:
        self.batch = torch.randn(batch_size, 3, size, size, device=device), torch.randint(1000, (batch_size,))
        self.steps = steps

    def __iter__(self) -> Any:
        return iter([self.batch] * self.steps)

    def __len__(self) -> int:
        return self.steps


class Variant:
    """One recipe, ready to train."""

    def __init__(self, recipe: str, flags: argparse.Namespace, device: torch.device) -> None:
        argv = ["--config", str(CONFIGS / recipe), "--batch-size", str(flags.batch_size)]
        args = config.resolve([*argv, "--amp-dtype", flags.amp_dtype])
        seed_everything(args.seed)
        backbone = build.build_backbone(args, 1000)
        self.diversity, _ = build.build_diversity(args, backbone)
        model = DiverseViT(backbone, self.diversity.needs).to(device)
        self.precision = Precision(device, args.amp_dtype)
        self.mixup = build.build_mixup(args, backbone, self.diversity)
        run_state = build.build_run(args, model, self.precision, self.mixup)
        self.model, self.ema = model, run_state.ema
        self.updater = Updater(run_state.optimizer, self.precision, args.clip_grad, run_state.ema)
        self.label_loss = build.build_label_loss(args, self.diversity, 1000, device)
        self.batches = Batches(flags.batch_size, flags.steps, args.input_size, device)

    def round(self) -> tuple[float, float]:
        """Seconds per step and peak device memory in MiB (0 where the device does not tell) of one round."""
        cuda = self.precision.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            train_one_epoch(
                self.model,
                self.label_loss,
                self.diversity,
                self.batches,
                self.updater,
                self.mixup,
                print_freq=10**9,
            )
        seconds = (time.perf_counter() - start) / len(self.batches)  # its means were read: the device is done
        return seconds, torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds of both variants, and their ratios."""
    device = pick_device(flags.device)
    variants = {
        "plain": Variant("deit_small.yaml", flags, device),
        "five_terms": Variant("deit_small_diverse.yaml", flags, device),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(flags.rounds + 1):
        for name, variant in variants.items():
            result = variant.round()
            if number > 0:  # the first round warms up
                rounds[name].append(result)
    seconds = {name: statistics.median(s for s, _ in results) for name, results in rounds.items()}
    memory = {name: max(m for _, m in results) for name, results in rounds.items()}
    ratios = {"five_terms_over_plain": seconds["five_terms"] / seconds["plain"]}
    if memory["plain"]:
        ratios["five_terms_over_plain_memory"] = memory["five_terms"] / memory["plain"]
    return {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": variants["plain"].precision.name,
        "batch_size": flags.batch_size,
        "provenance": config.provenance(),
        "seconds_per_step": seconds,
        "images_per_second": {name: flags.batch_size / s for name, s in seconds.items()},
        "peak_memory_mib": memory if memory["plain"] else "not measured",
        "ratios": ratios,
    }


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each variant, after one to warm up")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--amp-dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--json", type=Path, help="write the results here too")
    return parser


def run() -> None:
    flags = get_args_parser().parse_args()
    results = measure(flags)
    print(f"DeiT-S at 224, batch {flags.batch_size}, {results['dtype']}, {results['machine']}")
    for name, seconds in results["seconds_per_step"].items():
        memory = results["peak_memory_mib"]
        shown = f"{memory[name]:.0f} MiB" if isinstance(memory, dict) else memory
        rate = results["images_per_second"][name]
        print(f"{name:>12}: {1000 * seconds:8.1f} ms/step  {rate:8.1f} images/s  peak memory {shown}")
    for name, ratio in results["ratios"].items():
        print(f"{name}: {ratio:.3f}")
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run()
