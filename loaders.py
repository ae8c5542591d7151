"""Batches: from decoded images to float32 [B, C, H, W] on the device, in an order that can be continued anywhere.

The pixels of a training sample depend on the image, `--seed`, the epoch and the sample's position in it, and on
nothing else: SeededDataset seeds python, numpy and torch for each. Neither the number of workers nor a restart in
the middle of an epoch changes a batch, and the process's global random state is not touched.

Workers decode, crop and augment, and hand over bytes and the boxes of random erasing (Batch). DeviceLoader copies
these to the device, normalises and erases there.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence, Sized
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler, SequentialSampler, default_collate

import utils
from datasets import Example, LabelledImages
from errors import UserError, shown
from exchange import Exchange
from images.decode import ImageError
from images.found import Sample, digest
from images.transforms import Erasing, Preprocessing, preprocessing
from options.flags import Args
from samplers import Draw, RASampler, ResumableSampler, ShardSampler
from utils import keep_random_state, seed_generators
from workers import SteadyLoader, default_workers

BAD_IN_A_ROW = 10  # --skip-bad-images gives up after so many
MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)


# ------------------------------------------------------------------------------------------------------------
# Samples that depend on seed, epoch and position alone


class Examples(Protocol):
    """What can be trained on: images and what belongs to each, decoded by index, then made into an example.

    Attributes:
        samples: for `images.found.digest`.
    """

    @property
    def samples(self) -> Sequence[Sample]: ...

    def __len__(self) -> int: ...

    def decode(self, index: int) -> tuple[Any, int]:
        """What is decoded, and a label; an ImageError if that cannot be."""

    def example(self, decoded: Any, label: int) -> tuple[Tensor, int | Tensor]:
        """An image uint8 [C, H, W], and its label or mask, by random numbers that are seeded before."""


class SeededDataset(Dataset[Example]):
    """A training set whose samples are asked for by Draw: the same Draw gives the same pixels, in any process.

    Args:
        dataset: decodes images by index, and transforms them.
        erase: draws the boxes of random erasing, or None.
        skip_bad: replace an image that raises ImageError by the next one that can be read (after the last comes the
            first), and name each once on stderr. Else the error is passed on, with advice.
        positions: samples of this process in an epoch.

    Attributes:
        replaced: bool [positions], which samples that this process makes in the running epoch stand in for a bad
            image. Workers set it.
    """

    def __init__(
        self, dataset: Examples, erase: Erasing | None = None, skip_bad: bool = False, positions: int = 0
    ) -> None:
        self.dataset = dataset
        self.erase = erase
        self.skip_bad = skip_bad
        # In memory that this process shares with the loader's workers
        self.replaced = torch.zeros(positions if skip_bad else 0, dtype=torch.bool).share_memory_()
        self._named = torch.zeros(len(dataset) if skip_bad else 0, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Example:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Example]:
        """The samples of a batch, each (image uint8 [C, H, W], label, boxes); copies in a row are decoded once.

        Raises:
            ImageError: an image cannot be decoded; with `skip_bad`, nor can the BAD_IN_A_ROW - 1 after it.
        """
        examples: list[Example] = []
        with keep_random_state():
            for index, run in groupby(draws, key=lambda draw: draw.image):
                copies = list(run)
                decoded, label = self._decode(index, [draw.made for draw in copies])
                for draw in copies:
                    seed_generators(draw.entropy)
                    image, target = self.dataset.example(decoded, label)
                    boxes = self.erase(image.shape, draw.position) if self.erase is not None else []
                    examples.append((image, target, boxes))
        return examples

    def _decode(self, index: int, made: list[int]) -> tuple[Any, int]:
        """The image that the samples `made` ask for, or the one that stands in for it, and its label."""
        try:
            return self.dataset.decode(index)
        except ImageError as error:
            if not self.skip_bad:
                raise ImageError(f"{error}, or give --skip-bad-images") from error
            self.replaced[made] = True
            return self._decode_next(index, error)

    def _decode_next(self, index: int, error: ImageError) -> tuple[Any, int]:
        """The first image after a bad one that can be read."""
        for _ in range(1, BAD_IN_A_ROW):
            self._name(index, error)
            index = (index + 1) % len(self)
            try:
                return self.dataset.decode(index)
            except ImageError as another:
                error = another
        raise ImageError(f"--skip-bad-images gives up after {BAD_IN_A_ROW} bad images in a row: {error}") from error

    def _name(self, index: int, error: ImageError) -> None:
        if not self._named[index]:
            self._named[index] = True
            warning = f"warning: {error}. The next one that can be read takes its place"
            print(shown(warning, 1000), file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# From samples to batches on the device


class Batch(NamedTuple):
    """What workers hand over.

    Attributes:
        images: uint8 [B, C, H, W], in memory pixel by pixel (channels last).
        labels: int64 [B], or masks uint8 [B, H, W].
        boxes: int64 [n, 5], what is erased of the whole batch: image, top, left, height, width.
        noise: float32 [m], what is put there: C x height x width numbers of each box, one box after the other.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    noise: Tensor


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of samples."""
    images, labels, boxes = zip(*examples, strict=True)
    pixels = default_collate([image.permute(1, 2, 0) for image in images])  # [B, H, W, C]; shared, in a worker
    placed = [(number, box) for number, drawn in enumerate(boxes) for box in drawn]
    rows = [[number, box.top, box.left, *box.noise.shape[1:]] for number, box in placed]
    return Batch(
        pixels.permute(0, 3, 1, 2),
        default_collate(list(labels)),
        torch.tensor(rows, dtype=torch.int64).view(-1, 5),
        torch.cat([torch.zeros(0), *(box.noise.flatten() for _, box in placed)]),
    )


def normalise(pixels: Tensor, mean: Tensor = MEAN, std: Tensor = STD) -> Tensor:
    """uint8 [..., C, H, W] to float32, by mean and deviation; on the CPU torchvision's very bits."""
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


