"""--check-data: read every image of both halves of a data set once, and list those that cannot be read.

Nothing is trained, and no model is built. Several processes share the images. The list is on stdout, sorted, each
image once; what it amounts to is the last line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset

from datasets import LabelledImages, build_dataset, named
from errors import Interrupted, UserError, reason
from images.decode import ImageError
from loggers.meters import Meters
from loggers.progress import Progress
from options.flags import Args
from program import Signals
from samplers import ShardSampler
from utils import (
    broadcast_object,
    find_launch,
    gather_to_main,
    init_distributed,
    is_main,
    rank,
    world_size,
)
from workers import SteadyLoader, default_workers

Item = TypeVar("Item")
BATCH = 32  # images that a worker hands over together
LINES = 10  # of progress for each half, where there is no terminal


class Seen(NamedTuple):
    """What one process, or all of them, found.

    Attributes:
        bad: what is wrong with each image that cannot be read.
        images: how many were looked at.
        stopped: whether a signal came before the last one.
    """

    bad: frozenset[str]
    images: int
    stopped: bool


class Faults(Dataset[str]):
    """What is wrong with each image of a data set; '' if nothing is."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images.decode(index)
        except ImageError as error:
            return reason(error)
        return ""


def check_data(args: Args) -> None:
    """Decode all images of both halves.

    Raises:
        UserError: some cannot be read, and are listed on stdout; or the data set itself cannot.
        Interrupted: a signal came first; what was found until then is listed.
    """
    launch = find_launch(args.world_size)
    init_distributed(launch, torch.device("cpu"), args.dist_url, args.dist_timeout)
    val_set, classes = build_dataset(False, args)
    train_set, _ = build_dataset(True, replace(args, class_names=named(classes)))
    halves = {"training": train_set, "validation": val_set}
    workers = default_workers() if args.num_workers is None else args.num_workers
    with Signals() as signals:
        seen = [look(half, Faults(images), workers, signals, args.dist_timeout) for half, images in halves.items()]
        found = gather_to_main(seen)
    total = broadcast_object(lambda: list_bad(chain.from_iterable(found)))
    counts = " and ".join(f"{len(images):,} {half}" for half, images in halves.items())
    conclude(total, counts)


def look(half: str, faults: Faults, workers: int, signals: Signals, seconds: float) -> Seen:
    """Read this process's share of a half."""
    share = ShardSampler(faults, world_size(), rank())
    found = list(walk(half, faults, share, workers, signals, seconds))
    return Seen(frozenset(found) - {""}, len(found), len(found) < len(share))


def walk(
    half: str, items: Dataset[Item], share: ShardSampler, workers: int, signals: Signals, seconds: float
) -> Iterator[Item]:
    """This process's share of a half's items, in its order, with progress, until a signal comes."""
    options = {"sampler": share, "batch_size": BATCH, "collate_fn": list, "num_workers": workers}
    loader = SteadyLoader(items, seconds, **options)
    progress = Progress(f"Reading {half} images", max(1, len(share) // LINES))
    each = chain.from_iterable(loader)
    for _ in progress.over(1, len(share), Meters()):
        signals.check()
        if signals.received:
            return
        yield next(each)


def list_bad(found: Iterable[Seen]) -> Seen:
    """Print what all processes found, and add it up."""
    everything = list(found)
    bad = frozenset().union(*(seen.bad for seen in everything))
    encoding = sys.stdout.encoding or "utf-8"
    for line in sorted(bad):  # a file's name may hold bytes that are no text
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return Seen(bad, sum(seen.images for seen in everything), any(seen.stopped for seen in everything))


def conclude(total: Seen, counts: str, what: str = "images") -> None:
    """Say what the list amounts to: on stdout if all is well.

    Args:
        total: what was found.
        counts: how many there are of each half, in words.
        what: they are.
    Raises:
        UserError: some cannot be read.
        Interrupted: not all of them were looked at.
    """
    if total.stopped:
        raise Interrupted(
            f"stopped by a signal after {total.images:,} of {counts} {what}; {len(total.bad):,} cannot be read"
        )
    if total.bad:
        raise UserError(
            f"{len(total.bad):,} of {counts} {what} cannot be read, and are listed above: repair or remove them"
        )
    if is_main():
        print(f"all {counts} {what} can be read", flush=True)
