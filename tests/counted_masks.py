"""Each process counts its share of some random masks, and the main one writes what all have counted together."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from segmentation.scores import Confusion
from utils import find_launch, init_distributed, is_main

CLASSES, IMAGES = 4, 7


def masks(number: int) -> tuple[Tensor, Tensor]:
    """What is predicted for an image, and what is true; sizes differ."""
    generator = torch.Generator().manual_seed(number)
    size = (5 + number, 11 - number)
    predicted, mask = (torch.randint(CLASSES, size, generator=generator, dtype=torch.uint8) for _ in range(2))
    mask[0] = 255
    return predicted, mask


def main() -> None:
    launch = find_launch()
    init_distributed(launch, torch.device("cpu"))
    scores = Confusion([str(number) for number in range(CLASSES)])
    for number in range(launch.rank, IMAGES, launch.world_size):
        scores.add(*masks(number))
    result = scores.result()
    if is_main():
        torch.save((result.iou, result.accuracy, result.pixels, result.all_accuracy), sys.argv[1])
    if launch.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
