"""What happens to one decoded image: from any size to bytes [C, H, W], and the boxes that random erasing draws.

The recipe is DeiT's, from timm: random resized crop, RandAugment, random erasing. Normalising the bytes and filling
the boxes is left to the device (see loaders.DeviceLoader), so that a loader's workers handle a quarter of the data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from errors import UserError
from images import three_augment
from images.decode import ImageError
from options.flags import CROP_MODES, INTERPOLATIONS, Args, sides

SMALL_INPUT = 32  # up to this size images are cropped with padding, not rescaled
POSTERIZE_OPS = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
CROP_PCT = 224 / 256  # DeiT's


class Preprocessing(NamedTuple):
    """What a model takes images to have gone through, in timm's words.

    Attributes:
        mean, std: by which the channels are normalised, of 0 to 1.
        crop_pct: evaluation: the side of the crop, as a share of the resized image.
        crop_mode: 'center' resizes the shorter side, 'squash' both.
        interpolation: how evaluation resizes.
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop_pct: float
    crop_mode: str
    interpolation: str

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """What an image is resized to, so that a crop of that height and width can be taken from it."""
        height, width = size
        return int(height / self.crop_pct), int(width / self.crop_pct)

    @property
    def colours(self) -> str:
        return f"mean {_spaced(self.mean)}, std {_spaced(self.std)}"

    def __str__(self) -> str:
        return f"{self.colours}, crop {self.crop_pct:g} {self.crop_mode} {self.interpolation}"


def preprocessing(args: Args) -> Preprocessing:
    """What the flags say, and where they say nothing DeiT's: ImageNet's colours, crop 0.875, bicubic.

    Up to 32 pixels all of the image is brought to that size instead. Grey images have one mean, by default the mean
    of the three.

    Raises:
        UserError: a flag has a value that cannot be used.
    """
    small = max(sides(args.input_size)) <= SMALL_INPUT
    _check_numbers("--mean", args.mean, args.in_chans)
    _check_numbers("--std", args.std, args.in_chans)
    if args.std is not None and min(args.std) <= 0:
        raise UserError(f"--std {_spaced(args.std)} has a deviation that is not positive: images are divided by it")
    for flag, value, known in (
        ("--crop-mode", args.crop_mode, CROP_MODES),
        ("--interpolation", args.interpolation, ("bilinear", "bicubic") if args.fast_resize else INTERPOLATIONS),
    ):
        if value is not None and value not in known:
            resizer = " with --fast-resize" if args.fast_resize else ""
            raise UserError(f"{flag} {value} cannot be used{resizer}; use {', '.join(known)}")
    return Preprocessing(
        of_channels(IMAGENET_DEFAULT_MEAN if args.mean is None else args.mean, args.in_chans),
        of_channels(IMAGENET_DEFAULT_STD if args.std is None else args.std, args.in_chans),
        args.crop_pct or (1.0 if small else CROP_PCT),
        args.crop_mode or ("squash" if small else "center"),
        args.interpolation or "bicubic",
    )


def of_channels(numbers: Sequence[float], channels: int) -> tuple[float, ...]:
    """A number for each channel: one number holds for all, and those of colours become one of grey, their mean."""
    if len(numbers) == channels:
        return tuple(numbers)
    return (math.fsum(numbers) / len(numbers),) * channels


def _check_numbers(flag: str, numbers: Sequence[float] | None, channels: int) -> None:
    if numbers is not None and not (len(numbers) in (1, channels) and all(map(math.isfinite, numbers))):
        three = ", or three, of red, green and blue" if channels == 3 else " with --in-chans 1"
        raise UserError(f"{flag} {_spaced(numbers)} cannot be used: it takes one number{three}")