def erase(images: Tensor, boxes: Tensor, noise: Tensor) -> None:
    """Put the noise of each box (see Batch) into images [B, C, H, W], in place; `boxes` is in host memory."""
    start = 0
    channels = images.shape[1]
    for number, top, left, height, width in boxes.tolist():
        size = channels * height * width
        box = noise[start : start + size].view(channels, height, width)
        images[number, :, top : top + height, left : left + width] = box
        start += size


class DeviceLoader:
    """Batches of a loader on the device: images float32 [B, C, H, W], normalised and erased, and labels [B].

    On CUDA the next batch is copied and prepared on a stream of its own, while the one before it is in use.

    Args:
        loader: yields Batches.
        device: where they go.
        exchange: hands samples over between processes, once they are there.
        colours: what holds the channels' mean and deviation, by default ImageNet's.
    """

    def __init__(
        self,
        loader: SteadyLoader,
        device: torch.device,
        exchange: Exchange | None = None,
        colours: Preprocessing | None = None,
    ) -> None:
        self.loader = loader
        self.device = device
        self.exchange = exchange
        self._mean, self._std = MEAN.to(device), STD.to(device)
        if colours is not None:
            self._mean, self._std = torch.tensor([colours.mean, colours.std], device=device)[..., None, None]

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def batch_size(self) -> int:
        """The number of images in every batch but perhaps the last."""
        return int(self.loader.batch_size or 1)

    @property
    def batch_sizes(self) -> list[int]:
        """The numbers of images that its batches have: the usual one, and perhaps that of the last batch."""
        assert isinstance(self.loader.sampler, Sized)
        samples, usual = len(self.loader.sampler), self.batch_size
        sizes = [usual] if samples >= usual else []
        return sizes if self.loader.drop_last or samples % usual == 0 else [*sizes, samples % usual]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        return self._ahead(batches) if self.device.type == "cuda" else map(self._place, batches)

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels, labels, noise = (
            tensor.to(self.device, non_blocking=self.device.type == "cuda")
            for tensor in (batch.images, batch.labels, batch.noise)
        )
        images = normalise(pixels, self._mean, self._std)
        erase(images, batch.boxes, noise)
        return (images, labels) if self.exchange is None else (self.exchange(images), self.exchange(labels))

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Place each batch before the one before it is handed over."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which made the mean and deviation
        placed: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()
        for batch in batches:
            with torch.cuda.stream(stream):
                placed.append((*self._place(batch), stream.record_event()))
            if len(placed) == 2:
                yield self._hand_over(*placed.popleft())
        while placed:
            yield self._hand_over(*placed.popleft())

    def _hand_over(self, images: Tensor, labels: Tensor, ready: torch.cuda.Event) -> tuple[Tensor, Tensor]:
        """Let the current stream wait for a batch, and keep its memory until that stream is done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for tensor in (images, labels):
            tensor.record_stream(current)
        return images, labels


class TrainLoader(DeviceLoader):
    """A DeviceLoader for training: an epoch can start anywhere, and counts the images that were replaced.

    Args:
        loader: reads `samples` in the order of `sampler`.
        device: where batches go.
        samples: the training set.
        sampler: which of them this process makes.
        exchange, colours: as in DeviceLoader.
    """

    def __init__(
        self,
        loader: SteadyLoader,
        device: torch.device,
        samples: SeededDataset,
        sampler: ResumableSampler,
        exchange: Exchange | None = None,
        colours: Preprocessing | None = None,
    ) -> None:
        super().__init__(loader, device, exchange, colours)
        self._samples, self._sampler = samples, sampler

    @property
    def replaced(self) -> Tensor:
        """bool [samples of an epoch], which of the running one stand in for a bad image; empty if none may."""
        return self._samples.replaced

    def digest(self) -> str:
        """Tells another training set from this one; see `images.found.digest`. All processes must ask together."""
        return str(utils.broadcast_object(lambda: digest(self._samples.dataset.samples)))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the passes to come, and the sample at which the next one (only) starts.

        Raises:
            ValueError: `start` is not a position in the epoch, nor its end.
        """
        self._sampler.set_epoch(epoch, start)


