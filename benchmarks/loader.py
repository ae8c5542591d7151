"""Images per second and core of the input pipeline, against the reference's, on photo-like JPEGs made for it.

    python benchmarks/loader.py                       # about five minutes
    python benchmarks/loader.py --world-size 8        # as published: 8 processes
    python benchmarks/loader.py --samples 1281167     # a worker's memory, not its time
    python benchmarks/loader.py --quick               # for the machinery, not the figures

All variants read the same files, in DeiT's order, with its full augmentation at 224. They work in this process
(`--num_workers 0`), on one core. With `--world-size R` rounds go from process to process, each with its share of
the samples, as a loader of R processes has it:

    reference     as DeiT's: decodes every copy; crop, RandAugment, normalising and erasing in float32 per image;
                  torch's default_collate
    default       main.py's loader, pixel for pixel the same
    fast_resize   main.py's loader with --fast-resize

Measured is processor time, of the work that a loader's workers do. `..._normalised` adds what main.py leaves to the
device, normalising and erasing, done on the same core. What several processes exchange is measured by itself, in
real processes on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import get_args_parser, machine, main, ratio, spread, take_turns, write
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from datasets import build_dataset
from exchange import Exchange
from images.found import Samples, Texts
from loaders import DeviceLoader, build_train_loader
from options import config
from options.flags import Args, sides
from samplers import GRANULE, RASampler

WIDTH, HEIGHT, QUALITY = 477, 405, 90  # about 100 KB a file, as ImageNet's average
CPU = torch.device("cpu")
TURNS = 5  # exchanges that are timed
EVERY = 100  # batches between two looks at a worker's memory


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
    """Training images in one class folder, of which GRANULE are different, and their mean size in KB."""
    folder = root / "train" / "photos"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if number < GRANULE:
            photo(random).save(path, quality=QUALITY)
        else:
            os.link(folder / f"{number % GRANULE:05}.jpg", path)
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1000


def open_rgb(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def reference_loader(args: Args, world_size: int, rank: int) -> DataLoader[Any]:
    """DeiT's pipeline, and its placement of copies."""
    transform = create_transform(
        sides(args.input_size),
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    images = ImageFolder(f"{args.data_path}/train", transform, loader=open_rgb)
    return DataLoader(
        images, args.batch_size, sampler=RASampler(images, world_size, rank), num_workers=0, drop_last=True
    )


def our_loaders(args: Args, world_size: int) -> list[DeviceLoader]:
    """main.py's, of each process: what it makes, before samples are exchanged (with --group-repeats none are)."""
    dataset = build_dataset(True, args)[0]
    return [build_train_loader(args, dataset, world_size, rank, CPU) for rank in range(world_size)]


def timed(loaders: Sequence[Iterable[Any]], count: int, size: int) -> Callable[[], float]:
    """A round that reads the first batches of a process's epoch, and returns the processor's seconds per image.

    Rounds take the processes in turn.
    """
    turns = cycle(loaders)

    def measure() -> float:
        batches = iter(next(turns))
        start = time.process_time()
        for _ in islice(batches, count):
            pass
        return (time.process_time() - start) / (count * size)

    return measure


def build_variants(flags: argparse.Namespace, root: Path) -> dict[str, Callable[[], float]]:
    argv = ["--data-path", str(root), "--num_workers", "0", "--batch-size", str(flags.batch_size), "--single-class"]
    args = config.resolve(argv)
    if flags.world_size > 1:
        argv.append("--group-repeats")
    default = our_loaders(config.resolve(argv), flags.world_size)
    fast = our_loaders(config.resolve([*argv, "--fast-resize"]), flags.world_size)
    variants: dict[str, Sequence[Iterable[Any]]] = {
        "reference": [reference_loader(args, flags.world_size, rank) for rank in range(flags.world_size)],
        "default": [each.loader for each in default],
        "default_normalised": default,
        "fast_resize": [each.loader for each in fast],
        "fast_resize_normalised": fast,
    }
    return {name: timed(loaders, flags.batches, flags.batch_size) for name, loaders in variants.items()}


# ------------------------------------------------------------------------------------------------------------
# What several processes exchange, and what a worker keeps


def exchange_seconds(batch_size: int, world_size: int) -> float:
    """Processor time per image of exchanging samples of 224 x 224, in real processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        times = context.Queue()
        processes = [
            context.Process(target=_exchange, args=(folder, batch_size, world_size, rank, times))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found = [times.get() for _ in processes]
        for process in processes:
            process.join()
    return statistics.mean(found)


def _exchange(folder: str, batch_size: int, world_size: int, rank: int, times: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    exchange = Exchange(batch_size, world_size, rank, CPU)
    images, labels = torch.zeros(batch_size, 3, 224, 224), torch.zeros(batch_size, dtype=torch.int64)
    exchange(images)
    start = time.process_time()
    for _ in range(TURNS):
        exchange(images)
        exchange(labels)
    times.put((time.process_time() - start) / (TURNS * batch_size))
    dist.destroy_process_group()


class Kept(Dataset[float]):
    """Samples that a worker walks through without reading an image; a batch is its private memory, now and then."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples
        self._batches = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: Sequence[int]) -> list[float]:
        for index in indices:
            _source, _label = self.samples[index]  # as decoding does, which counts references to both
        self._batches += 1
        return [private_memory() if self._batches % EVERY == 1 else 0.0]


