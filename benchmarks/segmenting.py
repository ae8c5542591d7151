"""Segmentation beside transformers: the time and memory of a step, and the memory of predicting a large image.

    python benchmarks/segmenting.py --only step memory           # DeiT-S + UperNet, crops of 512, batch 2
    python benchmarks/segmenting.py --only inference             # one image of 2048 x 1024
    python benchmarks/segmenting.py --quick                      # small: for the machinery, not the figures

`step` and `memory` train UperNet with 512 channels and 150 classes on random crops: forward, backward and AdamW.
Backbone and neck are the same modules everywhere:

    transformers   decode head and auxiliary head of transformers, and the loss as its model computes it
    heads          ours in their place, in the same plain loop, with the reference's loss
    ours           the same through the loop of `python -m segmentation`, with its optimizer groups

Theirs has no dropout before the classifier, and its loss is a mean over labelled pixels. The peak of a step is that
of benchmarks/memory.py.

`inference` predicts the class of every pixel of an image: at once, in sliding windows of 512 pixels, and at once at
two scales, each with its mirror image. (Of the usual six scales the largest alone sets the peak.) Each runs in a
process of its own. What counts is how far the peak of that process (Linux's VmHWM; on CUDA the allocator's) rises
above that of building the network and predicting a small image. MiB are 2**20 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import get_args_parser, machine, main, ratio, seconds, spread, take_turns, write
from memory import MIB, allocated
from torch import Tensor, nn

from engine import Precision, Updater, train_one_epoch
from errors import UserError, did_you_mean
from loggers.progress import Progress
from losses import Objective
from models import DiverseViT
from options.flags import sides
from regularizers import Diversity
from runs import build_optimizer
from segmentation.features import Size
from segmentation.heads import pixel_cross_entropy
from segmentation.inference import Predictor
from segmentation.network import Segmenter
from segmentation.objective import PixelLoss, Unmixed
from segmentation.settings import Settings, resolve
from segmentation.starting import build_network
from state import checkpoint
from utils import pick_device, seed_everything

PARTS = ("step", "memory", "inference")
VARIANTS = ("transformers", "heads", "ours")
CLASSES, IGNORED = 150, 255
STATUS = Path("/proc/self/status")
Outputs = tuple[Tensor, Tensor]  # logits of the decode head and of the auxiliary head


class Crops:
    """The same random crops and masks, `steps` times; some pixels have no label."""

    def __init__(self, args: Settings, steps: int, device: torch.device) -> None:
        size = sides(args.input_size)
        masks = torch.randint(CLASSES + 8, (args.batch_size, *size), device=device)
        masks[masks >= CLASSES] = IGNORED
        self.batch = torch.randn(args.batch_size, 3, *size, device=device), masks
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.steps)

    def __len__(self) -> int:
        return self.steps


class Plain:
    """A network in a plain loop: forward, backward, AdamW.

    Args:
        network: backbone, neck and heads.
        loss: of both heads' logits [B, K, h, w] and masks [B, H, W].
    """

    def __init__(
        self, args: Settings, network: Segmenter, loss: Callable[[Outputs, Tensor], Tensor], precision: Precision
    ) -> None:
        self.model = network.to(precision.device).train()
        self.loss, self.precision = loss, precision
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay)

    def train(self, crops: Crops) -> None:
        for images, masks in crops:
            with self.precision.autocast():
                outputs = self.model(images)
            loss = self.loss(outputs, masks)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        loss.item()


class Ours:
    """The network in the loop of `python -m segmentation`."""

    def __init__(self, args: Settings, network: Segmenter, precision: Precision) -> None:
        self.model = DiverseViT(network.to(precision.device))
        self.optimizer = build_optimizer(args, network)
        self.updater = Updater(self.optimizer, precision, args.clip_grad)
        self.objective = Objective(PixelLoss(), Diversity([], depth=0))

    def train(self, crops: Crops) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            parts = self.model, self.objective, crops, self.updater, Unmixed()
            train_one_epoch(*parts, progress=Progress("", interval=10**9))


def build(name: str, args: Settings, device: torch.device) -> Plain | Ours:
    """One of VARIANTS, ready to train."""
    seed_everything(args.seed)
    network, precision = build_network(args, CLASSES, origin=None, fresh=False), Precision(device, args.amp_dtype)
    if name == "ours":
        return Ours(args, network, precision)
    if name == "heads":
        return Plain(args, network, our_loss, precision)
    network.decode_head, network.auxiliary_head = transformers_heads(args, network.maps.widths)
    return Plain(args, network, transformers_loss, precision)


def our_loss(outputs: Outputs, masks: Tensor) -> Tensor:
    """The reference's: a mean over all pixels of both heads."""
    decoded, auxiliary = (pixel_cross_entropy(logits, masks, IGNORED) for logits in outputs)
    return decoded + 0.4 * auxiliary


