"""Which images each process sees: DeiT's repeated augmentation for training, exact shards for evaluation.

Samplers know neither images nor batches, and leave the global random state alone. RASampler and ShardSampler yield
indices; ResumableSampler adds to each what its random numbers depend on, and can start in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

import utils

GRANULE = 256  # an epoch of repeated augmentation covers the largest multiple of this many samples


class RASampler(Sampler[int]):
    """Repeated augmentation: every drawn image appears several times in one global batch.

    The shuffled list of N images is stretched so that each index stands `num_repeats` times in a row. Process
    r of R takes the entries r, r + R, r + 2R, ..., so with R >= `num_repeats` the copies of an image land on
    different processes. Every copy gets an augmentation of its own. An epoch stops after
    floor(N // 256 * 256 / R) samples per process: it costs as much as a plain epoch and sees about
    N / `num_repeats` different images.

    timm's RepeatAugSampler gives the same indices. It has no seed and no groups, and lists all `num_repeats` N
    entries: 0.4 s and 150 MiB for each epoch of ImageNet, in each process.

    Args:
        dataset: anything with a length N.
        num_replicas: number of processes R; the process group's size by default.
        rank: this process r; the process group's rank by default.
        shuffle: draw a new order each epoch, from `seed + epoch`; else the order of the data set.
        num_repeats: copies of each image.
        together: `--group-repeats`: the batch size B of a process. Each batch of B R entries over all processes is
            then cut into R pieces of B neighbours, instead of being dealt out entry by entry: the same entries,
            but copies of an image stay together. 0: dealt out.
        handed_over: with `together`: the processes exchange what they made (exchange.py), and train on the entries
            that are dealt out.
        seed: equal on all processes. (The reference seeds with the epoch alone: `seed` 0.)
    Raises:
        UserError: N < 256, for which an epoch would be empty.
    Source: Hoffer et al. 2020, "Augment your batch"; Touvron et al. 2021 (DeiT).
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        num_repeats: int = 3,
        seed: int = 0,
        together: int = 0,
        handed_over: bool = False,
    ) -> None:
        if len(dataset) < GRANULE:
            raise utils.UserError(
                f"repeated augmentation needs at least {GRANULE} training images, but there are "
                f"{len(dataset)}; give --no-repeated-aug"
            )
        if num_repeats < 1:
            raise ValueError(f"num_repeats must be at least 1, not {num_repeats}")
        self.dataset = dataset
        self.num_replicas = utils.world_size() if num_replicas is None else num_replicas
        self.rank = utils.rank() if rank is None else rank
        _check_rank(self.num_replicas, self.rank)
        self.shuffle = shuffle
        self.num_repeats = num_repeats
        self.seed = seed
        self.together = together
        self.handed_over = handed_over
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        if self.shuffle:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        else:
            order = torch.arange(count)
        # The reference also pads the stretched list to a multiple of R. At most N of its entries are ever
        # taken, so the padding behind them is never reached.
        return iter(order[self.places() // self.num_repeats].tolist())

    def places(self) -> Tensor:
        """Which entries of the stretched list this process takes: int64 [samples of its epoch]."""
        positions = torch.arange(len(self))
        if not self.together:
            return positions * self.num_replicas + self.rank
        first = positions // self.together * self.together  # position at which the batch begins
        size = (len(self) - first).clamp(max=self.together)
        return first * self.num_replicas + self.rank * size + positions - first

    def __len__(self) -> int:
        return len(self.dataset) // GRANULE * GRANULE // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch


class EndlessSampler(Sampler[int]):
    """One shuffled pass over the data after another, cut into epochs of any length: training by steps.

    The passes follow each other without a seam: pass k is a permutation of the N images, drawn from `seed` + k, and
    entry p of process r in epoch e is entry (e S + p) R + r of that endless list.

    Args:
        dataset: anything with a length N.
        num_replicas: number of processes R.
        rank: this process r.
        samples: S, of each process in an epoch.
        seed: equal on all processes.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, samples: int, seed: int = 0) -> None:
        _check_rank(num_replicas, rank)
        self.dataset = dataset
        self.num_replicas, self.rank = num_replicas, rank
        self.samples, self.seed = samples, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        number, order = -1, torch.zeros(0, dtype=torch.long)
        first, end = (epoch * self.samples * self.num_replicas for epoch in (self.epoch, self.epoch + 1))
        for entry in range(first + self.rank, end, self.num_replicas):
            if entry // count != number:
                number = entry // count
                order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + number))
            yield int(order[entry % count])

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        """Choose which part of the list the next pass takes."""
        self.epoch = epoch


class Draw(NamedTuple):
    """One sample of an epoch: which image, and everything that its random numbers may depend on.

    Attributes:
        image: its index in the data set.
        position: of the sample in the epoch of the process that trains on it, from 0.
        made: its position among those that this process makes, from 0.
        entropy: (seed, epoch, position over all processes), for numpy's SeedSequence; different for any two
            samples of a run, also for copies of one image and on different processes.
    """

    image: int
    position: int
    made: int
    entropy: tuple[int, int, int]


class ResumableSampler(Sampler[Draw]):
    """The samples of another sampler, in its order, ready to be seeded one by one, from any position on.

    The sample at position p of process r of R stands at p R + r over all processes, as the samplers deal them out;
    with an RASampler at its entry of the stretched list, which is the same unless copies stay together.

    Args:
        order: draws the indices, from its seed and epoch; `num_replicas`, `rank` and `seed` are read from it.
    """

    def __init__(self, order: RASampler | EndlessSampler | DistributedSampler[Any]) -> None:
        self.order = order
        self.start = 0

    def __iter__(self) -> Iterator[Draw]:
        seed, epoch, replicas, rank = self.order.seed, self.order.epoch, self.order.num_replicas, self.order.rank
        start, self.start = self.start, 0
        if isinstance(self.order, RASampler):
            places: Iterable[int] = self.order.places().tolist()
        else:
            places = range(rank, replicas * len(self), replicas)
        handed_over = isinstance(self.order, RASampler) and self.order.handed_over
        return (
            Draw(image, place // replicas if handed_over else made, made, (seed, epoch, place))
            for made, (image, place) in islice(enumerate(zip(self.order, places, strict=True)), start, None)
        )

    def __len__(self) -> int:
        """The samples of the whole epoch, wherever the next pass starts."""
        return len(self.order)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the passes to come, and the position at which the next one (only) starts.

        To continue an epoch after k batches of B samples, `start` is k B.

        Raises:
            ValueError: `start` is not a position in the epoch, nor its end.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"an epoch of {len(self)} samples cannot start at {start}")
        self.order.set_epoch(epoch)
        self.start = start


class ShardSampler(Sampler[int]):
    """Every sample exactly once over all processes: process r of R takes r, r + R, r + 2R, ..., unpadded.

    Shares differ by at most one sample, so sums must be reduced together with their counts.

    Args:
        dataset: anything with a length.
        num_replicas: number of processes R.
        rank: this process r.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        _check_rank(num_replicas, rank)
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _check_rank(num_replicas: int, rank: int) -> None:
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank {rank} is not one of {num_replicas} processes")