def private_memory() -> float:
    """This process's memory that no other one shares, in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def growth(samples: Sequence[Any]) -> float:
    """MiB by which a worker's private memory grows over an epoch of shuffled samples."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        Kept(samples), 128, shuffle=True, generator=generator, num_workers=1, collate_fn=lambda found: found[0]
    )
    found = [memory for memory in loader if memory]
    return float(found[-1] - found[0])


def measure_memory(flags: argparse.Namespace) -> None:
    """Print how a worker's memory grows with the samples as they are kept, and as a list of paths and labels."""
    names = (f"n{number % 1000:08}/n{number % 1000:08}_{number}.JPEG" for number in range(flags.samples))
    samples = Samples(Texts(names, "/data/imagenet/train/"), np.arange(flags.samples) % 1000)
    kept = growth(samples)  # before there are lists, which a worker would have in its memory, too
    listed = growth(list(samples))
    print(f"{flags.samples:,} samples, one worker, one epoch, {machine(CPU)}")
    print(f"arrays: {kept:.1f} MiB more private memory; a list of tuples: {listed:.1f} MiB")
    write(flags.json, CPU, {"samples": flags.samples, "growth_mib": {"arrays": kept, "list": listed}})


def name_of(variant: str) -> str:
    """The key of a ratio: default_loader_over_reference, fast_resize_over_reference, ..._normalised."""
    return f"{variant.replace('default', 'default_loader')}_over_reference"


def parse() -> argparse.Namespace:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--batch-size", type=int, help="images in a batch; 128, or 32 with --quick")
    parser.add_argument("--batches", type=int, help="batches in a round; 2, or 1 with --quick")
    parser.add_argument("--rounds", type=int, help="rounds of each variant, after one to warm up; 15, or 3")
    parser.add_argument("--world-size", type=int, default=1, help="processes whose loaders take turns")
    parser.add_argument(
        "--samples", type=int, default=0, help="measure a worker's memory with so many samples instead"
    )
    flags = parser.parse_args()
    flags.batch_size = flags.batch_size or (32 if flags.quick else 128)
    flags.batches = flags.batches or (1 if flags.quick else 2)
    flags.rounds = flags.rounds or (3 if flags.quick else 15)
    return flags


def run() -> None:
    flags = parse()
    torch.set_num_threads(1)
    if flags.samples:
        measure_memory(flags)
        return
    needed = flags.batch_size * flags.batches * flags.world_size
    images = -(-max(GRANULE, needed) // GRANULE) * GRANULE
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_photos(Path(folder), images)
        print(f"{WIDTH} x {HEIGHT}, {kilobytes:.0f} KB a file, batch {flags.batch_size}, {machine(CPU)}, one used")
        times = take_turns(build_variants(flags, Path(folder)), flags.rounds)
    rates = {name: 1 / statistics.median(values) for name, values in times.items()}
    for name, rate in rates.items():
        print(f"{name:>22}: {1000 / rate:6.3f} ms  {rate:7.1f} images/s")
    ratios = {name_of(name): ratio(times, "reference", name) for name in times if name != "reference"}
    for name in list(times)[1:]:
        print(f"{name_of(name)}: {ratios[name_of(name)]:.2f}{spread(times, 'reference', name)}")
    settings = {name: getattr(flags, name) for name in ("batch_size", "batches", "rounds", "world_size")}
    results = {"kilobytes_per_image": kilobytes, "images_per_second_per_core": rates, "ratios": ratios}
    if flags.world_size > 1:
        handed_over = exchange_seconds(flags.batch_size, flags.world_size)
        print(f"exchanging a batch: {1000 * handed_over:.3f} ms an image more, on the CPU")
        results["exchange_ms_per_image"] = 1000 * handed_over
    write(flags.json, CPU, {**settings, **results})


if __name__ == "__main__":
    main(run)
