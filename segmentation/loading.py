"""Batches of crops to train on, and of whole images to evaluate."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import SequentialSampler

from errors import UserError
from images.transforms import preprocessing
from loaders import DeviceLoader, SeededDataset, TrainLoader, build_loader
from samplers import EndlessSampler, ResumableSampler, ShardSampler
from segmentation.images import SegmentedImages
from segmentation.settings import Settings


def build_train_loader(
    args: Settings, images: SegmentedImages, world_size: int, rank: int, device: torch.device
) -> TrainLoader:
    """This process's crops: `--batch-size` each, one shuffled pass over the images after another.

    Raises:
        UserError: there are no images.
    """
    if len(images) == 0:
        raise UserError("the training half has no images; check --data-path")
    per_epoch = args.eval_interval * args.batch_size * args.grad_accum_steps
    order = EndlessSampler(images, world_size, rank, per_epoch, args.seed)
    samples = SeededDataset(images, None, args.skip_bad_images, per_epoch)
    sampler = ResumableSampler(order)
    options: dict[str, Any] = {"batch_size": args.batch_size, "drop_last": True}
    loader = build_loader(args, samples, sampler, rank, device, **options)
    return TrainLoader(loader, device, samples, sampler, None, preprocessing(args))


def build_eval_loader(
    args: Settings, images: SegmentedImages, world_size: int, rank: int, device: torch.device
) -> DeviceLoader:
    """This process's evaluation images, one in a batch; with `--dist-eval` the processes share them.

    Raises:
        UserError: there are no images.
    """
    if len(images) == 0:
        raise UserError("the evaluation half has no images; check --data-path")
    shard = ShardSampler(images, world_size, rank) if args.dist_eval else SequentialSampler(images)
    return DeviceLoader(
        build_loader(args, images, shard, rank, device, batch_size=1), device, None, preprocessing(args)
    )
