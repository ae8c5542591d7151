"""What the benchmarks share: recipes that are ready to train, variants that take turns, and the report."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import build
import program
from engine import Precision, Updater, train_one_epoch
from errors import UserError
from loggers.progress import Progress
from options import config
from runs import build_run
from utils import seed_everything
from warmup import compile_model

ROOT = Path(__file__).parents[1]
CLASSES = 1000


class Batches:
    """The same random batch, `steps` times: images [B, C, S, S], labels [B]; ImageNet's channels and classes."""

    def __init__(
        self,
        batch_size: int,
        steps: int,
        size: int,
        device: torch.device,
        channels: int = 3,
        classes: int = CLASSES,
    ) -> None:
        images = torch.randn(batch_size, channels, size, size, device=device)
        self.batch = images, torch.randint(classes, (batch_size,), device=device)
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.steps)

    def __len__(self) -> int:
        return self.steps


class Recipe:
    """A configuration of configs/, built by main.py's own parts and ready to train on random images.

    Args:
        name: of the file in configs/.
        device: where it trains.
        flags: of main.py; they win over the file.
        classes: of the images.
    """

    def __init__(self, name: str, device: torch.device, flags: Sequence[str] = (), classes: int = CLASSES) -> None:
        self.args = args = config.resolve(["--config", str(ROOT / "configs" / name), *flags])
        seed_everything(args.seed)
        backbone = build.build_backbone(args, classes)
        diversity, measured = build.build_diversity(args, backbone)
        self.objective = build.build_objective(args, diversity, classes, device)
        self.model = build.build_student(args, backbone, diversity, measured, classes, device)
        self.precision = Precision(device, args.amp_dtype)
        self.mixing = build.build_mixing(args, backbone, diversity)
        run_state = build_run(args, self.model, self.precision, self.mixing)
        self.wrapped: torch.nn.Module = self.model
        self.updater = Updater(run_state.optimizer, self.precision, args.clip_grad, run_state.ema)
        if args.torchcompile:
            compile_model(args.torchcompile, self.model)
            self.objective.compile(args.torchcompile)

    def train(self, batches: Batches) -> None:
        """Through the real loop; the device is done when this returns, since the means are read."""
        with contextlib.redirect_stdout(io.StringIO()):
            train_one_epoch(
                *(self.wrapped, self.objective, batches, self.updater, self.mixing),
                progress=Progress("", interval=10**9),
            )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of some work, the device's included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(train: Callable[[Batches], object], batches: Batches, device: torch.device) -> Callable[[], float]:
    """A round of training that returns its seconds per step."""
    return lambda: seconds(lambda: train(batches), device) / len(batches)


def processor_time(
    train: Callable[[Batches], object], batches: Batches, device: torch.device
) -> Callable[[], float]:
    """As `timed`, but the seconds that this process was given: other work on the machine does not count."""

    def spent() -> float:
        start = time.process_time()
        train(batches)
        return (time.process_time() - start) / len(batches)

    return spent


def take_turns(
    variants: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """What each variant measures in each round; round by round, so that a busy machine slows all alike."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, measure in variants.items():
            result = measure()
            if number >= warm_up:
                results[name].append(result)
    return results


def ratio(results: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """The median over the rounds of one variant's result over another's."""
    return statistics.median(a / b for a, b in zip(results[above], results[below], strict=True))


def spread(results: Mapping[str, Sequence[float]], above: str, below: str) -> str:
    """The quartiles of that ratio over the rounds, as text."""
    ratios = [a / b for a, b in zip(results[above], results[below], strict=True)]
    if len(ratios) < 4:
        return ""
    first, _, third = statistics.quantiles(ratios, n=4)
    return f"  (quartiles {first:.3f} to {third:.3f})"


def machine(device: torch.device) -> str:
    """The accelerator's name, or the processor's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def get_args_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--quick", action="store_true", help="small and few rounds: under a minute on a CPU core")
    parser.add_argument("--json", type=Path, help="write the results here too")
    return parser


def main(run: Callable[[], None]) -> None:
    """Run a benchmark; a user's mistake becomes one line and exit code 2."""
    name = Path(sys.argv[0]).name
    program.begin(name)
    try:
        run()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def write(path: Path | None, device: torch.device, results: Mapping[str, Any]) -> None:
    """The report as JSON, if it was asked for: where, the versions and the command, the results."""
    if path is None:
        return
    where = {"machine": machine(device), "threads": torch.get_num_threads(), "provenance": config.provenance()}
    path.write_text(json.dumps({**where, **results}, indent=2) + "\n", encoding="utf-8")
