"""Images and masks: authors' layouts written with Pillow, kinds of PNG, and one line for each mistake."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import VOCSegmentation

from errors import UserError
from images.decode import ImageError
from images.found import digest
from segmentation import digits
from segmentation.images import SegmentedImages
from segmentation.masks import MaskReader, load_numbers, palette, plain_meaning, read_names, save_mask, spans
from segmentation.sets import Options, find_pairs
from segmentation.transforms import RECIPES, Training, Whole

SIZE = (7, 5)  # width, height of the images here


def picture(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path: Path, numbers, dtype=np.uint8) -> np.ndarray:
    """Write a mask; numbers are repeated to fill it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(np.array(numbers, dtype), (SIZE[1], SIZE[0]))
    Image.fromarray(pixels).save(path)
    return pixels


def read(pairs) -> list[np.ndarray]:
    return [pairs.read_mask(source) for source in pairs.masks]


def message(call, *args) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# The authors' layouts


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, above):
    """0 is ignored, the rest minus 1."""
    top = tmp_path / above
    for half, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            picture(top / f"images/{half}/ADE_{i}.jpg", i)
            mask(top / f"annotations/{half}/ADE_{i}.png", [0, 1, 150, i + 2])
    found = find_pairs("ADE20K", tmp_path, True)
    assert len(found.samples) == 3 and len(found.classes) == 150 and found.palette.shape == (150, 3)
    assert [Path(source).name for source in found.masks] == ["ADE_0.png", "ADE_1.png", "ADE_2.png"]
    for i, labels in enumerate(read(found)):
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels.ravel()[:4], [255, 0, 149, i + 1])
    # The benchmark's list, by its numbers: wall 1, person 13, car 21, minibike 117, flag 150
    assert [found.classes[number - 1] for number in (1, 13, 21, 117, 150)] == [
        *("wall", "person", "car", "minibike", "flag")
    ]
    assert len(find_pairs("ADE20K", tmp_path, False).samples) == 2
    mask(top / "annotations/training/ADE_1.png", [151])
    assert "ADE_1.png has the label 151 in row 1, column 1; 0 to 150, 255 are known" in message(read, found)


