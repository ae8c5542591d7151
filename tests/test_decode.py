"""From files to RGB: damaged ones, every mode and depth, against numbers that NumPy wrote."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from contextlib import nullcontext

import numpy as np
import PIL
import pytest
from pictures import photo
from PIL import Image

from images.decode import ImageError, load_image

# ------------------------------------------------------------------------------------------------------------
# Damaged images


def jpeg(**options):
    file = io.BytesIO()
    photo().save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def png_claiming(width, height):
    """A PNG whose header promises a size, with next to no pixels behind it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def damaged_avif():
    """An AVIF that does not say where its pixels are."""
    Image.init()
    if "AVIF" not in Image.SAVE:
        return b"\0\0\0 ftypavif"  # a Pillow that cannot identify the whole one either
    file = io.BytesIO()
    photo().save(file, "AVIF")
    return file.getvalue().replace(b"iloc", b"none")


UNREADABLE = {
    "empty": (b"", "unknown format"),
    "text": (b"This is no image.\n", "unknown format"),
    "header only": (b"\x89PNG\r\n\x1a\n\0\0\0", "unknown format|Truncated"),
    "truncated": (jpeg()[:-400], "truncated"),
    "enormous": (png_claiming(60_000, 50_000), r"3000000000 pixels\) exceeds limit"),
    "fewer pixels than promised": (png_claiming(60, 50), "truncated"),
    "damaged AVIF": (damaged_avif(), "Failed to decode|unknown format"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_cannot_be_decoded(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(
        ImageError, match=rf"^cannot decode image {path}: .*({reason}).*; repair or remove the file$"
    ):
        load_image(str(path))


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [
        (
            999,
            pytest.raises(ImageError, match=r"a.png: .*2000 pixels\) exceeds limit of 1998 .*decompression bomb"),
        ),
        (1000, pytest.warns(Image.DecompressionBombWarning, match="exceeds limit of 1000")),  # Pillow's own
        (2000, nullcontext()),
    ],
    ids=["refused", "warned", "read"],
)
def test_enormous_images(tmp_path, monkeypatch, limit, outcome):
    """Up to Pillow's limit images are read, up to twice of it as well, with Pillow's warning."""
    photo().save(tmp_path / "a.png")  # 50 x 40
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with outcome:
        assert load_image(str(tmp_path / "a.png")).size == (50, 40)


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"cannot decode image .*/b.png: .*No such file"):
        load_image(str(tmp_path / "b.png"))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    photo().convert(mode).save(path)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (50, 40))


def test_cmyk_jpeg(tmp_path):
    photo().convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    error = np.asarray(load_image(str(tmp_path / "a.jpg"))).astype(int) - np.asarray(photo())
    assert np.abs(error).max() < 12


def test_sixteen_bit_grey(tmp_path):
    levels = np.linspace(0, 65535, 2000).astype(np.uint16).reshape(40, 50)
    for name, pixels in [("a.png", levels), ("little.tif", levels), ("big.tif", levels.astype(">u2"))]:
        Image.fromarray(pixels).save(tmp_path / name)
        loaded = np.asarray(load_image(str(tmp_path / name)))
        np.testing.assert_array_equal(loaded, np.stack([levels // 256] * 3, axis=-1))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one entry", "all entries"])
def test_palette_with_transparency(tmp_path, transparency):
    image = photo().convert("P")
    image.save(tmp_path / "a.png", transparency=transparency)
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "a.png"))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("damaged", [False, True])
def test_exif_is_ignored(tmp_path, damaged):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    content = exif.tobytes()
    content = content[:14] + b"\xff" * 20 if damaged else content
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=content))
    (tmp_path / "plain.jpg").write_bytes(jpeg())
    with pytest.warns(UserWarning, match="Corrupt EXIF data") if damaged else nullcontext():  # Pillow's own
        loaded = load_image(str(tmp_path / "a.jpg"))
    assert loaded.size == (50, 40)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(load_image(str(tmp_path / "plain.jpg"))))


def test_files_are_read_by_content_not_name(tmp_path):
    photo().save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "a.jpg"))), np.asarray(photo()))


# ------------------------------------------------------------------------------------------------------------
# What is no file: refused, not opened


def test_pipes_sockets_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in [tmp_path / "pipe.png", tmp_path / "link.png", tmp_path, "/dev/null"]:
        with pytest.raises(ImageError, match=f"^cannot decode image {path}: this is no regular file; repair or"):
            load_image(str(path))


