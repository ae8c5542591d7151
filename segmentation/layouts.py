"""How data sets are laid out: ADE20K, Cityscapes and Pascal VOC as their authors pack them, and folders.

To read data of another form, write a function here that returns `Files`, and add its lines to `SETS` and `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from torchvision.datasets import Cityscapes

from errors import UserError, shown
from images.tree import few
from segmentation.masks import IGNORED, MOST_CLASSES, NUMBERS, largest_label, plain_meaning, read_names
from segmentation.matching import MASK, by_stem, list_below, masks_of, pair
from utils import print_main

NAMES = Path(__file__).with_name("classes")  # of the classes of some sets, one a line
HALVES = {True: ("training", "train"), False: ("validation", "val")}
LAYOUTS = {
    "ADE20K": "--data-path must hold images/{training,validation}/*.jpg and "
    "annotations/{training,validation}/*.png",
    "CITYSCAPES": "--data-path must hold leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
    "gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png (or *_gtFine_labelIds.png)",
    "VOC": "--data-path must hold VOCdevkit/VOC2012, or what is in it: JPEGImages, SegmentationClass and "
    "ImageSets/Segmentation/{train,val}.txt",
    "FOLDER": "--data-path must hold images/{train,val} and masks/{train,val}, or {train,val}/{images,masks}, with "
    "a PNG mask of the same name for each image",
}


class Options(NamedTuple):
    """What the user says of a data set.

    Attributes:
        class_names: of all classes, in the order of their labels; empty for the data's own.
        ignore_label: FOLDER: the number in the files that is not to be learnt; None for 255.
        reduce_zero_label: FOLDER: number 0 is not to be learnt either, and the classes start at 1.
    """

    class_names: Sequence[str] = ()
    ignore_label: int | None = None
    reduce_zero_label: bool = False


class Files(NamedTuple):
    """Images and masks below one folder, in the same order, and what the masks' numbers mean.

    Attributes:
        top: the folder.
        images, masks: paths below it.
        meaning: number in a mask -> class, or IGNORED.
        classes: their names.
        palette: uint8 [K, 3]; None for Pascal VOC's.
        advice: what to do about a mask with other numbers.
    """

    top: Path
    images: Sequence[str]
    masks: Sequence[str]
    meaning: Mapping[int, int]
    classes: Sequence[str]
    palette: np.ndarray | None = None
    advice: str = "correct or remove the mask"


def ade20k(root: Path, is_train: bool, options: Options) -> Files:
    """The 150 classes of its scene parsing benchmark; number 0 is 'other', and ignored."""
    top = _first_folder(root, ("", "ADEChallengeData2016"), "images")
    half = HALVES[is_train][0]
    layout = LAYOUTS["ADE20K"]
    images = list_below(top, f"images/{half}", layout)
    masks = list_below(top, f"annotations/{half}", layout)
    classes = read_names(NAMES / "ade20k.txt")
    paired = pair(top, by_stem(images, f"images/{half}"), by_stem(masks_of(masks), f"annotations/{half}"), layout)
    return Files(top, *paired, plain_meaning(len(classes), reduce_zero_label=True), classes)


def cityscapes(root: Path, is_train: bool, options: Options) -> Files:
    """Its 19 classes, by labelTrainIds; where a half has none, by labelIds and the authors' table of both.

    The table, the names and the colours are torchvision's.
    """
    half = HALVES[is_train][1]
    images, masks = f"leftImg8bit/{half}", f"gtFine/{half}"
    layout = LAYOUTS["CITYSCAPES"]
    found, drawn = list_below(root, images, layout), list_below(root, masks, layout)
    learnt = sorted((each for each in Cityscapes.classes if 0 <= each.train_id < IGNORED), key=lambda c: c.train_id)
    meaning = plain_meaning(len(learnt))
    ending = "_gtFine_labelTrainIds.png"
    if not any(path.endswith(ending) for path in drawn):
        ending = "_gtFine_labelIds.png"
        known = {each.id: each.train_id for each in Cityscapes.classes if each.id >= 0}
        meaning = known | {IGNORED: IGNORED}
    pictures = by_stem(found, images, "_leftImg8bit.png")
    paired = pair(root, pictures, by_stem(drawn, masks, ending), layout, ending)
    colours = np.array([each.color for each in learnt], np.uint8)
    return Files(root, *paired, meaning, [each.name for each in learnt], colours)


def voc(root: Path, is_train: bool, options: Options) -> Files:
    """The 21 classes of Pascal VOC 2012, the contours ignored; for training the augmented set if it is there."""
    top = _first_folder(root, ("", "VOC2012", "VOCdevkit/VOC2012"), "JPEGImages")
    lists = top / "ImageSets" / "Segmentation"
    folders = ["SegmentationClass"]
    half = "train" if is_train else "val"
    if is_train and (top / "SegmentationClassAug").is_dir() and (lists / "trainaug.txt").is_file():
        half, folders = "trainaug", ["SegmentationClassAug", "SegmentationClass"]
    names = _read_list(lists / f"{half}.txt")
    layout = LAYOUTS["VOC"]
    images = by_stem(list_below(top, "JPEGImages", layout), "JPEGImages")
    masks: dict[str, str] = {}
    for folder in reversed(folders):
        if folder == folders[0] or (top / folder).is_dir():
            masks |= by_stem(masks_of(list_below(top, folder, layout)), folder)
    gone = [name for name in names if name not in images]
    if gone:
        raise UserError(
            f"{shown(str(lists / half))}.txt lists {len(gone)} of {len(names)} images that are not in JPEGImages, "
            f"e.g. {few(gone)}; add them, or correct the list"
        )
    wanted = {name: masks[name] for name in names if name in masks}
    listed = {name: images[name] for name in names}
    paired = pair(top, listed, wanted, layout, f"{MASK} in {folders[0]}")
    classes = read_names(NAMES / "voc.txt")
    return Files(top, *paired, plain_meaning(len(classes)), classes)


def folder(root: Path, is_train: bool, options: Options) -> Files:
    """Any images with PNG masks of the same names, in images/HALF and masks/HALF, or HALF/images and HALF/masks."""
    ignored = IGNORED if options.ignore_label is None else options.ignore_label
    if not 0 <= ignored < NUMBERS:
        raise UserError(
            f"--ignore-label {ignored} is no number that a mask can hold; give one from 0 to {NUMBERS - 1}"
        )
    if options.class_names and not 2 <= len(options.class_names) <= MOST_CLASSES:
        raise UserError(f"{len(options.class_names)} class names are given; give from 2 to {MOST_CLASSES}")
    layout = LAYOUTS["FOLDER"]
    places = _places(root, is_train)
    if places is None:
        raise UserError(f"{shown(str(root))} has no folder of {HALVES[is_train][0]} images; {layout}")
    images, masks = (list_below(root, place, layout) for place in places)
    paired = pair(root, by_stem(images, places[0]), by_stem(masks_of(masks), places[1]), layout)
    classes = options.class_names or _count_classes(root, ignored, options.reduce_zero_label)
    advice = (
        f"correct the mask, or see --class-names ({len(classes)} are given), --ignore-label and --reduce-zero-label"
    )
    meaning = plain_meaning(len(classes), ignored, options.reduce_zero_label)
    return Files(root, *paired, meaning, classes, advice=advice)


def _first_folder(root: Path, places: Iterable[str], inner: str) -> Path:
    """The first of some folders that holds another one; `root` if none does."""
    return next((root / place for place in places if (root / place / inner).is_dir()), root)


def _places(root: Path, is_train: bool) -> tuple[str, str] | None:
    """Where a folder of one's own keeps the images and the masks of a half."""
    for half in HALVES[is_train]:
        for images, masks in ((f"images/{half}", f"masks/{half}"), (f"{half}/images", f"{half}/masks")):
            if (root / images).is_dir():
                return images, masks
    return None


