"""Processes that load epochs with and without an exchange of samples, and compare every batch, in its order.

Started by tests/test_loaders.py, with the path of a file that does not exist yet, and a data set with bad images.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from itertools import islice
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pictures import imnet, make_args

import utils
from datasets import build_dataset
from loaders import TrainLoader, build_train_loader
from utils import rank, world_size

BATCHES = 3  # that are compared, of an epoch
CPU = torch.device("cpu")
# Flags, and the batch after which the epoch is entered.
CASES: list[tuple[dict[str, Any], int]] = [
    ({"reprob": 0.5}, 0),
    ({"reprob": 0.9, "resplit": True, "recount": 2}, 2),
    ({"fast_resize": True, "batch_size": 10}, 1),
    ({"batch_size": 2}, 3),  # fewer than four processes
    ({"num_workers": 2}, 1),
]


def load(args: Any, exchanged: bool) -> TrainLoader:
    """This process's loader; without an exchange the reference's placement, each copy made where it is used."""
    count, dataset = world_size(), build_dataset(True, args)[0]
    alone = mock.patch.object(utils, "world_size", lambda: 1)
    with nullcontext() if exchanged else alone:
        loader = build_train_loader(args, dataset, count, rank(), CPU)
    assert (loader.exchange is not None) == exchanged
    return loader


def same_batches(args: Any, start: int) -> None:
    loaders = [load(args, exchanged) for exchanged in (True, False)]
    for epoch in (0, 4) if args.num_workers else (4,):  # workers go on from epoch to epoch
        for loader in loaders:
            loader.set_epoch(epoch, start=start * args.batch_size)
        for (images, labels), (expected, expected_labels) in islice(zip(*loaders, strict=True), BATCHES):
            torch.testing.assert_close(images, expected, rtol=0, atol=0)
            torch.testing.assert_close(labels, expected_labels, rtol=0, atol=0)


def bad_images_are_counted(folder: str) -> None:
    """The same samples are replaced, and over all processes as many of them are counted."""
    args = imnet(folder, skip_bad_images=True, batch_size=6)
    counts = []
    batches = []
    for exchanged in (True, False):
        loader = load(args, exchanged)
        loader.set_epoch(1)
        batches.append(list(loader))
        counts.append(utils.all_reduce(loader.replaced.sum()).item())
    assert counts[0] == counts[1] > 0, counts
    for (images, labels), (expected, expected_labels) in zip(*batches, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def compare(store: str, folder: str, number: int, count: int) -> None:
    """Be process `number` of `count`."""
    dist.init_process_group("gloo", init_method=f"file://{store}{count}", rank=number, world_size=count)
    for changes, start in CASES:
        same_batches(make_args(**{"batch_size": 12, **changes}), start)
    bad_images_are_counted(folder)


for count in (2, 3, 4):
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            compare(*sys.argv[1:3], number, count)
            os._exit(0)  # torch 2.6 may wait for ever in destroy_process_group
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
    print(count, flush=True)
