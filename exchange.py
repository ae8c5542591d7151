"""Samples change hands between processes: each is made where it is cheap, and used where the sampler wants it.

Repeated augmentation sends the copies of an image to different processes. If each of them made its own, an image
would be decoded once for every copy. So each process makes neighbouring samples, with all copies of an image, and
hands them over. Which process trains on which pixels, and in which order, does not change.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """From the samples that a process made of a global batch to those that it trains on.

    Of a batch of B R samples over all processes, process r has made r B, ..., (r + 1) B - 1, and gets r, r + R,
    r + 2 R, ..., in this order. All processes must call it equally often.

    Args:
        batch_size: of each process, B.
        world_size: number of processes R, which is the process group's.
        rank: this process r.
        device: where the samples are.
    """

    def __init__(self, batch_size: int, world_size: int, rank: int, device: torch.device) -> None:
        everyone = torch.arange(batch_size * world_size).view(world_size, batch_size) % world_size  # who gets what
        self._order = everyone[rank].argsort(stable=True).to(device)  # [B], by who gets them
        self._sent = everyone[rank].bincount(minlength=world_size).tolist()  # to each process
        self._received = (everyone == rank).sum(dim=1).tolist()  # from each process

    def __call__(self, samples: Tensor) -> Tensor:
        """Hand over samples [B, ...], and return those that come back.

        On CUDA nothing waits for the device: how many samples go where is known beforehand.
        """
        received = torch.empty_like(samples)
        dist.all_to_all_single(received, samples[self._order], self._received, self._sent)
        return received
