"""Images per second and core of the input pipeline, against the reference's, on photo-like JPEGs made for it.

    python benchmarks/loader.py              # about five minutes
    python benchmarks/loader.py --quick      # for the machinery, not the figures

All variants read the same files, in DeiT's order for one process, with its full augmentation at 224. They work in
this process (`--num_workers 0`), on one core:

    reference     as DeiT's: decodes every copy; crop, RandAugment, normalising and erasing in float32 per image;
                  torch's default_collate
    default       main.py's loader, pixel for pixel the same
    fast_resize   main.py's loader with --fast-resize

Measured is processor time, of the work that a loader's workers do. `..._normalised` adds what main.py leaves to the
device, normalising and erasing, done on the same core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import get_args_parser, machine, main, ratio, spread, take_turns, write
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from datasets import build_dataset
from loaders import DeviceLoader, build_train_loader
from options import config
from options.flags import Args
from samplers import GRANULE, RASampler

WIDTH, HEIGHT, QUALITY = 477, 405, 90  # about 100 KB a file, as ImageNet's average
CPU = torch.device("cpu")


def photo(random: np.random.Generator) -> Image.Image:
    """Noise with the spectrum of photographs: amplitudes of 1/f^1.2, and colours vary less than brightness."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf

    def plane(exponent: float) -> np.ndarray:
        waves = random.standard_normal((2, *frequency.shape))
        values = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency**exponent, s=(HEIGHT, WIDTH))
        return values / values.std()

    brightness = plane(1.2)
    pixels = np.stack([128 + 55 * brightness + 18 * plane(1.5) for _ in range(3)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photos(root: Path, count: int) -> float:
    """Training images in one class folder, and their mean size in KB."""
    folder = root / "train" / "photos"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        photo(random).save(folder / f"{number:04}.jpg", quality=QUALITY)
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1000


def open_rgb(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def reference_loader(args: Args) -> DataLoader[Any]:
    """DeiT's pipeline."""
    transform = create_transform(
        args.input_size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    images = ImageFolder(f"{args.data_path}/train", transform, loader=open_rgb)
    return DataLoader(images, args.batch_size, sampler=RASampler(images, 1, 0), num_workers=0, drop_last=True)


def our_loader(args: Args) -> DeviceLoader:
    """main.py's."""
    return build_train_loader(args, build_dataset(True, args)[0], 1, 0, CPU)


def timed(batches: Callable[[], Iterator[Any]], count: int, size: int) -> Callable[[], float]:
    """A round that reads the first batches of an epoch, and returns the processor's seconds per image."""

    def measure() -> float:
        start = time.process_time()
        for _ in islice(batches(), count):
            pass
        return (time.process_time() - start) / (count * size)

    return measure


def build_variants(flags: argparse.Namespace, root: Path) -> dict[str, Callable[[], float]]:
    argv = ["--data-path", str(root), "--num_workers", "0", "--batch-size", str(flags.batch_size)]
    default = our_loader(config.resolve(argv))
    fast = our_loader(config.resolve([*argv, "--fast-resize"]))
    reference = reference_loader(config.resolve(argv))
    variants: dict[str, Callable[[], Iterator[Any]]] = {
        "reference": lambda: iter(reference),
        "default": lambda: iter(default.loader),
        "default_normalised": lambda: iter(default),
        "fast_resize": lambda: iter(fast.loader),
        "fast_resize_normalised": lambda: iter(fast),
    }
    return {name: timed(batches, flags.batches, flags.batch_size) for name, batches in variants.items()}


def name_of(variant: str) -> str:
    """The key of a ratio: default_loader_over_reference, fast_resize_over_reference, ..._normalised."""
    return f"{variant.replace('default', 'default_loader')}_over_reference"


def parse() -> argparse.Namespace:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--batch-size", type=int, help="images in a batch; 128, or 32 with --quick")
    parser.add_argument("--batches", type=int, help="batches in a round; 2, or 1 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds of each variant, after one to warm up; 15, or 3")
    flags = parser.parse_args()
    flags.batch_size = flags.batch_size or (32 if flags.quick else 128)
    flags.batches = flags.batches or (1 if flags.quick else 2)
    flags.rounds = flags.rounds or (3 if flags.quick else 15)
    return flags


def run() -> None:
    flags = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_photos(Path(folder), GRANULE)
        print(f"{WIDTH} x {HEIGHT}, {kilobytes:.0f} KB a file, batch {flags.batch_size}, {machine(CPU)}, one used")
        times = take_turns(build_variants(flags, Path(folder)), flags.rounds)
    rates = {name: 1 / statistics.median(values) for name, values in times.items()}
    for name, rate in rates.items():
        print(f"{name:>22}: {1000 / rate:6.3f} ms  {rate:7.1f} images/s")
    ratios = {name_of(name): ratio(times, "reference", name) for name in times if name != "reference"}
    for name in list(times)[1:]:
        print(f"{name_of(name)}: {ratios[name_of(name)]:.2f}{spread(times, 'reference', name)}")
    settings = {"batch_size": flags.batch_size, "batches": flags.batches, "rounds": flags.rounds}
    results = {"kilobytes_per_image": kilobytes, "images_per_second_per_core": rates, "ratios": ratios}
    write(flags.json, CPU, {**settings, **results})


if __name__ == "__main__":
    main(run)
