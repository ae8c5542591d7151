"""Images per second of the plain and the diverse recipe on 1, 2, ... processes of one machine, or of many.

    python benchmarks/scaling.py --processes 1 2 4 8                     # starts torchrun for each number
    torchrun --nnodes 8 --nproc_per_node 8 ... benchmarks/scaling.py     # this number alone, on several machines
    python benchmarks/scaling.py --quick --device cpu --processes 1 2    # a small model: for the machinery

weak    --batch-size images per process: ideally N times the images/s of one process
strong  --batch-size images over all processes, which makes the batches of each smaller

The step is that of benchmarks/step.py under DDP, NCCL on CUDA and gloo elsewhere. Processes that share cores cannot
scale; the efficiency then says how much they lose.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Batches, Recipe, get_args_parser, machine, main, take_turns, timed, write

from errors import UserError
from trainer import distribute
from utils import find_launch, init_distributed, is_main, pick_device, world_size

RECIPES = {"plain": "deit_small.yaml", "five_terms": "deit_small_diverse.yaml"}


def images_per_second(flags: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """mode -> recipe -> images/s over all processes, the median over the rounds."""
    rates: dict[str, dict[str, float]] = {}
    for mode in ("weak", "strong"):
        batch = flags.batch_size if mode == "weak" else flags.batch_size // world_size() // 2 * 2  # Mixup pairs
        if batch < 2:
            raise UserError(
                f"--batch-size {flags.batch_size} is too small to be shared by {world_size()} processes"
            )
        argv = ["--batch-size", str(batch), "--amp-dtype", flags.amp_dtype]
        if flags.quick:
            argv += ["--model-kwargs", "depth=3", "embed_dim=96", "num_heads=3"]
        recipes = {name: Recipe(file, device, argv) for name, file in RECIPES.items()}
        for recipe in recipes.values():
            recipe.wrapped = distribute(recipe.model, device)
        batches = Batches(batch, flags.steps, 224, device)
        rounds = {name: timed(recipe.train, batches, device) for name, recipe in recipes.items()}
        times = take_turns(rounds, flags.rounds)
        rates[mode] = {name: batch * world_size() / statistics.median(values) for name, values in times.items()}
    return rates


def start(processes: int, argv: list[str]) -> dict[str, dict[str, float]]:
    """What `processes` processes of this machine measure, in a torchrun of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run([*launcher, __file__, *argv, "--json", str(report)], env=env, check=True)
        return json.loads(report.read_text(encoding="utf-8"))["images_per_second"]


def compare(results: dict[int, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Efficiencies, and the diverse recipe's time over the plain one's, for each number of processes."""
    ratios = {}
    fewest = min(results)
    for count, rates in results.items():
        for mode, of in rates.items():
            ratios[f"five_terms_over_plain_{mode}_{count}"] = of["plain"] / of["five_terms"]
            for name, rate in of.items():
                ideal = results[fewest][mode][name] * count / fewest
                ratios[f"{mode}_efficiency_{name}_{count}"] = rate / ideal
    return ratios


def parse() -> argparse.Namespace:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to start")
    parser.add_argument("--batch-size", type=int, help="128, or 8 with --quick; see above")
    parser.add_argument("--steps", type=int, help="steps in a round; 20, or 2 with --quick")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each recipe, after one to warm up")
    parser.add_argument("--amp-dtype", default="auto", help="auto, float32, bfloat16 or float16")
    flags = parser.parse_args()
    flags.batch_size = flags.batch_size or (8 if flags.quick else 128)
    flags.steps = flags.steps or (2 if flags.quick else 20)
    return flags


def run() -> None:
    flags = parse()
    launch = find_launch()
    device = pick_device(flags.device, launch.local_rank)
    if "RANK" in os.environ:
        init_distributed(launch, device)
        results: dict[str, Any] = {"images_per_second": images_per_second(flags, device), "processes": world_size()}
        if is_main():
            print(json.dumps(results["images_per_second"]), flush=True)
            write(flags.json, device, results)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    argv = ["--device", flags.device, "--batch-size", str(flags.batch_size), "--steps", str(flags.steps)]
    argv += ["--rounds", str(flags.rounds), "--amp-dtype", flags.amp_dtype, *(["--quick"] if flags.quick else [])]
    print(f"{machine(device)}, {flags.batch_size} images per process (weak) or in all (strong)")
    results_of = {count: start(count, argv) for count in flags.processes}
    ratios = compare(results_of)
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    write(flags.json, device, {"images_per_second": results_of, "ratios": ratios})


if __name__ == "__main__":
    main(run)