def transformers_heads(args: Settings, widths: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Its decode head and auxiliary head, of the same sizes."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    sizes: dict[str, Any] = {"hidden_size": args.channels, "num_labels": CLASSES}
    sizes |= {"auxiliary_channels": args.auxiliary_channels, "auxiliary_in_channels": widths[2]}
    config = UperNetConfig(**sizes)
    return UperNetHead(config, list(widths)), UperNetFCNHead(config, list(widths))


def transformers_loss(outputs: Outputs, masks: Tensor) -> Tensor:
    """As UperNetForSemanticSegmentation has it: of logits resized to the mask, a mean over labelled pixels."""
    resized = [F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False) for logits in outputs]
    decoded, auxiliary = (F.cross_entropy(logits, masks, ignore_index=IGNORED) for logits in resized)
    return decoded + 0.4 * auxiliary


# ------------------------------------------------------------------------------------------------------------
# A step


def measure_steps(flags: argparse.Namespace, args: Settings, device: torch.device) -> dict[str, Any]:
    """The time of a step: medians over the rounds of all variants, which take turns."""
    variants = {name: build(name, args, device) for name in flags.variants}
    crops = Crops(args, flags.steps, device)
    clock = processor_time if flags.processor_time else timed
    turns = {name: clock(each, crops, device) for name, each in variants.items()}
    times = take_turns(turns, flags.rounds)
    for name, values in times.items():
        print(f"{name:>12}: {1000 * statistics.median(values):10.1f} ms/step", flush=True)
    ratios = {}
    for name in [name for name in times if name != "transformers" and "transformers" in times]:
        ratios[f"{name}_over_transformers"] = cost = ratio(times, name, "transformers")
        print(f"{name} / transformers: {cost:.3f}{spread(times, name, 'transformers')}", flush=True)
    return {"seconds_per_step": times, "ratios": ratios}


def timed(step: Plain | Ours, crops: Crops, device: torch.device) -> Callable[[], float]:
    """A round of training that returns its seconds per step."""
    return lambda: seconds(lambda: step.train(crops), device) / len(crops)


def processor_time(step: Plain | Ours, crops: Crops, device: torch.device) -> Callable[[], float]:
    """As `timed`, but the seconds that this process was given: other work on the machine does not count."""

    def spent() -> float:
        start = time.process_time()
        step.train(crops)
        return (time.process_time() - start) / len(crops)

    return spent


def measure_peaks(flags: argparse.Namespace, args: Settings, device: torch.device) -> dict[str, Any]:
    """The peak memory of a step of each variant, one after the other."""
    peaks: dict[str, int] = {}
    for name in flags.variants:
        peaks[name] = peak_of_step(build(name, args, device), Crops(args, 1, device), device)
        print(f"{name:>12}: {peaks[name] / MIB:10.1f} MiB at the peak of a step", flush=True)
    base = peaks.get("transformers")
    ratios = {
        f"{name}_over_transformers_memory": peaks[name] / base for name in peaks if base and name != "transformers"
    }
    for name, cost in ratios.items():
        print(f"{name.replace('_over_', ' / ').replace('_memory', '')}, memory: {cost:.3f}")
    return {"peak_bytes": peaks, "ratios": ratios}


def peak_of_step(step: Plain | Ours, crops: Crops, device: torch.device) -> int:
    """Bytes at the peak of a step, after one that makes the optimizer's state."""
    step.train(crops)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.train(crops)
        return torch.cuda.max_memory_allocated(device)
    held = checkpoint.nbytes([step.model.state_dict(), step.optimizer.state_dict()["state"]])
    return allocated(lambda: step.train(crops)) + held


# ------------------------------------------------------------------------------------------------------------
# Predicting a large image