def test_sockets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.png")
        with pytest.raises(ImageError, match=r"^cannot decode image a.png: .*No such device"):
            load_image("a.png")


def test_refused_files_are_closed(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ImageError):
            load_image(str(tmp_path / "pipe.png"))
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------------------------
# Depth of pixels

LEVELS = np.linspace(0, 1, 77)  # of 7 x 11 pixels
UNSIGNED, SIGNED, FLOAT = (1,), (2,), (3,)
pillow_13 = int(PIL.__version__.split(".")[0]) >= 13
reads_more = pytest.mark.skipif(not pillow_13, reason="older versions of Pillow refuse these")


def tiff(pixels, bits, kind=UNSIGNED, colours=1, order="<", deflate=False, planar=False, turned=False, more=()):
    """A TIFF from numbers [H, W] or [H, W, channels], written by its specification.

    Args:
        kind, colours, more: SampleFormat, PhotometricInterpretation, other entries of one short or two.
        turned: the lowest bit of each byte comes first.
    """
    height, width, channels = (*pixels.shape, 1)[:3]
    flat = (np.moveaxis(pixels, -1, 0) if planar and pixels.ndim == 3 else pixels).reshape(
        -1, width * (1 if planar else channels)
    )
    if bits in (16, 32, 64):
        content = flat.astype(f"{order}{'f' if kind == FLOAT else 'u'}{bits // 8}").tobytes()
    else:
        binary = (flat[..., None].astype(int) >> np.arange(bits)[::-1]) & 1  # [rows, numbers, bits]
        content = np.packbits(binary.reshape(len(flat), -1).astype(np.uint8), axis=1).tobytes()
    if turned:
        content = np.packbits(np.unpackbits(np.frombuffer(content, np.uint8)), bitorder="little").tobytes()
    strips = _parts(content, channels if planar else 1)
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    entries = {256: (width,), 257: (height,), 258: (bits,) * channels, 259: (8 if deflate else 1,), 262: (colours,)}
    entries |= {266: (1 + turned,), 277: (channels,), 278: (height,), 284: (1 + planar,), 339: kind * channels}
    entries |= {279: tuple(map(len, strips)), **dict(more)}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    beside, table = b"".join(strips), {}
    starts = np.cumsum([start, *map(len, strips[:-1])])
    for tag, values in sorted({**entries, 273: tuple(starts.tolist())}.items()):
        value = struct.pack(f"{order}{len(values)}I", *values) if tag in (273, 279) else b""
        value = value or struct.pack(f"{order}{len(values)}H", *values)
        if len(value) > 4:
            value, beside = struct.pack(f"{order}I", start + len(beside)), beside + value
        table[tag] = struct.pack(f"{order}HHI", tag, 4 if tag in (273, 279) else 3, len(values)) + value.ljust(
            4, b"\0"
        )
    header = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(table)) + b"".join(table.values()) + b"\0" * 4
    return header + struct.pack(f"{order}I", 8) + directory + beside


def _parts(content, parts):
    size = len(content) // parts
    return [content[part * size : (part + 1) * size] for part in range(parts)]


def levels(white):
    """From 0 to white, [7, 11], whole numbers."""
    return np.round(LEVELS * white).astype(np.int64).reshape(7, 11)


def grey(values):
    return np.stack([values.astype(np.uint8)] * 3, axis=-1)


