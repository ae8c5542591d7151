"""Which files of a tree are images, and which class each belongs to: one rule for folders, tar files and shards.

A tree is known by the paths of its files relative to its top, with '/' between parts. So one tree has one answer,
however it was packed.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

from PIL import Image

from errors import UserError, shown

# Formats that Pillow can identify, but not decode by itself.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# A folder of one of these names, alone at the top, is half of a data set and no class.
HALVES = ("train", "train_new", "training", "val", "valid", "validation", "test")
FEW = 3  # examples in a message
NAME = 100  # characters of each that are shown
MOST_CLASSES = 100_000  # of labels that are plain numbers
LONGEST_NUMBER = 1000  # digits of a name that is taken for a number


# ------------------------------------------------------------------------------------------------------------
# What is an image


@cache
def endings() -> frozenset[str]:
    """What the names of images end in, in small letters: the endings of all that Pillow decodes."""
    Image.init()
    decoded = {
        ending
        for ending, form in Image.registered_extensions().items()
        if form in Image.OPEN and form not in NOT_DECODED
    }
    return frozenset(decoded | {".mpo"})  # which Pillow opens as a JPEG


def split(path: str) -> tuple[str, str]:
    """A path without its ending, and that, in small letters, with the dot; '' for none, or a hidden file."""
    dot = path.rfind(".")
    if dot <= path.rfind("/") + 1:
        return path, ""
    return path[:dot], path[dot:].lower()


def ending(path: str) -> str:
    """What a file's name ends in, in small letters, with the dot; '' for none."""
    return split(path)[1]


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return ending(name) in endings()


def clean(name: str) -> str:
    """A path as it is in a tree: without a leading '/', './' or '../', and with single slashes."""
    path = posixpath.normpath(name).lstrip("/")
    while path.startswith("../"):
        path = path[3:]
    return "" if path in (".", "..") else path


def is_hidden(part: str) -> bool:
    """Whether a file or folder is none of the data: hidden, or what macOS adds to archives."""
    return part.startswith(".") or part == "__MACOSX"