# ------------------------------------------------------------------------------------------------------------
# Loaders


def build_train_loader(
    args: Args, dataset: LabelledImages, world_size: int, rank: int, device: torch.device
) -> TrainLoader:
    """This process's training batches: `--batch-size` images each, shuffled, the incomplete last one dropped.

    With repeated augmentation the processes of a group make neighbouring samples, and exchange them.

    Raises:
        UserError: the set is too small for one step, or for repeated augmentation.
    """
    order: RASampler | DistributedSampler[Any]
    exchange = None
    if args.repeated_aug:
        if world_size == utils.world_size() > 1 and not args.group_repeats:
            exchange = Exchange(args.batch_size, world_size, rank, device)
        together = args.batch_size if args.group_repeats or exchange is not None else 0
        order = RASampler(
            dataset, world_size, rank, seed=args.seed, together=together, handed_over=exchange is not None
        )
    else:
        order = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed)
    if len(order) < args.batch_size * args.grad_accum_steps:
        times = f" times --grad-accum-steps {args.grad_accum_steps}" if args.grad_accum_steps > 1 else ""
        raise UserError(
            f"each process sees {len(order)} training images per epoch, fewer than one batch of "
            f"{args.batch_size}{times}; give a smaller --batch-size"
        )
    boxes = None
    if args.reprob > 0:
        boxes = Erasing(args.reprob, args.remode, args.recount, args.batch_size if args.resplit else 0)
    samples = SeededDataset(dataset, boxes, args.skip_bad_images, len(order))
    sampler = ResumableSampler(order)
    options = {"batch_size": args.batch_size, "drop_last": True}
    loader = build_loader(args, samples, sampler, rank, device, **options)
    return TrainLoader(loader, device, samples, sampler, exchange, preprocessing(args))


def build_eval_loader(
    args: Args, dataset: LabelledImages, world_size: int, rank: int, device: torch.device
) -> DeviceLoader:
    """This process's evaluation batches: 1.5 times `--batch-size` images each, nothing dropped.

    With `--dist-eval` the processes share the set without overlap, else each sees all of it.

    Raises:
        UserError: the set is empty.
    """
    if len(dataset) == 0:
        raise UserError("the validation set has no images; check --data-path")
    shard = ShardSampler(dataset, world_size, rank) if args.dist_eval else SequentialSampler(dataset)
    loader = build_loader(args, dataset, shard, rank, device, batch_size=int(1.5 * args.batch_size))
    return DeviceLoader(loader, device, colours=preprocessing(args))


def build_loader(
    args: Args, dataset: Dataset[Any], sampler: Sampler[Any], rank: int, device: torch.device, **options: Any
) -> SteadyLoader:
    """A loader with a generator of its own, without which each pass would draw from the global one."""
    return SteadyLoader(
        dataset,
        seconds=args.dist_timeout,
        sampler=sampler,
        collate_fn=collate,
        num_workers=default_workers() if args.num_workers is None else args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed + rank),
        **options,
    )