def loaded(tmp_path, content):
    (tmp_path / "a.image").write_bytes(content)
    return np.asarray(load_image(str(tmp_path / "a.image")))


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "kind", "white"),
    [(16, UNSIGNED, 2**16 - 1), (16, SIGNED, 2**15 - 1), (32, SIGNED, 2**31 - 1), (32, UNSIGNED, 2**32 - 1)],
)
def test_whole_numbers_of_tiff_keep_the_upper_8_of_their_bits(tmp_path, bits, kind, white, order, deflate):
    content = tiff(levels(white), bits, kind, order=order, deflate=deflate)
    if order == ">" and ((deflate and kind == SIGNED) or (bits == 32 and kind == UNSIGNED)):
        with pytest.raises(ImageError, match=r"misreads; convert it to 8 bits a channel|unknown format"):
            loaded(tmp_path, content)
    else:
        np.testing.assert_array_equal(loaded(tmp_path, content), grey(levels(white) // ((white + 1) // 256)))


def test_tiff_of_12_bits(tmp_path):
    np.testing.assert_array_equal(loaded(tmp_path, tiff(levels(4095), 12)), grey(levels(4095) // 16))


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_colours_of_tiff(tmp_path, bits, planar):
    pixels = np.stack([levels(2**bits - 1), levels(2**bits - 1)[::-1], levels(2**bits - 1) // 3], axis=-1)
    for deflate in [False, True]:
        content = tiff(pixels, bits, colours=2, planar=planar, deflate=deflate)
        if planar and bits == 16 and not deflate:
            with pytest.raises(
                ImageError, match=r"a.image: planar TIFF of 16 bits a channel, which Pillow misreads"
            ):
                loaded(tmp_path, content)
        else:
            np.testing.assert_array_equal(loaded(tmp_path, content), pixels >> (bits - 8))


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_min_is_white_of_up_to_8_bits(tmp_path, bits, deflate):
    white = 2**bits - 1
    content = tiff(white - levels(white), bits, colours=0, deflate=deflate)
    np.testing.assert_array_equal(loaded(tmp_path, content), grey(levels(white) * (255 // white)))


REFUSED = {
    "min-is-white 16": (tiff(levels(65535), 16, colours=0), "min-is-white TIFF of 16 bits"),
    "min-is-white 16, deflate": (tiff(levels(65535), 16, colours=0, deflate=True), "min-is-white TIFF of 16 bits"),
    "min-is-white float": (tiff(levels(1), 32, FLOAT, colours=0), "min-is-white TIFF of 32 bits"),
    "signed 8": (tiff(levels(127), 8, SIGNED), "TIFF of signed 8-bit numbers"),
    "planar, 1 bit": (tiff(levels(1), 1, planar=True), "planar TIFF of 1 bits"),
    "planar min-is-white": (tiff(levels(255), 8, colours=0, planar=True), "planar TIFF with min-is-white"),
    "planar, turned": (tiff(np.stack([levels(255)] * 3, -1), 8, colours=2, planar=True, turned=True), "turned"),
    "planar Lab": (tiff(np.stack([levels(255)] * 3, -1), 8, colours=8, planar=True), "planar TIFF in Lab"),
    "negative": (tiff(levels(2**16 - 1), 16, SIGNED), "negative numbers, down to -"),
    "big-endian float": (tiff(levels(1), 32, FLOAT, order=">", deflate=True), "compressed big-endian TIFF"),
    "floats beyond 1": (tiff(levels(255), 32, FLOAT), "its floats go from 0 to 255, not from 0 to 1"),
    "negative floats": (tiff(levels(1) - 0.5, 32, FLOAT), "its floats go from -0.5 to 0.5"),
    "NaN": (tiff(np.where(levels(1) > 0, np.nan, 0), 32, FLOAT), "its floats go from nan to nan"),
    "PFM scale": (b"Pf\n1 1\n-3.0\n" + struct.pack("<f", 0.5), "its floats have a scale of their own, 3"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_pixels_that_cannot_be_known(tmp_path, content, reason):
    advice = "convert it to 8 bits a channel or remove the file"
    with pytest.raises(ImageError, match=rf"^cannot decode image {tmp_path}/a.image: .*{reason}.*; {advice}$"):
        loaded(tmp_path, content)


@pytest.mark.parametrize("sampling", [(2, 2), (2, 1)])
def test_ycbcr_tiff_with_fewer_colours_than_pixels(tmp_path, sampling):
    content = tiff(np.stack([levels(255)] * 3, -1), 8, colours=6, more=[(530, sampling)])
    with pytest.raises(ImageError, match="uncompressed YCbCr TIFF.*; convert it" if pillow_13 else "truncated"):
        loaded(tmp_path, content)


@reads_more
def test_ycbcr_tiff_with_a_colour_for_every_pixel(tmp_path):
    pixels = np.asarray(photo())
    stored = np.asarray(photo().convert("YCbCr"))
    read = loaded(tmp_path, tiff(stored, 8, colours=6, more=[(530, (1, 1))]))
    assert np.abs(read.astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("order", ["<", ">"])
def test_floats_of_tiff_and_pfm(tmp_path, order):
    values = LEVELS.reshape(7, 11)
    expected = grey(np.round(255 * values.astype(np.float32).astype(np.float64)))
    np.testing.assert_array_equal(loaded(tmp_path, tiff(values, 32, FLOAT, order=order)), expected)
    scale = b"-1.0" if order == "<" else b"1.0"
    pfm = b"Pf\n11 7\n" + scale + b"\n" + values[::-1].astype(f"{order}f4").tobytes()
    np.testing.assert_array_equal(loaded(tmp_path, pfm), expected)


@pytest.mark.parametrize("white", [1, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
def test_pnm_is_scaled_by_its_own_white(tmp_path, magic, white):
    values = levels(white)
    numbers = (np.stack([values] * 3, axis=-1) if magic in ("P3", "P6") else values).ravel()
    body = " ".join(map(str, numbers)).encode()
    if magic in ("P5", "P6"):
        body = numbers.astype(">u2" if white > 255 else np.uint8).tobytes()
    read = loaded(tmp_path, f"{magic}\n11 7\n{white}\n".encode() + body)
    assert np.abs(read - 255 * grey_floats(values / white)).max() < 1
    assert read.min() == 0 and read.max() == 255


def grey_floats(values):
    return np.stack([values] * 3, axis=-1)


def test_the_example_of_a_dark_grey_pgm(tmp_path):
    assert (loaded(tmp_path, b"P5\n8 8\n65535\n" + b"\x40\0" * 64) == 64).all()


def fits(pixels, bits, **cards):
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": 11, "NAXIS2": 7, **cards}
    header = "".join(f"{name:8}= {value!s:>20}".ljust(80) for name, value in cards.items()) + "END".ljust(80)
    return header.ljust(2880).encode() + pixels.tobytes().ljust(2880, b"\0")


def test_fits(tmp_path):
    values = LEVELS.reshape(7, 11)
    floats = fits(values[::-1].astype(">f4"), -32, BZERO="0.0", BSCALE="1.0")
    if pillow_13:
        np.testing.assert_array_equal(loaded(tmp_path, floats), grey(np.round(255 * values.astype(np.float32))))
    else:
        with pytest.raises(ImageError, match="read by a Pillow before 13"):
            loaded(tmp_path, floats)
    np.testing.assert_array_equal(loaded(tmp_path, fits(levels(255)[::-1].astype(np.uint8), 8)), grey(levels(255)))
    for content, reason in [
        (fits(levels(9).astype(">i2"), 16), "FITS does not say which number is white"),
        (fits(levels(9).astype(">i2"), 16, BZERO=32768), "FITS with a BZERO of 32768"),
        (fits(levels(9).astype(">i4"), 32), "FITS does not say which number is white"),
        (fits(levels(9).astype(np.uint8), 8, BZERO=-128), "FITS with a BZERO of -128"),
        (fits(values.astype(">f4"), -32, BSCALE="2.5"), "FITS with a BSCALE of 2.5"),
    ]:
        with pytest.raises(ImageError, match=f"{reason}.*; convert it"):
            loaded(tmp_path, content)


def jpeg2000(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG2000", **options)
    return file.getvalue()


needs_jpeg2000 = pytest.mark.skipif("JPEG2000" not in (Image.init(), Image.SAVE)[1], reason="Pillow without it")


@needs_jpeg2000
def test_jpeg2000(tmp_path):
    values = levels(65535).astype(np.uint16)
    np.testing.assert_array_equal(loaded(tmp_path, jpeg2000(values)), grey(values // 256))
    pixels = np.asarray(photo())
    np.testing.assert_array_equal(loaded(tmp_path, jpeg2000(pixels)), pixels)
    np.testing.assert_array_equal(loaded(tmp_path, jpeg2000(pixels, no_jp2=True)), pixels)


@needs_jpeg2000
@pytest.mark.parametrize(
    ("depth", "reason"), [(3, "of 4 bits in 3"), (15, "of 16 bits in 3"), (0x80 | 7, "of signed numbers")]
)
def test_jpeg2000_that_pillow_misreads(tmp_path, depth, reason):
    content = bytearray(jpeg2000(np.asarray(photo()), no_jp2=True))
    at = content.index(b"\xff\x4f\xff\x51") + 42
    content[at : at + 9] = bytes([depth, 1, 1] * 3)
    with pytest.raises(ImageError, match=f"JPEG 2000 {reason}.*; convert it"):
        loaded(tmp_path, bytes(content))


@reads_more
def test_grey_with_premultiplied_transparency(tmp_path):
    """The colour is given back its strength, then transparency is dropped."""
    stored = np.stack([levels(100), np.full((7, 11), 200)], axis=-1)
    read = loaded(tmp_path, tiff(stored, 8, more=[(338, (1,))]))
    assert np.abs(read - grey_floats(levels(100) * 255 / 200)).max() <= 1