def _spaced(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def build_transform(is_train: bool, args: Args) -> transforms.Compose:
    """DeiT's transform up to the bytes: PIL image -> uint8 [C, H, W], of `--input-size`.

    Training: random resized crop, horizontal flip (not for digits: a mirrored one is another symbol), `--aa`,
    which switches colour jitter off, as in timm, else colour jitter; or `--ThreeAugment`.
    Evaluation: what `preprocessing` says, in DeiT the shorter side to int(256/224 S), bicubic; centre crop.
    Up to 32 pixels training brings all images to H x W (nothing to do for CIFAR at 32), then crops randomly out of
    4 pixels of padding.
    With `--in-chans 1` evaluation begins with the grey of the image, as timm does, and training ends with it.

    With `--fast-resize` it starts from bytes [3, H, W] instead, what `to_bytes` makes of the PIL image.

    Raises:
        UserError: a flag has a value that cannot be used.
    """
    grey: list[Any] = [transforms.Grayscale()] if args.in_chans == 1 else []
    if not is_train:
        steps = grey + _evaluation_steps(args)
        return transforms.Compose(steps if args.fast_resize else [*steps, transforms.PILToTensor()])
    first, *steps, last = _three_augment(args) if args.three_augment else _train_transform(args).transforms
    return transforms.Compose([*_training_crop(args, first), *steps, *grey, last])


def _training_crop(args: Args, timms: Any) -> list[Any]:
    """What brings an image to H x W for training, and makes a PIL image of bytes.

    Args:
        timms: timm's random resized crop.
    """
    size, resize = sides(args.input_size), _resizer(args)
    to_pil = [transforms.Lambda(to_image)] if args.fast_resize else []
    if args.src:
        mode = transforms.InterpolationMode(args.train_interpolation)
        square = size[0] == size[1]
        covering = resize(size[:1], mode) if square else ResizeKeepRatio(size, interpolation=mode.value)
        return [covering, *to_pil, transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    if max(size) <= SMALL_INPUT and not args.three_augment:
        whole = resize(size, transforms.InterpolationMode.BICUBIC)
        return [whole, *to_pil, transforms.RandomCrop(size, padding=4)]
    return [FastCrop(timms.size, timms.scale, timms.ratio, args.train_interpolation)] if to_pil else [timms]


def _resizer(args: Args) -> type[Any]:
    """What resizes PIL images, or bytes; the latter resamples with torch."""
    kind: type[Any] = v2.Resize if args.fast_resize else transforms.Resize
    return kind


def _evaluation_steps(args: Args) -> list[Any]:
    """Resize and crop, as timm does for evaluation."""
    crop, size = preprocessing(args), sides(args.input_size)
    resized, mode = crop.resized(size), transforms.InterpolationMode(crop.interpolation)
    if crop.crop_mode == "squash":
        first = _resizer(args)(resized, mode)
        return [first] if resized == size else [first, transforms.CenterCrop(size)]
    if resized[0] != resized[1]:
        return [ResizeKeepRatio(resized, interpolation=crop.interpolation), transforms.CenterCrop(size)]
    return [_resizer(args)(resized[:1], mode), transforms.CenterCrop(size)]


def resized_pixels(width: int, height: int, size: tuple[int, int], crop: Preprocessing) -> int:
    """How many pixels the largest picture on the way from width x height to `--input-size` has.

    That is the evaluation's: a training crop is never longer than 4/3 of its width, or 4/3 of its height. Where
    both sides are resized, the rows are first.
    """
    rows, columns = crop.resized(size)
    if crop.crop_mode == "squash":
        return columns * max(rows, height)
    if rows == columns:
        return rows * int(rows * max(width, height) / min(width, height))
    ratio = min(height / rows, width / columns)
    return round(height / ratio) * round(width / ratio)


def check_sides(
    name: Callable[[], str], width: int, height: int, size: tuple[int, int], crop: Preprocessing
) -> None:
    """Refuse an image so thin that resizing it, as `build_transform` does, would take gigabytes.

    Args:
        name: what to call the image; asked only if it is refused, since all of an array would be written out.
    Raises:
        ImageError: the resized image would have more pixels than Pillow's MAX_IMAGE_PIXELS.
    """
    pixels = resized_pixels(width, height, size, crop)
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"cannot decode image {name()}: it is too thin, {width} x {height}: resized for --input-size "
            f"{_sides(size)} it would have {pixels} pixels, over the limit of {Image.MAX_IMAGE_PIXELS}; repair or "
            "remove the file"
        )


def _sides(size: tuple[int, int]) -> str:
    height, width = size
    return str(height) if height == width else f"{height} {width}"


def _train_transform(args: Args) -> transforms.Compose:
    """timm's training transform for a loader that normalises later; its random crop comes first."""
    policy = None if (args.aa or "none").lower() == "none" else args.aa
    _check_augmentation(args, policy)
    auto_augment.NAME_TO_OP.update(dict.fromkeys(POSTERIZE_OPS, posterize))
    try:
        transform = create_transform(
            sides(args.input_size),
            is_training=True,
            use_prefetcher=True,
            hflip=0.0 if args.data_set == "DIGITS" else 0.5,
            color_jitter=args.color_jitter,
            auto_augment=policy,
            interpolation=args.train_interpolation,
        )
    except (AssertionError, LookupError, ValueError) as error:
        raise UserError(
            f"--aa {args.aa} is not an augmentation timm knows ({error!r}); "
            "use for example rand-m9-mstd0.5-inc1, augmix-m3, original or none"
        ) from error
    transform.transforms[-1] = transforms.PILToTensor()  # timm's own varies with its version
    return transform


def _three_augment(args: Args) -> list[Any]:
    """DeiT III's training transform, a random resized crop first."""
    _check_augmentation(args, None)
    crop = RandomResizedCropAndInterpolation(sides(args.input_size), interpolation=args.train_interpolation)
    flip = [] if args.data_set == "DIGITS" else [transforms.RandomHorizontalFlip()]
    return [crop, *flip, *three_augment.operations(args.color_jitter), transforms.PILToTensor()]


def _check_augmentation(args: Args, policy: str | None) -> None:
    """Refuse what timm would refuse without naming the flag, or only in the middle of an epoch."""
    resampling = ["random", "nearest", "bilinear", "bicubic"]
    if policy is None:
        resampling += ["box", "hamming", "lanczos"]  # Pillow cannot rotate or shear with these
    if args.fast_resize:
        resampling = ["random", "bilinear", "bicubic"]  # torch resamples bytes with these alone
    if args.src:
        resampling.remove("random")
    choices = ", ".join(resampling)
    if args.train_interpolation not in resampling:
        raise UserError(f"--train-interpolation {args.train_interpolation} cannot be used; use {choices}")
    if args.remode.lower() not in ("const", "rand", "pixel"):
        raise UserError(f"--remode {args.remode} cannot fill an erased box; use const, rand or pixel")
    if not 0 <= args.reprob <= 1:
        raise UserError(f"--reprob {args.reprob} is not a probability; give a number from 0 to 1")
    if args.recount < 1:
        raise UserError(f"--recount {args.recount} erases nothing; give at least 1, or --reprob 0")
    if args.color_jitter is not None and args.color_jitter < 0:
        raise UserError(f"--color-jitter {args.color_jitter} is negative; give 0 for none")


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the `bits` highest bits of each channel; none leave black.

    At magnitude 10 timm asks for 0 bits, and beyond for fewer. Pillow drew that black until version 13 made
    it an error. This replaces timm's operation in its table of operations by name; Pillow is left alone.
    """
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


# ------------------------------------------------------------------------------------------------------------
# --fast-resize: torch resamples instead of Pillow


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W], in memory pixel by pixel (channels last)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """The inverse of `to_bytes`."""
    height, width = pixels.shape[1:]
    return Image.frombytes("RGB", (width, height), pixels.permute(1, 2, 0).contiguous().numpy())


class FastCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, with its draws, of bytes [3, H, W]; the result is a PIL image.

    Antialiased like Pillow's: near, but not always the same bytes. torchvision's resized_crop gives these bytes,
    too, but takes half as long again: it resamples the crop where it lies in the image.
    """

    def __call__(self, img: Tensor) -> Image.Image:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        height, width = max(height, 1), max(width, 1)  # of the smallest images timm may draw nothing,
        top, left = (
            min(top, img.shape[1] - height),
            min(left, img.shape[2] - width),
        )  # beyond the last row or column
        modes = self.interpolation if isinstance(self.interpolation, tuple) else (self.interpolation,)
        mode = random.choice(modes) if len(modes) > 1 else modes[0]
        crop = img[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        return to_image(F.interpolate(crop, size=tuple(self.size), mode=mode.value, antialias=True)[0])


# ------------------------------------------------------------------------------------------------------------
# Random erasing: drawn here, done on the device


class Box(NamedTuple):
    """Pixels to be replaced after normalising: `noise` [C, h, w] from row `top` and column `left` on."""

    top: int
    left: int
    noise: Tensor


class _Notes:
    """Takes the place of an image [C, H, W] in timm's RandomErasing, and notes what the image should become."""

    dtype = torch.float32

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape
        self.boxes: list[Box] = []

    def size(self) -> Sequence[int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = place
        noise = noise.expand(-1, rows.stop - rows.start, columns.stop - columns.start)
        self.boxes.append(Box(rows.start, columns.start, noise))


class Erasing:
    """timm's random erasing, drawn from the same random streams, but not yet done.

    Args:
        probability, mode, max_count: as `--reprob`, `--remode` and `--recount`.
        batch_size: `--resplit`: of each batch of that many the first half, up to B // 2, stays whole. 0: none does.
    """

    def __init__(self, probability: float, mode: str, max_count: int, batch_size: int = 0) -> None:
        self.batch_size = batch_size
        self._draw = RandomErasing(probability, mode=mode, max_count=max_count, device="cpu")

    def __call__(self, shape: Sequence[int], position: int) -> list[Box]:
        """The boxes of an image of shape (C, H, W) that is sample `position` of its process's epoch."""
        if self.batch_size and position % self.batch_size < self.batch_size // 2:
            return []
        notes = _Notes(shape)
        self._draw(notes)
        return notes.boxes