TRAIN_IDS = {  # labels.py of the authors' cityscapesScripts: id -> train id, the others 255
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14},
    **{28: 15, 31: 16, 32: 17, 33: 18},
}


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes(tmp_path, kind):
    numbers = [*range(19), 255] if kind == "labelTrainIds" else range(34)
    meant = numbers if kind == "labelTrainIds" else [TRAIN_IDS.get(number, 255) for number in numbers]
    for half in ("train", "val"):
        for city in ("aachen", "bochum"):
            stem = f"{half}/{city}/{city}_000000_000019"
            picture(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
            mask(tmp_path / f"gtFine/{stem}_gtFine_{kind}.png", numbers)
            mask(tmp_path / f"gtFine/{stem}_gtFine_instanceIds.png", [26001], np.uint16)
            picture(tmp_path / f"gtFine/{stem}_gtFine_color.png")
    found = find_pairs("CITYSCAPES", tmp_path, False)
    assert len(found.samples) == 2
    for labels in read(found):
        np.testing.assert_array_equal(labels, np.resize(meant, labels.shape))
    assert list(found.classes[:3]) == ["road", "sidewalk", "building"] and found.classes[18] == "bicycle"
    assert found.palette[13].tolist() == [0, 0, 142] and found.palette.shape == (19, 3)


def test_cityscapes_prefers_train_ids(tmp_path):
    stem = "train/ulm/ulm_000000_000019"
    picture(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
    mask(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", [7])
    mask(tmp_path / f"gtFine/{stem}_gtFine_labelTrainIds.png", [3])
    assert np.unique(read(find_pairs("CITYSCAPES", tmp_path, True))[0]) == [3]


def voc(top: Path, augmented: bool) -> None:
    for i in range(4):
        picture(top / f"JPEGImages/2007_{i}.jpg", i)
        if i < 3:
            save_to = top / f"SegmentationClass/2007_{i}.png"
            save_to.parent.mkdir(parents=True, exist_ok=True)
            save_mask(save_to, np.resize([0, i + 1, 20, 255], SIZE[::-1]), palette(21))
    lists = top / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n2007_0\n")
    (lists / "val.txt").write_text("2007_1\n")
    if augmented:
        mask(top / "SegmentationClassAug/2007_3.png", [7])
        mask(top / "SegmentationClassAug/2007_2.png", [9])
        (lists / "trainaug.txt").write_text("2007_3\n2007_2\n2007_0\n")


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_pascal_voc(tmp_path, above):
    voc(tmp_path / above, augmented=False)
    found = find_pairs("VOC", tmp_path, True)
    assert [Path(source).stem for source, _ in found.samples] == ["2007_2", "2007_0"]
    assert [labels.ravel()[:4].tolist() for labels in read(found)] == [[0, 3, 20, 255], [0, 1, 20, 255]]
    assert len(found.classes) == 21 and found.classes[15] == "person" and found.classes[20] == "tvmonitor"
    assert [Path(source).stem for source in find_pairs("VOC", tmp_path, False).masks] == ["2007_1"]


def test_augmented_voc(tmp_path):
    """The augmented masks where there are some, else the first ones."""
    voc(tmp_path, augmented=True)
    found = find_pairs("VOC", tmp_path, True)
    assert [int(labels[0, 1]) for labels in read(found)] == [7, 9, 1]
    assert len(find_pairs("VOC", tmp_path, False).samples) == 1


def test_a_list_of_paths(tmp_path):
    """Augmented VOC is also handed around with lists of the paths of images and masks."""
    voc(tmp_path, augmented=True)
    listed = "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in ("2007_3", "2007_0"))
    (tmp_path / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(listed + "\n")
    found = find_pairs("VOC", tmp_path, True)
    assert [Path(source).stem for source, _ in found.samples] == ["2007_3", "2007_0"]
    assert [int(labels[0, 1]) for labels in read(found)] == [7, 1]


def test_voc_reads_as_torchvision_does(tmp_path):
    voc(tmp_path / "VOCdevkit/VOC2012", augmented=False)
    theirs = VOCSegmentation(str(tmp_path), "2012", "train")
    ours = find_pairs("VOC", tmp_path, True)
    assert len(theirs) == len(ours.samples)
    for (image, labels), (source, _), drawn in zip(theirs, ours.samples, ours.masks, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(ours.read_image(source)))
        np.testing.assert_array_equal(np.asarray(labels), ours.read_mask(drawn))


PLACES = [
    ("images/train", "masks/train", "images/val", "masks/val"),
    ("images/training", "masks/training", "images/validation", "masks/validation"),
    ("train/images", "train/masks", "val/images", "val/masks"),
    ("training/images", "training/masks", "validation/images", "validation/masks"),
]


@pytest.mark.parametrize("places", PLACES)
def test_a_folder(tmp_path, places):
    """Any ending, folders inside; the largest label of both halves says how many classes there are."""
    images, masks, val_images, val_masks = (tmp_path / place for place in places)
    for i, name in enumerate(("b.jpg", "a.v2.tiff", "inner/a.webp")):
        picture(images / name, i)
        mask((masks / name).with_suffix(".png"), [0, i, 255])
    picture(val_images / "c.PNG")
    mask(val_masks / "c.png", [4])
    found = find_pairs("FOLDER", tmp_path, True)
    assert [Path(source).name for source, _ in found.samples] == ["a.v2.tiff", "b.jpg", "a.webp"]
    assert [int(labels[0, 1]) for labels in read(found)] == [1, 0, 2]
    assert list(found.classes) == ["0", "1", "2", "3", "4"]
    assert list(find_pairs("FOLDER", tmp_path, False).classes) == list(found.classes)
    before = digest(found.samples)
    assert digest(find_pairs("FOLDER", tmp_path, True).samples) == before
    assert digest(find_pairs("FOLDER", tmp_path, False).samples) != before
    mask(masks / "b.png", np.random.default_rng(0).integers(0, 5, 35))  # of another size in bytes
    assert digest(find_pairs("FOLDER", tmp_path, True).samples) != before


def folder(top: Path, numbers, dtype=np.uint8, count: int = 1) -> Path:
    for half in ("train", "val"):
        for i in range(count):
            picture(top / f"images/{half}/{i}.jpg")
            mask(top / f"masks/{half}/{i}.png", numbers, dtype)
    return top


@pytest.mark.parametrize(
    ("options", "numbers", "expected", "classes"),
    [
        (Options(), [0, 1, 2, 255], [0, 1, 2, 255], 3),
        (Options(reduce_zero_label=True), [0, 1, 2, 255], [255, 0, 1, 255], 2),
        (Options(ignore_label=2), [0, 1, 2, 3], [0, 1, 255, 3], 4),
        (Options(ignore_label=65535), [0, 1, 65535], [0, 1, 255], 2),
        (Options(["sky", "sea"], 9, True), [0, 1, 2, 9], [255, 0, 1, 255], 2),
    ],
)
def test_what_numbers_mean(tmp_path, options, numbers, expected, classes):
    found = find_pairs("FOLDER", folder(tmp_path, numbers, np.uint16), True, options)
    assert len(found.classes) == len(found.palette) == classes
    assert read(found)[0].ravel()[: len(numbers)].tolist() == expected


# ------------------------------------------------------------------------------------------------------------
# Kinds of PNG


def png(path: Path, rows: list[list[int]], bits: int, colours: int = 0) -> None:
    """A PNG written by hand: grey (or palette, 3) of 1, 2, 4, 8 or 16 bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = b""
    for row in rows:
        text = "".join(f"{number:0{bits}b}" for number in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, colours, 0, 0, 0)
    table = chunk(b"PLTE", bytes(k % 251 for k in range(3 << bits))) if colours == 3 else b""
    body = chunk(b"IHDR", head) + table + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("bits", "colours"), [*((b, 0) for b in (1, 2, 4, 8, 16)), *((b, 3) for b in (1, 2, 4, 8))]
)
def test_numbers_are_read_as_they_are_stored(tmp_path, bits, colours):
    """Grey and palette PNGs of every depth that the format has; Pillow spreads those of 2 and 4 bits."""
    most = (1 << bits) - 1
    rows = [[0, most, 1, most], [most, 1, 0, most // 2], [1, 0, most, 0]]
    png(tmp_path / "mask.png", rows, bits, colours)
    np.testing.assert_array_equal(load_numbers(str(tmp_path / "mask.png")), rows)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_refused(tmp_path, mode):
    Image.new(mode, SIZE).save(tmp_path / "mask.png")
    said = message(load_numbers, str(tmp_path / "mask.png"))
    assert f"mask.png is a picture in colours ({mode}), not of class numbers: make it a PNG of palette" in said


def test_other_formats_are_refused(tmp_path):
    Image.new("L", SIZE).save(tmp_path / "mask.png", format="JPEG")
    assert "mask.png is a JPEG file, which may not keep numbers" in message(
        load_numbers, str(tmp_path / "mask.png")
    )


def test_unreadable_masks(tmp_path):
    path = tmp_path / "mask.png"
    mask(path, range(35))
    path.write_bytes(path.read_bytes()[:50])
    assert f"cannot decode image {path}: image file is truncated" in message(load_numbers, str(path))
    path.write_text("no image")
    assert "unknown format" in message(load_numbers, str(path))
    path.unlink()
    assert "No such file" in message(load_numbers, str(path))


def test_a_saved_mask_is_a_mask(tmp_path):
    labels = np.random.default_rng(0).integers(0, 21, (9, 8))
    labels[0] = 255
    save_mask(tmp_path / "mask.png", labels, palette(21))
    np.testing.assert_array_equal(MaskReader(plain_meaning(21))(str(tmp_path / "mask.png")), labels)
    shown = np.asarray(Image.open(tmp_path / "mask.png").convert("RGB"))
    np.testing.assert_array_equal(shown[1:], palette(21)[labels[1:]])


def test_the_palette_is_that_of_pascal_voc():
    """Its published colours: aeroplane, bird, person, train, tvmonitor, and all 256 differ."""
    colours = palette(256)
    for label, colour in {1: (128, 0, 0), 3: (128, 128, 0), 15: (192, 128, 128), 19: (128, 192, 0)}.items():
        assert tuple(colours[label]) == colour
    assert tuple(colours[20]) == (0, 64, 128) and tuple(colours[255]) == (224, 224, 192)
    assert len({tuple(colour) for colour in colours}) == 256


# ------------------------------------------------------------------------------------------------------------
# Digits


def boxed(picture: np.ndarray) -> np.ndarray:
    """What is inked of a picture, cut out and brought to 16 x 16 numbers."""
    rows, columns = np.nonzero(picture >= 64)
    cut = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(cut).resize((16, 16), Image.Resampling.BILINEAR), float).ravel()


def test_digits_lie_where_their_masks_say():
    """What is inked is labelled, and each mark looks like a real digit of that label, of the evaluation's half."""
    images, masks = digits.canvases(False, count=60)
    assert images.shape == (60, 64, 64, 3) and masks.shape == (60, 64, 64)
    np.testing.assert_array_equal(images[..., 0] >= 64, masks > 0)
    real = load_digits()
    large = [
        np.asarray(Image.fromarray(np.uint8(each * 15.9375)).resize((32, 32), 3)) for each in real.images[1437:]
    ]
    nearest = KNeighborsClassifier(1).fit([boxed(each) for each in large], real.target[1437:])
    seen, right = 0, 0
    for image, drawn in zip(images, masks, strict=True):
        marks, count = ndimage.label(drawn > 0, np.ones((3, 3)))
        for mark in range(1, count + 1):
            inside = marks == mark
            if inside.sum() > 40 and len(np.unique(drawn[inside])) == 1:  # no two that touch, no loose dots
                seen += 1
                right += int(
                    nearest.predict([boxed(np.where(inside, image[..., 0], 0))])[0] + 1 == drawn[inside][0]
                )
    assert seen > 80 and right >= 0.97 * seen, (right, seen)


def test_a_canvas_depends_on_its_number_alone():
    few, many = digits.canvases(True, count=3), digits.canvases(True, count=5)
    for one, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, other[:3])
    assert not np.array_equal(digits.canvases(False, count=3)[0], few[0])


def test_digits_are_pairs():
    found = find_pairs("DIGITS", "", False)
    assert len(found.samples) == 100 and list(found.classes) == ["background", *"0123456789"]
    data = SegmentedImages(found, Training(RECIPES["DIGITS"]), Whole(RECIPES["DIGITS"]))
    image, labels, _ = data[3]
    assert image.shape == (3, 64, 64) and labels.shape == (64, 64)
    assert len(np.unique(np.concatenate([np.unique(each) for each in found.masks]))) == 11
    assert len(digest(data.samples)) == 64


# ------------------------------------------------------------------------------------------------------------
# Mistakes


def test_what_is_missing_is_one_line(tmp_path):
    for name, place in (
        ("ADE20K", "images/training"),
        ("CITYSCAPES", "leftImg8bit/train"),
        ("VOC", "ImageSets/Segmentation/train.txt"),
        ("FOLDER", ""),
    ):
        said = message(find_pairs, name, tmp_path, True)
        assert place in said and "--data-path must hold" in said
        assert "is not a folder; --data-path must hold" in message(find_pairs, name, tmp_path / "no", True)
        assert "is not a folder" in message(find_pairs, name, "", True)
    assert "Did you mean ADE20K?" in message(find_pairs, "ADE20k", tmp_path, True)
    assert "--ignore-label is for --data-set FOLDER" in message(find_pairs, "VOC", tmp_path, True, Options((), 3))
    assert "2 names of classes are given, but DIGITS has 11" in message(
        find_pairs, "DIGITS", "", True, Options(["a", "b"])
    )


def test_no_images(tmp_path):
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "masks/train").mkdir(parents=True)
    assert "images/train holds no images" in message(find_pairs, "FOLDER", tmp_path, True)


def test_images_without_masks(tmp_path):
    folder(tmp_path, [0, 1], count=5)
    for i in (1, 2):
        (tmp_path / f"masks/train/{i}.png").unlink()
    said = message(find_pairs, "FOLDER", tmp_path, True)
    assert "2 of 5 images" in said and "have no mask (the same name with .png)" in said
    assert "'images/train/1.jpg', 'images/train/2.jpg'" in said
    find_pairs("FOLDER", tmp_path, False)


def test_masks_without_images(tmp_path):
    folder(tmp_path, [0, 1], count=6)
    for i in range(4):
        (tmp_path / f"images/train/{i}.jpg").unlink()
    said = message(find_pairs, "FOLDER", tmp_path, True)
    assert "4 of 6 masks" in said and "masks/train/0.png" in said and "and 1 more" in said


def test_voc_lists(tmp_path):
    voc(tmp_path, augmented=False)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_0 2009_1 2007_2")
    assert "lists 1 of 3 images that are not in" in message(find_pairs, "VOC", tmp_path, True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_3")
    assert "1 of 1 images" in message(find_pairs, "VOC", tmp_path, True)
    listed = b"\xef\xbb\xbf2007_0 \r\n\r\n2007_2\r\n"  # as Windows' editors save it
    (tmp_path / "ImageSets/Segmentation/train.txt").write_bytes(listed)
    assert [Path(each).stem for each, _ in find_pairs("VOC", tmp_path, True).samples] == ["2007_0", "2007_2"]
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n")
    assert "lists no images" in message(find_pairs, "VOC", tmp_path, True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("/a/2007_0.jpg /b/2007_2.png\n")
    assert "/a/2007_0.jpg /b/2007_2.png is not an image and its mask" in message(find_pairs, "VOC", tmp_path, True)


def test_two_images_of_one_name(tmp_path):
    folder(tmp_path, [0, 1])
    picture(tmp_path / "images/train/0.png")
    assert "0.jpg and images/train/0.png differ in their endings alone" in message(
        find_pairs, "FOLDER", tmp_path, True
    )


@pytest.mark.parametrize(
    ("numbers", "options", "said"),
    [
        ([0, 255], Options(), "a single class, besides the ignored label 255"),
        ([255], Options(), "a single class"),
        ([0, 300], Options(), "have labels up to 300; there can be 255 classes at most"),
        ([0, 1], Options(reduce_zero_label=True), "a single class"),
        ([0, 1], Options([str(k) for k in range(256)]), "256 class names are given; give from 2 to 255"),
        ([0, 1], Options(["a"]), "1 class names are given; give from 2 to 255"),
        ([0, 1], Options(ignore_label=70000), "--ignore-label 70000 is no number that a mask can hold"),
    ],
)
def test_labels_that_make_no_classes(tmp_path, numbers, options, said):
    assert said in message(find_pairs, "FOLDER", folder(tmp_path, numbers, np.uint16), True, options)


def test_more_labels_than_names(tmp_path):
    found = find_pairs("FOLDER", folder(tmp_path, [0, 0, 7]), True, Options(["a", "b", "c"]))
    said = message(read, found)
    assert "0.png has the label 7 in row 1, column 3; 0 to 2, 255 are known: correct the mask" in said
    assert "--class-names (3 are given), --ignore-label and --reduce-zero-label" in said


def test_a_mask_of_another_size(tmp_path):
    folder(tmp_path, [0, 1])
    picture(tmp_path / "images/train/0.jpg", size=(8, 5))
    found = find_pairs("FOLDER", tmp_path, True)
    data = SegmentedImages(found, Training(RECIPES["FOLDER"]), Whole(RECIPES["FOLDER"]))
    with pytest.raises(ImageError, match=r"0.png has 7 x 5 pixels, but its image .*0.jpg has 8 x 5: make them"):
        data.decode(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"sky\nsea\nsky\n", "lines 1 and 3 of {} are both sky"),
        (b"sky\n\nsea\n", "line 2 of {} is empty"),
        (b" \n", "{} holds no names of classes"),
        (b"\xff\xfe\xff", "cannot read the names of classes in {}"),
        ("\n".join(map(str, range(256))).encode(), "{} holds 256 names; there can be 255"),
    ],
)
def test_lists_of_names(tmp_path, content, said):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    assert said.format(path) in message(read_names, path)
    path.write_bytes(b"\xef\xbb\xbfsky \r\nhot air balloon\r\n\r\n")
    assert read_names(path) == ["sky", "hot air balloon"]


def test_spans():
    assert spans([0, 1, 2, 255]) == "0 to 2, 255" and spans([]) == "" and spans([4]) == "4"


def test_a_data_set_goes_to_workers_of_any_kind(tmp_path):
    """Also to those that are started afresh, which unpickle it."""
    data = SegmentedImages(
        find_pairs("FOLDER", folder(tmp_path, [0, 1]), True), Training(RECIPES["VOC"]), Whole(RECIPES["VOC"])
    )
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(copy[0][1].numpy(), data[0][1].numpy())
    assert (
        pickle.loads(pickle.dumps(find_pairs("DIGITS", "", False))).name(np.zeros((4, 4)))
        == "canvas of 4 x 4 pixels"
    )