class Passed:
    """Counts what a reader passes over, by kind, with an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        """Count one more; `name` says which."""
        self.counts[kind] += 1
        self._examples.setdefault(kind, name)

    def file(self, path: str) -> bool:
        """Count a file, if it is none of the images; whether it is."""
        parts = path.split("/")
        if any(is_hidden(part) for part in parts):
            self.add("hidden", path)
        elif not is_image(parts[-1]):
            self.add(ending(parts[-1]) or "without an ending", path)
        else:
            return False
        return True

    def __str__(self) -> str:
        kinds = [
            f"{count} {shown(kind, 40)} (e.g. {shown(self._examples[kind], NAME)})"
            for kind, count in self.counts.most_common()
        ]
        return ", ".join(kinds)


# ------------------------------------------------------------------------------------------------------------
# Which folders are the classes

Look = Callable[[str], tuple[Sequence[str], bool]]  # a folder -> the folders in it, and whether images lie in it


def find_classes(look: Look, single_class: bool = False) -> tuple[str, list[str]]:
    """The folder that holds the class folders, and their names in the order of their labels.

    The classes are the folders of the first level that has more than one. So folders that only wrap others do not
    matter: `./`, `train/`, `data/train/`. What lies deeper belongs to the class folder around it.

    Args:
        look: shows a folder of the tree; '' is its top. Hidden folders do not count.
        single_class: a folder alone is a class, unless it has the name of half a data set.
    Returns:
        ('', ...) if the top itself holds them; no classes if images lie in no folder.
    """
    root = ""
    folders, direct = look(root)
    while len(folders) == 1 and not direct:
        inner = posixpath.join(root, folders[0])
        inside, images = look(inner)
        if images or not inside or (single_class and folders[0].lower() not in HALVES):
            break
        root, folders = inner, inside
    if len(folders) == 1 and not single_class:
        return _outermost(look, root, folders)
    return root, sorted(folders)


def _outermost(look: Look, root: str, folders: Sequence[str]) -> tuple[str, list[str]]:
    """A tree of one class: it has the name of the outermost folder that is not half a data set."""
    parts = posixpath.join(root, folders[0]).split("/")
    named = [number for number, part in enumerate(parts) if part.lower() in HALVES and number + 1 < len(parts)]
    first = named[-1] + 1 if named else 0
    return "/".join(parts[:first]), [parts[first]]


class Tree(NamedTuple):
    """A tree's images and classes.

    Attributes:
        classes: their names, sorted; empty if no image lies in a folder.
        order: which of the paths are images of a class, ordered by class, folder and name.
        labels: of these.
        loose: images that lie in no class folder.
        empty: classes without an image.
    """

    classes: list[str]
    order: list[int]
    labels: list[int]
    loose: list[int]
    empty: list[str]


def sort_images(paths: Sequence[str], folders: Iterable[str] = (), single_class: bool = False) -> Tree:
    """Classes and labels of a tree.

    Args:
        paths: of its images, clean.
        folders: of which it is known that they exist, also those without an image.
        single_class: as in `find_classes`.
    """
    inside: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        inside.setdefault(posixpath.dirname(path), []).append(number)
    children: dict[str, set[str]] = {"": set()}
    for folder in {*inside, *folders}:
        while folder and not any(is_hidden(part) for part in folder.split("/")):
            above, name = posixpath.split(folder)
            children.setdefault(above, set()).add(name)
            folder = above
    root, classes = find_classes(lambda folder: (sorted(children.get(folder, ())), folder in inside), single_class)
    label_of = {posixpath.join(root, name): label for label, name in enumerate(classes)}
    depth = root.count("/") + 2 if root else 1
    found: dict[str, int] = {}
    for folder in inside:
        label = label_of.get("/".join(folder.split("/")[:depth]))
        if label is not None:
            found[folder] = label
    order: list[int] = []
    labels: list[int] = []
    for folder in sorted(found, key=lambda folder: (found[folder], folder)):
        order += sorted(inside[folder], key=lambda number: posixpath.basename(paths[number]))
        labels += [found[folder]] * len(inside[folder])
    loose = [number for folder, numbers in inside.items() if folder not in found for number in numbers]
    filled = set(found.values())
    return Tree(classes, order, labels, loose, [name for n, name in enumerate(classes) if n not in filled])


# ------------------------------------------------------------------------------------------------------------
# What is said of them


def check_tree(tree: Tree, where: object, paths: Sequence[str]) -> None:
    """Refuse a tree whose images have no classes, or whose classes have no images.

    Raises:
        UserError: with what to do.
    """
    where = shown(str(where))
    if not tree.classes and not tree.loose:
        raise UserError(f"{where} holds no images; it must hold one folder of images per class")
    if not tree.order and tree.loose:
        example = shown(paths[tree.loose[0]])
        raise UserError(
            f"{where} holds images that are in no class folder, e.g. {example}; it must hold one folder per class, "
            "or, for evaluation, their labels must stand in a file that --val-labels names"
        )
    if tree.empty:
        more = f" (and {len(tree.empty) - 1} more)" if len(tree.empty) > 1 else ""
        raise UserError(
            f"class folder {shown(tree.empty[0])}{more} of {where} holds no images that Pillow reads; add some, or "
            "remove the folder from both halves"
        )


def compare_classes(train: object, val: object, classes: Sequence[str], others: Sequence[str]) -> None:
    """Refuse halves with different class folders: their labels would mean different things."""
    differing = sorted(set(classes) ^ set(others))
    if differing:
        only = [name for name in differing if name in set(classes)]
        lists = [f"only {train}: {few(only)}"] if only else []
        lists += [f"only {val}: {few(sorted(set(others) - set(classes)))}"] if len(only) < len(differing) else []
        raise UserError(
            f"{train} and {val} must hold the same class folders, but {len(differing)} are in only one of "
            f"them, for example {shown(repr(differing[0]))} ({'; '.join(lists)})"
        )


def few(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(shown(repr(name), NAME) for name in names[:FEW]) + more


def order_note(classes: Sequence[str]) -> str:
    """A line for classes that are named by numbers, but not in the order of the numbers; else ''."""
    if not all(name.isascii() and name.isdigit() and len(name) < LONGEST_NUMBER for name in classes):
        return ""
    by_number = sorted(classes, key=int)
    wrong = next((label for label, name in enumerate(classes) if by_number[label] != name), None)
    if wrong is None:
        return ""
    return (
        f"note: the classes are named by numbers, but sorted as text, as in torchvision: label {wrong} is "
        f"{shown(classes[wrong], NAME)}, not {shown(by_number[wrong], NAME)}"
    )
