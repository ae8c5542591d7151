"""Data sets that are folders: one folder of images per class, as ImageNet comes; also as Kaggle packs it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from errors import UserError, shown
from images.found import Found, Samples, Texts
from images.tree import (
    Passed,
    check_tree,
    compare_classes,
    find_classes,
    is_hidden,
    is_image,
    order_note,
    sort_images,
)
from images.val_labels import beside, label_flat
from options.flags import Args
from utils import broadcast_object, print_main

PLACES = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # of train/ and val/ in --data-path; the last two are Kaggle's


def image_folder(root: Path, is_train: bool, args: Args) -> Found:
    """`train` (or `train_new`) and `val`, each with one folder per class; `val` may be flat, with a list of labels.

    Raises:
        UserError: they are not there, not of this form, or do not agree.
    """
    halves = ("train", "train_new", "val")
    top = next((root / place for place in PLACES if any((root / place / half).is_dir() for half in halves)), root)
    train, val = top / "train", top / "val"
    if (top / "train_new").is_dir():
        train = top / "train_new"
    folder, other = (train, val) if is_train else (val, train)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data-path must hold train/ and val/ with a folder per class")
    if not is_train and args.val_labels and not is_flat(val):
        raise UserError(f"{val} has class folders, which say what --val-labels would: drop the flag")
    if not is_train and (listed := args.val_labels or beside(val, root)) and is_flat(val):
        classes = class_folders(train, args.single_class) if train.is_dir() else None
        return _flat(val, Path(listed), classes)
    sources, labels, classes = _read(folder, args.single_class)
    if other.is_dir() and not (is_train and is_flat(other)):
        compare_classes(train, val, *_in_order(is_train, classes, class_folders(other, args.single_class)))
    if is_train and (note := order_note(classes)):
        print_main(note)
    return Found(Samples(sources, labels), classes)


def _in_order(is_train: bool, own: list[str], others: list[str]) -> tuple[list[str], list[str]]:
    return (own, others) if is_train else (others, own)


def _read(folder: Path, single_class: bool) -> tuple[Texts, list[int], list[str]]:
    """Paths, labels and classes of half a data set; the main process looks for all."""

    def find() -> tuple[Texts, list[int], list[str]]:
        images, folders, passed = list_images(folder)
        tree = sort_images(images, folders, single_class)
        check_tree(tree, folder, images)
        for number in tree.loose:
            passed.add("images in no class folder", images[number])
        if passed.counts:
            print_main(f"skipped in {folder}: {passed}")
        return Texts((images[number] for number in tree.order), f"{folder}/"), tree.labels, tree.classes

    found: tuple[Texts, list[int], list[str]] = broadcast_object(find)
    return found


def _flat(folder: Path, listed: Path, classes: list[str] | None) -> Found:
    """A folder of images without class folders, whose labels stand in a file."""

    def find() -> tuple[Texts, list[int], list[str]]:
        images, _, passed = list_images(folder)
        names, labels, known = label_flat(images, listed, classes)
        print_main(f"labels of {folder} are those of {listed}")
        if passed.counts:
            print_main(f"skipped in {folder}: {passed}")
        return Texts(names, f"{folder}/"), labels, known

    sources, labels, known = broadcast_object(find)
    return Found(Samples(sources, labels), known)


# ------------------------------------------------------------------------------------------------------------
# Looking into folders


def list_images(folder: Path) -> tuple[list[str], list[str], Passed]:
    """The images below a folder, and all folders, as paths relative to it; and what else there is.

    Raises:
        UserError: a folder cannot be read, or something with the name of an image or a tar file is no file.
    """
    images: list[str] = []
    folders: list[str] = []
    passed = Passed()
    for inner, names in walk(folder, passed):
        folders.append(inner)
        for name in names:
            path = f"{inner}/{name}" if inner else name
            if not passed.file(path):
                images.append(path)
    return images, folders, passed


def walk(top: Path, passed: Passed) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `top`, relative to it, and the files in it; links are followed, but never in a circle.

    Each folder is read once for each folder at the top that leads to it.

    Raises:
        UserError: a folder cannot be read, or something with the name of an image or a tar file is no file.
    """
    own = _identity(top)
    waiting: list[tuple[str, set[tuple[int, int]]]] = [("", {own})]
    while waiting:
        folder, seen = waiting.pop()
        files: list[str] = []
        for entry in _entries(top / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                passed.add("hidden", path)
            elif entry.is_dir():
                branch = seen if folder else {own}
                identity = _identity(top / path)
                if identity in branch:
                    passed.add("folders that were read already", path)
                else:
                    branch.add(identity)
                    waiting.append((path, branch))
            elif entry.is_file():
                files.append(entry.name)
            else:
                _pass_over(top / path, path, passed)
        yield folder, files


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {shown(str(folder))}: {error.strerror}; make it readable, or move it elsewhere"
        ) from error


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _pass_over(path: Path, name: str, passed: Passed) -> None:
    """Count what is neither a file nor a folder; one with the name of an image or a tar file is refused."""
    broken = not path.exists()
    if is_image(name) or name.lower().endswith(".tar"):
        what = "a link that leads nowhere" if broken else _what(path)
        raise UserError(f"{shown(str(path))} is {what}, not a file: repair or remove it")
    passed.add("broken links" if broken else "devices, FIFOs and sockets", name)


def _what(path: Path) -> str:
    mode = path.stat().st_mode
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def class_folders(folder: Path, single_class: bool) -> list[str]:
    """The classes of half a data set, without a look into the class folders; the main process looks for all."""

    def find() -> list[str]:
        classes = find_classes(lambda inner: _look(folder, inner), single_class)[1]
        if not classes:
            raise UserError(f"{folder} holds no class folders; it must hold one folder of images per class")
        return classes

    found: list[str] = broadcast_object(find)
    return found


def _look(top: Path, folder: str) -> tuple[list[str], bool]:
    """The folders in a folder, and whether images lie in it."""
    above = {_identity(path) for path in (top / folder, *(top / folder).parents)}
    entries = [entry for entry in _entries(top / folder) if not is_hidden(entry.name)]
    folders = [entry.name for entry in entries if entry.is_dir() and _identity(Path(entry.path)) not in above]
    return sorted(folders), any(is_image(entry.name) and not entry.is_dir() for entry in entries)


def is_flat(folder: Path) -> bool:
    """Whether a folder holds images, but no class folders: none at all, or one of the name `images`."""
    folders, images = _look(folder, "")
    return (images and not folders) or (folders == ["images"] and not images)