def _read_list(path: Path) -> list[str]:
    """The names in one of VOC's lists: of names, or of the paths of images and masks, as trainaug may be."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the list of images {shown(str(path))}: {error}; {LAYOUTS['VOC']}") from error
    names = [name for line in lines for name in _listed(line.split(), path)]
    if not names:
        raise UserError(f"{shown(str(path))} lists no images; {LAYOUTS['VOC']}")
    return list(dict.fromkeys(names))


def _listed(words: Sequence[str], path: Path) -> list[str]:
    """The names in a line of a list: its words, or that of an image's path, behind which its mask's may stand."""
    if not words or "/" not in words[0]:
        return [*words]
    names = {PurePosixPath(word).stem for word in words}
    if len(words) > 2 or len(names) > 1:
        raise UserError(
            f"{shown(str(path))}: {shown(' '.join(words), 200)} is not an image and its mask: correct it"
        )
    return [*names]


def _count_classes(root: Path, ignored: int, reduce_zero_label: bool) -> list[str]:
    """'0', '1', ... up to the largest label in the masks of both halves."""
    places = [found for is_train in (True, False) if (found := _places(root, is_train))]
    layout = LAYOUTS["FOLDER"]
    paths = [str(root / path) for _, masks in places for path in masks_of(list_below(root, masks, layout))]
    print_main(f"reading {len(paths):,} masks for their largest label; with --class-names none are read")
    largest = largest_label(paths, ignored, reduce_zero_label)
    if largest < 1:
        raise UserError(
            f"the masks in {shown(str(root))} have a single class, besides the ignored label {ignored}: there is "
            "nothing to learn from them; see --ignore-label and --reduce-zero-label"
        )
    if largest >= MOST_CLASSES:
        raise UserError(
            f"the masks in {shown(str(root))} have labels up to {largest + reduce_zero_label}; there can be "
            f"{MOST_CLASSES} classes at most: renumber them, or give --ignore-label"
        )
    return [str(label) for label in range(largest + 1)]


SETS: Mapping[str, Callable[[Path, bool, Options], Files]] = {
    "ADE20K": ade20k,
    "CITYSCAPES": cityscapes,
    "VOC": voc,
    "FOLDER": folder,
}
