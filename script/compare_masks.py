"""Scores of predicted masks, and one page that shows several networks' side by side.

    python script/compare_masks.py plain=runs/plain/predictions diverse=runs/diverse/predictions \\
        --data-set DIGITS --output runs/masks.html

The folders are those of `python -m segmentation --eval --predictions FOLDER`. Exit codes: 0 done, 2 something given
cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import program
from ending import finish
from errors import UserError, reason, shown
from options.parser import Parser
from segmentation.images import SegmentedImages
from segmentation.layouts import Options
from segmentation.masks import read_names
from segmentation.page import Scores, Shown, render
from segmentation.predictions import MASKS, evenly, name_of
from segmentation.scores import Confusion
from segmentation.sets import DATA_SETS, find_pairs
from segmentation.transforms import RECIPES, Training, Whole
from utils import write_atomically

PROGRAM = "compare_masks.py"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("networks", nargs="+", metavar="NAME=FOLDER", help="a network, and what it has predicted")
    parser.add_argument("--data-set", required=True, choices=list(DATA_SETS), help="as for python -m segmentation")
    parser.add_argument("--data-path", default="", metavar="FOLDER", help="of the data set (DIGITS needs none)")
    parser.add_argument("--class-file", default="", metavar="FILE", help="names of the classes (FOLDER)")
    parser.add_argument("--ignore-label", type=int, metavar="N", help="pixels that count nowhere (FOLDER)")
    parser.add_argument("--reduce-zero-label", action="store_true", help="number 0 counts nowhere (FOLDER)")
    parser.add_argument("--pictures", type=int, default=20, metavar="N", help="images on the page (20)")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    return finish(PROGRAM, lambda: run(get_args_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Count all masks, print the scores, and write the page."""
    folders = folders_of(args.networks)
    names = read_names(args.class_file) if args.class_file else ()
    said = Options(names, args.ignore_label, args.reduce_zero_label)
    pairs = find_pairs(args.data_set, args.data_path, False, said)
    recipe = RECIPES[args.data_set]
    images = SegmentedImages(pairs, Training(recipe), Whole(recipe))
    chosen = evenly(len(images), args.pictures)
    counted = {name: Confusion(pairs.classes) for name in folders}
    pictures: list[Shown] = []
    for index in range(len(images)):
        (image, truth), _ = images.decode(index)
        read = {name: predicted(folder, images, index, truth.shape) for name, folder in folders.items()}
        for name, labels in read.items():
            counted[name].add(torch.from_numpy(labels), torch.from_numpy(np.array(truth)))
        if index in chosen:
            pictures.append(Shown(name_of(images, index), np.asarray(image), truth, read))
    found = {name: scores.result() for name, scores in counted.items()}
    for name, result in found.items():
        print(f"{name}: mIoU {100 * result.mean_iou:.2f}%, pixels right {100 * result.all_accuracy:.2f}%")
    on_page = {
        name: Scores({"mIoU": result.mean_iou, "pixels right": result.all_accuracy}, {"IoU": result.iou})
        for name, result in found.items()
    }
    about = {
        "data set": args.data_set,
        "images": len(images),
        **{name: str(path) for name, path in folders.items()},
    }
    page = render(f"Segmentation of {args.data_set}", pictures, on_page, pairs.classes, pairs.palette, about)
    try:
        with program.leaving_nothing(PROGRAM):
            write_atomically(Path(args.output), lambda file: file.write(page.encode()))
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {reason(error)}") from error
    print(f"written: {args.output}")


def folders_of(networks: Sequence[str]) -> Mapping[str, Path]:
    """The networks' folders of masks, by name.

    Raises:
        UserError: one has no name, or another's, or no masks.
    """
    found: dict[str, Path] = {}
    for text in networks:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in found:
            raise UserError(f"{shown(text)} is not NAME=FOLDER with a name of its own")
        found[name] = Path(folder).expanduser() / MASKS
        if not found[name].is_dir():
            raise UserError(f"{found[name]} is no folder: {name} has no predictions; write them with --predictions")
    return found


def predicted(folder: Path, images: SegmentedImages, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """The predicted mask of an image, uint8 [H, W].

    Raises:
        UserError: it is missing, cannot be read, or is of another size or other classes.
    """
    path = folder / f"{name_of(images, index)}.png"
    try:
        labels = np.array(Image.open(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; predict with --data-set as here") from error
    if labels.dtype != np.uint8 or labels.shape != shape or labels.max() >= len(images.pairs.classes):
        raise UserError(f"{path} does not fit its image of {shape[1]} x {shape[0]} pixels: predict it anew")
    return labels


if __name__ == "__main__":
    program.begin(PROGRAM)
    program.leave(main())
