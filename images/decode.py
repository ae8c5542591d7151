"""From the bytes of a file to an RGB image."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import IO, TypeVar

from PIL import Image, UnidentifiedImageError

from errors import LocalError
from images.depth import UnknownPixels, check_format, to_grey

Made = TypeVar("Made")


class ImageError(LocalError):
    """An image file that cannot be decoded; the message names it.

    A DataLoader worker's exception is rebuilt in the main process as `type(error)(traceback)`, a text that
    ends in 'images.decode.ImageError: message'. The constructor keeps the message alone, so it reads the same from
    a worker as from the main process.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.ImageError: ")[2].strip())


def load_image(path: str) -> Image.Image:
    """Decode an image file, whatever its name ends in, to RGB.

    Grey, palette and CMYK images are converted; transparency is dropped; of more than 8 bits the upper 8 are kept
    (Pillow alone would clip them to white); floats in [0, 1] are scaled by 255. EXIF is ignored, so that a photo
    marked as rotated stays as it is stored, as in torchvision.

    Raises:
        ImageError: the file is missing, empty, truncated, otherwise damaged or no image, claims more than twice
            Pillow's MAX_IMAGE_PIXELS, is no regular file, or what its pixels mean cannot be known (see depth.py).
    """
    return read_file(path, _to_rgb)


def read_file(path: str, convert: Callable[[Image.Image], Made]) -> Made:
    """What `convert` makes of an image file that Pillow has opened, but not yet decoded.

    Raises:
        ImageError: as in `load_image`, and whatever `convert` raises as UnknownPixels or like Pillow.
    """
    return _decode(lambda: open(path, "rb", opener=_open_regular), path, convert)


def _open_regular(path: str, flags: int) -> int:
    """A file descriptor; pipes and devices, which could be waited for without end, are refused."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("this is no regular file")
    return descriptor


def decode(open_file: Callable[[], IO[bytes]], name: str) -> Image.Image:
    """The RGB image in an open file, as `load_image` reads it from a path."""
    return _decode(open_file, name, _to_rgb)


def _decode(open_file: Callable[[], IO[bytes]], name: str, convert: Callable[[Image.Image], Made]) -> Made:
    try:
        with open_file() as file:
            return convert(Image.open(file))
    except UnknownPixels as error:
        raise ImageError(
            f"cannot decode image {name}: {error}; convert it to 8 bits a channel or remove the file"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"cannot decode image {name}: {reason}; repair or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    check_format(image)
    if image.mode == "RGB":
        image.load()  # `convert` would copy it
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = to_grey(image)
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow knows no direct way
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns about the direct way
    return image.convert("RGB")
