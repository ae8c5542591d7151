"""Labels of evaluation images that lie in no class folders: ImageNet's, as its authors and Kaggle pack it."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Sequence
from pathlib import Path

from errors import BAD_ARGUMENT, UserError, reason
from images.tree import few

KAGGLE = "LOC_val_solution.csv"  # columns ImageId, PredictionString: a synset, then boxes
TINY = "val_annotations.txt"  # Tiny-ImageNet's, in val/: file, synset, box


def beside(val: Path, root: Path) -> Path | None:
    """The list of labels that comes with Tiny-ImageNet, or with ImageNet from Kaggle, if there is one."""
    places = [val / TINY, *(folder / KAGGLE for folder in (root, *val.parents[:4]))]
    return next((path for path in places if path.is_file()), None)


def label_flat(
    images: Sequence[str], listed: Path, classes: Sequence[str] | None
) -> tuple[list[str], list[int], list[str]]:
    """Images in the order of their classes, then names; their labels; and the classes.

    Args:
        images: paths, whose last parts are the names in the list.
        listed: `LOC_val_solution.csv`; lines of a file name and a class; or one class a line, for the images in the
            order of their names: synsets, or the numbers of ImageNet's devkit, whose meta.mat must lie beside it.
        classes: the training half's; None takes those of the list.
    Raises:
        UserError: the list cannot be read, does not fit the images, or names classes that are not trained.
    """
    if not images:
        raise UserError(f"there are no images that {listed} could label; check --data-path")
    ordered = sorted(images, key=posixpath.basename)
    named = _class_of_each(ordered, listed)
    known = list(classes) if classes is not None else sorted(set(named))
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise UserError(
            f"{listed} names {len(unknown)} classes that have no training folder: {few(unknown)}; the training "
            f"folders are {few(known)}"
        )
    label_of = {name: label for label, name in enumerate(known)}
    labels = [label_of[name] for name in named]
    order = sorted(range(len(ordered)), key=lambda number: (labels[number], posixpath.basename(ordered[number])))
    return [ordered[number] for number in order], [labels[number] for number in order], known


def _class_of_each(images: Sequence[str], listed: Path) -> list[str]:
    """The class of each image, which are in the order of their names."""
    try:
        lines = [line for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the labels in {listed}: {reason(error)}") from error
    if lines and "," in lines[0]:
        rows = [[row[0], row[1].split()[0]] for row in csv.reader(lines) if len(row) > 1 and row[1].split()]
        rows = rows[1:] if rows and rows[0][0] == "ImageId" else rows
    else:
        rows = [line.split("\t") if "\t" in line else line.split() for line in lines]
    if not rows or any(len(row) < 2 for row in rows):
        return _one_a_line(images, [row[0] for row in rows], listed)
    class_of = {posixpath.basename(row[0]): row[1].strip() for row in rows}
    class_of |= {posixpath.splitext(name)[0]: label for name, label in class_of.items()}  # Kaggle's have no ending
    bases = [posixpath.basename(image) for image in images]
    missing = [name for name in bases if name not in class_of and posixpath.splitext(name)[0] not in class_of]
    if missing:
        raise UserError(f"{listed} has no label for {len(missing)} of {len(images)} images: {few(missing)}")
    found = [class_of.get(name) or class_of[posixpath.splitext(name)[0]] for name in bases]
    if all(name.isdigit() for name in found):
        raise UserError(
            f"{listed} gives classes as numbers, and nobody can tell whose; give a list with the names of the "
            "training folders"
        )
    return found


def _one_a_line(images: Sequence[str], names: list[str], listed: Path) -> list[str]:
    """The classes of a list without file names."""
    if len(names) != len(images):
        raise UserError(
            f"{listed} has {len(names)} lines, but there are {len(images)} images; it must have one for each, in "
            "the order of their names, or give file names"
        )
    return _of_devkit(names, listed) if all(name.isdigit() for name in names) else names


def _of_devkit(numbers: list[str], listed: Path) -> list[str]:
    """Synsets for the numbers of ImageNet's devkit, by its meta.mat. They are not labels, but in another order."""
    meta = listed.parent / "meta.mat"
    advice = "put the devkit's data/meta.mat beside it, or give a list of synsets"
    if not meta.is_file():
        raise UserError(f"{listed} numbers its classes as ImageNet's devkit does, but there is no {meta}: {advice}")
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise UserError(f"reading {meta} needs scipy: pip install scipy, or give a list of synsets") from error
    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        name_of = {str(int(each["ILSVRC2012_ID"])): str(each["WNID"]) for each in synsets}
        return [name_of[str(int(number))] for number in numbers]
    except (*BAD_ARGUMENT, KeyError, OSError, MatReadError) as error:
        raise UserError(f"{meta} is not ImageNet's: {reason(error)}; {advice}") from error
