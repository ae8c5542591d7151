"""What happens to an image and its mask: bytes [C, h, w] and classes [h, w] for training, whole images for tests.

The recipe is the one that UperNet was trained with (mmsegmentation's): resize, crop, flip, distort colours, pad.
torchvision.transforms.v2 does all but the choice of the crop and three operations on colours, which it defines
otherwise; they are said below. All random numbers are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from images.transforms import of_channels
from segmentation.masks import IGNORED

BILINEAR = v2.InterpolationMode.BILINEAR
CROP_TRIES = 10  # crops drawn after the first one, at most
MOST_OF_ONE_CLASS = 0.75  # of a crop's labelled pixels; as many or more, and it is drawn again
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Recipe(NamedTuple):
    """How the images of one data set are resized, cropped and changed.

    Attributes:
        crop: height and width of a training crop.
        train_fit: longer and shorter side that images are resized to fit, times `ratios`; None: they are not.
        test_fit: the same for tests, times 1.
        ratios: the smallest and largest factor.
        flip: how often images are mirrored.
        distort: whether colours are distorted.
    """

    crop: tuple[int, int]
    train_fit: tuple[int, int] | None
    test_fit: tuple[int, int] | None
    ratios: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    distort: bool = True


RECIPES: Mapping[str, Recipe] = {
    "ADE20K": Recipe((512, 512), (2048, 1024), (2048, 512)),
    "CITYSCAPES": Recipe((1025, 1025), (2049, 1025), (2049, 1025)),
    "VOC": Recipe((512, 512), (2048, 512), (2048, 512)),
    "FOLDER": Recipe((512, 512), (2048, 512), (2048, 512)),
    # Enlarged a little and cropped; a mirrored digit is another symbol, and ink has no colour
    "DIGITS": Recipe((64, 64), (64, 64), None, ratios=(1.0, 1.25), flip=0.0, distort=False),
}


class Training:
    """The transform for training: PIL image RGB, uint8 [H, W] -> uint8 [C, h, w], uint8 [h, w], of the crop's size.

    Random resize, class-ratio crop, flip, photometric distortion, then padding on the right and at the bottom where
    the image is smaller than the crop: of the image with `mean`, so that it is 0 once normalised (to half a byte),
    of the mask with IGNORED.

    Args:
        recipe: see RECIPES.
        channels: 1 makes images grey, at the end.
        mean: the channels' mean colour, of 0 to 1.
    """

    def __init__(self, recipe: Recipe, channels: int = 3, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN) -> None:
        steps: list[Step] = [RandomFit(recipe.train_fit, recipe.ratios)] if recipe.train_fit is not None else []
        steps += [ClassRatioCrop(recipe.crop), v2.RandomHorizontalFlip(recipe.flip)]
        steps += [PhotometricDistortion()] if recipe.distort else []
        steps += [ToGrey()] if channels == 1 else []
        steps.append(PadTo(recipe.crop, of_channels(mean, channels)))
        self._steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels, labels = self._steps(to_tv_image(image), tv_tensors.Mask(torch.from_numpy(np.array(mask))))
        return pixels.as_subclass(Tensor).contiguous(), labels.as_subclass(Tensor).contiguous()


class Whole:
    """The transform for tests: PIL image RGB -> uint8 [C, h, w], whole, resized to fit. Masks stay as they are.

    Args:
        recipe: see RECIPES.
        channels: 1 makes images grey.
    """

    def __init__(self, recipe: Recipe, channels: int = 3) -> None:
        self.box, self.channels = recipe.test_fit, channels

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = to_tv_image(image)
        if self.box is not None:
            size = fitted(image.height, image.width, self.box)
            pixels = F.resize(pixels, list(size), BILINEAR, antialias=False)
        return (F.rgb_to_grayscale(pixels) if self.channels == 1 else pixels).as_subclass(Tensor)


def to_tv_image(image: Image.Image) -> tv_tensors.Image:
    """A PIL image as uint8 [C, H, W]."""
    return tv_tensors.Image(F.pil_to_tensor(image))


def fitted(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """The height and width of an image that keeps its shape and just fits into a box.

        s = min(long / max(H, W), short / min(H, W)),   (H, W) -> floor(s (H, W) + 1/2), at least 1

    Args:
        height, width: of the image.
        box: the most for its longer and for its shorter side.
    Source: mmcv's rescaling.
    """
    longer, shorter = max(box), min(box)
    scale = min(longer / max(height, width), shorter / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class RandomFit:
    """Resize an image and its mask to fit into a box that is multiplied by a random factor.

    v2.RandomResize draws the shorter side alone. Here the factor is uniform, and the longer side is bounded, too.
    Images are interpolated without antialiasing, as OpenCV does it; masks take the nearest pixel.

    Args:
        box: longer and shorter side.
        ratios: smallest and largest factor.
    """

    def __init__(self, box: tuple[int, int], ratios: tuple[float, float]) -> None:
        self.box, self.ratios = box, ratios

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        factor = uniform(*self.ratios)
        box = int(self.box[0] * factor), int(self.box[1] * factor)
        height, width = mask.shape
        size = list(fitted(height, width, box))
        return F.resize(image, size, BILINEAR, antialias=False), F.resize(mask, size)


class ClassRatioCrop:
    """Crop at random; again, up to ten times, if one class covers 75 % or more of the labelled pixels.

    The eleventh crop is taken as it is. A crop in which nothing is labelled, or one class alone, is drawn again,
    too. Where the image is smaller than the crop, all of that side is taken.

    Args:
        size: height and width.
    Source: mmsegmentation's `cat_max_ratio`.
    """

    def __init__(self, size: tuple[int, int], most: float = MOST_OF_ONE_CLASS, tries: int = CROP_TRIES) -> None:
        self.size, self.most, self.tries = size, most, tries

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        sides = zip(self.size, mask.shape[-2:], strict=True)
        crop = v2.RandomCrop([min(side, all_of_it) for side, all_of_it in sides])
        pixels, labels = crop(image, mask)
        for _ in range(self.tries):
            if self.is_mixed(labels):
                break
            pixels, labels = crop(image, mask)
        return pixels, labels

    def is_mixed(self, labels: Tensor) -> bool:
        """Whether every class covers less than 75 % of the labelled pixels."""
        counts = torch.bincount(labels.flatten(), minlength=IGNORED + 1)[:IGNORED]
        return bool(counts.max() < self.most * counts.sum())


class PhotometricDistortion:
    """Distort an image's colours; the mask stays. Bytes RGB [3, H, W] in and out, cut to 0..255 after each step.

        brightness   x + b,  b in [-32, 32]
        contrast     x c,  c in [0.5, 1.5];  either here or at the end, with probability 1/2
        saturation   V - k (V - x),  k = min(a, 1 / S),  a in [0.5, 1.5]: S becomes a S at most 1; H and V stay
        hue          turned by h / 180 of the circle, h a whole number in [-18, 17]

    Each is done with probability 1/2. V = max(x) over the channels and S = 1 - min(x) / V are those of HSV.

    v2.RandomPhotometricDistort has other operations under these names: its brightness is a factor, its contrast
    and saturation are distances from a grey, and it may swap channels. So contrast is v2's `adjust_brightness`,
    hue its `adjust_hue`, and brightness and saturation are written out. OpenCV rounds hue to 180 and saturation to
    256 steps on the way; here they are not rounded.

    Source: Liu et al. 2016 (SSD); mmsegmentation's form.
    """

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if coin():
            image = _to_bytes(image, image.to(torch.float32) + uniform(-32, 32))
        contrast_first = coin()
        if contrast_first and coin():
            image = F.adjust_brightness(image, uniform(0.5, 1.5))
        if coin():
            image = saturated(image, uniform(0.5, 1.5))
        if coin():
            image = F.adjust_hue(image, int(torch.randint(-18, 18, ())) / 180)
        if not contrast_first and coin():
            image = F.adjust_brightness(image, uniform(0.5, 1.5))
        return image, mask


def saturated(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, at most to 1; uint8 [3, H, W]."""
    pixels = image.as_subclass(Tensor).to(torch.float32)
    value, low = pixels.amax(dim=0), pixels.amin(dim=0)  # [H, W]
    factors = (value / (value - low).clamp(min=1)).clamp(max=factor)  # 1 / S; where x is grey any does
    return _to_bytes(image, (value - factors * (value - pixels)).round())


def _to_bytes(like: Tensor, pixels: Tensor) -> Tensor:
    return tv_tensors.wrap(pixels.as_subclass(Tensor).clamp(0, 255).to(torch.uint8), like=like)


class ToGrey:
    """Make an image grey, [1, H, W]."""

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return F.rgb_to_grayscale(image), mask


class PadTo:
    """Pad an image and its mask on the right and at the bottom; v2.RandomCrop would pad all sides.

    Args:
        size: height and width, at least.
        mean: the colour, of 0 to 1, for each channel.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float]) -> None:
        self.size = size
        self.fill = [round(255 * each) for each in mean]

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        bottom, right = (max(0, side - own) for side, own in zip(self.size, mask.shape[-2:], strict=True))
        if not bottom and not right:
            return image, mask
        padding = [0, 0, right, bottom]
        return F.pad(image, padding, fill=self.fill), F.pad(mask, padding, fill=IGNORED)


# ------------------------------------------------------------------------------------------------------------
# Draws


def coin() -> bool:
    return bool(torch.rand(()) < 0.5)


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