def predictors(window: Size) -> dict[str, Predictor]:
    """How an image is predicted, by name."""
    return {
        "whole": Predictor(),
        "sliding": Predictor(window, stride=(window[0] * 2 // 3, window[1] * 2 // 3)),
        "multiscale": Predictor(scales=(1.0, 1.75), flip=True),
    }


def measure_inference(flags: argparse.Namespace, args: Settings, device: torch.device) -> dict[str, Any]:
    """The memory that predicting an image takes beyond the network's own, each way in a new process."""
    found: dict[str, tuple[int, float]] = {}
    size = flags.image[0], flags.image[1]
    print(f"one image of {size[1]} x {size[0]} pixels:")
    for name in predictors(sides(args.input_size)):
        with multiprocessing.get_context("forkserver").Pool(1) as process:
            found[name] = process.apply(peak_of_prediction, (name, args, size, device, torch.get_num_threads()))
        peak, took = found[name]
        print(f"{name:>12}: {peak / MIB:10.1f} MiB above the network, {took:.1f} s", flush=True)
    ratios = {f"{name}_over_whole_memory": peak / found["whole"][0] for name, (peak, _) in found.items()}
    del ratios["whole_over_whole_memory"]
    return {"inference_bytes": {name: peak for name, (peak, _) in found.items()}, "ratios": ratios}


def peak_of_prediction(
    name: str, args: Settings, size: Size, device: torch.device, threads: int
) -> tuple[int, float]:
    """Bytes above the network, and seconds."""
    torch.set_num_threads(threads)
    frozen = replace(args, frozen=True)  # which parameters get a gradient is then not tried, which takes memory
    network = build_network(frozen, CLASSES, origin=None, fresh=False).to(device).eval()
    window, small = sides(args.input_size), (64, 64)
    predict, precision = predictors(window)[name], Precision(device, args.amp_dtype)

    def logits(images: Tensor) -> Tensor:
        with precision.autocast():
            found: Tensor = network(images)
        return found

    Predictor()(logits, torch.randn(3, *small, device=device), small)
    gc.collect()
    image, before = torch.randn(3, *size, device=device), peak_so_far(device)
    took = seconds(lambda: predict(logits, image, size), device)
    return peak_so_far(device) - before, took


def peak_so_far(device: torch.device) -> int:
    """Bytes that this process has had at most; `ru_maxrss` would begin with those of the process that began it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


# ------------------------------------------------------------------------------------------------------------
# The command


def parse() -> argparse.Namespace:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts; all by default")
    names = f"of {', '.join(VARIANTS)}; all by default"
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="VARIANT", help=names)
    parser.add_argument("--steps", type=int, default=1, help="steps in a round; 1")
    parser.add_argument("--rounds", type=int, help="rounds of each variant, after one to warm up; 5, or 1")
    parser.add_argument("--batch-size", type=int, default=2, help="crops in a step; 2")
    parser.add_argument("--crop-size", type=int, help="in pixels, also of windows; 512, or 64 with --quick")
    parser.add_argument("--amp-dtype", default="auto", help="auto, float32, bfloat16 or float16")
    help_time = "for a CPU that has other work, with one thread"
    parser.add_argument("--processor-time", action="store_true", help=help_time)
    image = "of the image to predict; 1024 2048, or 256 512 with --quick"
    parser.add_argument("--image", nargs=2, type=int, metavar=("H", "W"), help=image)
    flags = parser.parse_args()
    flags.rounds = flags.rounds or (1 if flags.quick else 5)
    flags.crop_size = flags.crop_size or (64 if flags.quick else 512)
    flags.image = flags.image or ([256, 512] if flags.quick else [1024, 2048])
    if flags.batch_size < 2:
        raise UserError("--batch-size must be at least 2: batch norm of one pooled cell needs two crops")
    if flags.processor_time and pick_device(flags.device).type != "cpu":
        raise UserError("--processor-time is for the CPU: drop it, or give --device cpu")
    if "inference" in flags.only and pick_device(flags.device).type == "cpu" and not STATUS.exists():
        raise UserError(f"memory of a prediction on a CPU is read from {STATUS}, of Linux: give --only step memory")
    for name in flags.variants:
        if name not in VARIANTS:
            raise UserError(
                f"unknown variant {name!r}.{did_you_mean(name, VARIANTS)} There are {', '.join(VARIANTS)}"
            )
    steps = {"step", "memory"} & set(flags.only)
    if steps and "transformers" in flags.variants and importlib.util.find_spec("transformers") is None:
        raise UserError("there is no transformers here: pip install transformers, or give --variants heads ours")
    return flags


def settings(flags: argparse.Namespace) -> Settings:
    """DeiT-S under UperNet, crops of 512, batch 2; something small with --quick."""
    argv = ["--model", "deit_small_patch16_224", "--amp-dtype", flags.amp_dtype]
    argv += ["--crop-size", str(flags.crop_size), "--batch-size", str(flags.batch_size)]
    if flags.quick:
        argv += ["--channels", "16", "--auxiliary-channels", "8"]
        argv += ["--model-kwargs", "patch_size=16", "depth=4", "embed_dim=24", "num_heads=3"]
    return resolve(argv)


def run() -> None:
    flags = parse()
    args, device = settings(flags), pick_device(flags.device)
    what = "a small ViT" if flags.quick else "DeiT-S"
    where = f"{machine(device)}, {torch.get_num_threads()} thread(s)"
    print(f"{what} + UperNet, crops of {args.input_size}, batch {args.batch_size}, {where}")
    parts = {"step": measure_steps, "memory": measure_peaks, "inference": measure_inference}
    results: dict[str, Any] = {"rounds": flags.rounds, "steps": flags.steps, "ratios": {}}
    for name in PARTS:
        if name in flags.only:
            found = parts[name](flags, args, device)
            results = {**results, **found, "ratios": {**results["ratios"], **found["ratios"]}}
    write(flags.json, device, results)


if __name__ == "__main__":
    main(run)
