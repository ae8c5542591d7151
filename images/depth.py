"""Pixels of other than 8 bits: brought to 8 by their own depth, or refused where their white cannot be known.

Pillow was compared with tifffile, imagecodecs and plain formulas on every kind of TIFF, JPEG 2000 and PNM that it
opens. What it reads otherwise than they do is refused here.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image

GREY_BITS = {
    ("PNG", "I;16"): 16,
    ("PNG", "I"): 16,  # older versions of Pillow
    ("JPEG2000", "I;16"): 16,  # Pillow moves fewer bits up
    ("PPM", "I"): 16,  # Pillow scales the file's own white to 65535
    ("IM", "I;16"): 16,
}
# Tags of TIFF, and some of their values
BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, PLANAR, SAMPLE_FORMAT, SUBSAMPLING = 258, 259, 262, 266, 284, 339, 530
MIN_IS_WHITE, LAB = 0, 8  # values of PHOTOMETRIC
UNSIGNED, SIGNED = 1, 2  # values of SAMPLE_FORMAT
SIZES = b"\xff\x4f\xff\x51"  # how a JPEG 2000 codestream begins


class UnknownPixels(ValueError):
    """What an image's numbers mean cannot be known, or Pillow would read others than are stored."""


def check_format(image: Image.Image) -> None:
    """Refuse an image that Pillow has opened, and would misread.

    Raises:
        UnknownPixels: it is one of those.
    """
    if image.format == "TIFF":
        _check_tiff(image)
    elif image.format == "JPEG2000":
        _check_jpeg2000(image)
    elif image.format == "FITS":
        _check_fits(image)
    elif image.format == "PPM" and image.info.get("scale", 1) != 1:
        raise UnknownPixels(f"its floats have a scale of their own, {image.info['scale']:g}")


def to_grey(image: Image.Image) -> Image.Image:
    """A grey image of mode I;16 (in any byte order), I or F, in mode L.

    Of whole numbers the upper 8 of the file's bits are kept. Floats v in [0, 1] become round(255 v).

    Raises:
        UnknownPixels: white is not known, or a number is negative or a float not in [0, 1].
    """
    pixels = np.asarray(image)  # [H, W]
    if image.mode == "F":
        return Image.fromarray(_floats(pixels, str(image.format)))
    if image.format == "TIFF":
        pixels, bits = _tiff_numbers(pixels, image)
    elif (image.format, image.mode[:4]) in GREY_BITS:
        bits = GREY_BITS[str(image.format), image.mode[:4]]
    else:
        raise UnknownPixels(f"{image.format} does not say which number is white")
    return Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))


def _floats(pixels: np.ndarray, file_format: str) -> np.ndarray:
    if file_format == "IM":
        raise UnknownPixels("floats of the IM format may stand for whole numbers")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):  # so for NaN
        raise UnknownPixels(f"its floats go from {low:g} to {high:g}, not from 0 to 1")
    return np.round(255 * pixels.astype(np.float64)).astype(np.uint8)


def _tag(image: Any, number: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = image.tag_v2.get(number)
    if value in (None, ()):
        return default
    return value if isinstance(value, tuple) else (value,)


def _tiff_numbers(pixels: np.ndarray, image: Image.Image) -> tuple[np.ndarray, int]:
    """Whole numbers as stored, and how many bits make white."""
    bits = _tag(image, BITS, (1,))[0]
    if _tag(image, SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED:
        if pixels.min() < 0:
            raise UnknownPixels(f"it has negative numbers, down to {pixels.min()}")
        return pixels, bits - 1
    return pixels.view(np.uint32) if bits == 32 else pixels, bits  # Pillow has signed 32 bits only


def _check_tiff(image: Any) -> None:
    bits = max(_tag(image, BITS, (1,)))
    signed_or_float = max(_tag(image, SAMPLE_FORMAT, (UNSIGNED,))) != UNSIGNED
    colours = _tag(image, PHOTOMETRIC, (MIN_IS_WHITE,))[0]
    plain = _tag(image, COMPRESSION, (1,))[0] == 1  # read by Pillow itself; else by libtiff
    planar = _tag(image, PLANAR, (1,))[0] == 2
    turned = _tag(image, FILL_ORDER, (1,))[0] == 2  # bytes with their lowest bit first
    misread = {
        f"min-is-white TIFF of {bits} bits": colours == MIN_IS_WHITE and bits > 8,
        "TIFF of signed 8-bit numbers": signed_or_float and bits == 8,
        "compressed big-endian TIFF of signed numbers or floats": (
            signed_or_float and image.tag_v2.prefix == b"MM" and not plain
        ),
        f"planar TIFF of {bits} bits a channel": planar and plain and bits != 8,
        "planar TIFF with min-is-white or turned bytes": planar and plain and (colours == MIN_IS_WHITE or turned),
        "planar TIFF in Lab colours": planar and colours == LAB,
        "uncompressed YCbCr TIFF, planar or sub-sampled": (
            image.mode == "YCbCr" and (planar or _tag(image, SUBSAMPLING, (2, 2)) != (1, 1))
        ),
    }
    for what, found in misread.items():
        if found:
            raise UnknownPixels(f"{what}, which Pillow misreads")


def _check_jpeg2000(image: Any) -> None:
    """In colours of more than 8 bits Pillow turns white to black; fewer than 8 never reach white."""
    file, start = image.fp, image.fp.tell()
    file.seek(0)
    content = file.read()
    file.seek(start)
    if SIZES not in content:
        return  # Pillow will say that it is damaged
    at = content.index(SIZES) + 40  # the number of channels (2 bytes), then 3 bytes for each, the first its depth
    channels = int.from_bytes(content[at : at + 2], "big")
    depths = content[at + 2 : at + 2 + 3 * channels : 3][: 1 if channels < 3 else 3]  # without transparency
    if any(depth & 0x80 for depth in depths):
        raise UnknownPixels("JPEG 2000 of signed numbers")
    bits = [depth + 1 for depth in depths]
    if any(not 8 <= each <= (16 if channels == 1 else 8) for each in bits):
        raise UnknownPixels(f"JPEG 2000 of {max(bits)} bits in {channels} channels, which Pillow misreads")


def _check_fits(image: Any) -> None:
    """Pillow passes over the scale that FITS may give its numbers, and reads signed ones as unsigned."""
    file, start = image.fp, image.fp.tell()
    file.seek(0)
    header = file.read(image.tile[0].offset if image.tile else 0)
    file.seek(start)
    for name, value in re.findall(rb"(BZERO|BSCALE) *= *([^ /]+)", header):
        if float(value.replace(b"D", b"E")) != (name == b"BSCALE"):
            raise UnknownPixels(f"FITS with a {name.decode()} of {value.decode()}, which Pillow passes over")
    if image.mode == "F" and not (image.tile and str(image.tile[0].args[0]).endswith("BF")):
        raise UnknownPixels(
            "FITS of compressed floats, or read by a Pillow before 13 that takes their bytes in reverse"
        )
