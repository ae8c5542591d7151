"""Processes that load an epoch with and without --group-repeats, and compare every batch over all of them.

Started by tests/test_loaders.py, with the path of a file that does not exist yet.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from pictures import make_args

from datasets import build_dataset
from loaders import TrainLoader, build_train_loader
from utils import rank, world_size

BATCH = 12  # images of a process
COMPARED = 3  # batches at either end of an epoch


def global_batches(group: bool) -> list[list[tuple[str, int]]]:
    """Pixels (as a checksum) and labels of batches over all processes, sorted: an epoch's first and last ones."""
    args = make_args(batch_size=BATCH, reprob=0.5, group_repeats=group)
    loader = build_train_loader(args, build_dataset(True, args)[0], world_size(), rank(), torch.device("cpu"))
    total = 1437 // 256 * 256 // world_size() // BATCH
    assert len(loader) == total
    batches = []
    for images, labels in chain(some(loader, 0), some(loader, total - COMPARED)):
        pixels = [hashlib.md5(image.numpy().tobytes()).hexdigest() for image in images]
        gathered: list[list[tuple[str, int]]] = [[] for _ in range(world_size())]
        dist.all_gather_object(gathered, list(zip(pixels, labels.tolist(), strict=True)))
        batches.append(sorted(sample for own in gathered for sample in own))
    return batches


def some(loader: TrainLoader, start: int) -> Iterator[Any]:
    """Batches of an epoch that is entered after `start` of them."""
    loader.set_epoch(4, start=start * BATCH)
    return islice(loader, COMPARED)


def compare(store: str, number: int, count: int) -> None:
    """Be process `number` of `count`."""
    dist.init_process_group("gloo", init_method=f"file://{store}{count}", rank=number, world_size=count)
    grouped, dealt = global_batches(True), global_batches(False)
    assert grouped == dealt and len(grouped) == 2 * COMPARED
    assert all(len(batch) == len(set(batch)) == BATCH * count for batch in grouped)


for count in (1, 2, 4, 8):
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            compare(sys.argv[1], number, count)
            os._exit(0)  # torch 2.6 may wait for ever in destroy_process_group
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
    print(count, flush=True)
