"""WebDataset's shards: tar files whose members are samples, an image and its label each."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError, shown
from images.archives import Places, contents, index_folders, load_stored, pick
from images.folders import walk
from images.found import Found, Samples, Texts
from images.tar_index import PACKED_TARS, Members, fingerprint, read_members
from images.tree import (
    MOST_CLASSES,
    NAME,
    Passed,
    check_tree,
    compare_classes,
    ending,
    few,
    is_hidden,
    order_note,
    sort_images,
    split,
)
from options.flags import Args
from utils import broadcast_object, print_main


class Shards(NamedTuple):
    """The samples of one half's shards, in their order.

    Attributes:
        places: of the images.
        classes: the labels that there are, as texts, sorted; class folders, if no shard has a `.cls`.
        labels: of each sample, which of these: int32 [N].
        in_folders: whether the labels are class folders.
    """

    places: Places
    classes: list[str]
    labels: np.ndarray
    in_folders: bool

    @property
    def indices(self) -> bool:
        """Whether the labels are class indices."""
        return not self.in_folders and all(_is_index(label) for label in self.classes)


def shards(root: Path, is_train: bool, args: Args) -> Found:
    """WebDataset's shards: tar files with 'train', or with 'val', in their name or folder, also deeper.

    Raises:
        UserError: there are none, or not of this form, or the halves do not agree.
    """
    paths = _shard_paths(root)
    halves = {half: _read_half(root, half, paths[half], args) for half in ("train", "val") if paths[half]}
    own, half = halves.get("train" if is_train else "val"), "train" if is_train else "val"
    if own is None:
        raise UserError(f"no shards with images in {root}: tar files with {half!r} in their name or folder")
    classes = _common_classes(root, halves)
    if own.indices:
        return Found(Samples(own.places, np.array(own.classes, np.int32)[own.labels]), classes, load_stored)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name] for name in own.classes], np.int32)[own.labels]
    if own.in_folders and is_train and (note := order_note(classes)):
        print_main(note)
    return Found(Samples(own.places, labels), classes, load_stored)


def _common_classes(root: Path, halves: Mapping[str, Shards]) -> list[str]:
    """The classes of both halves, in the order of their labels.

    Raises:
        UserError: their labels are of different kinds, or validation has one that training lacks.
    """
    train = halves.get("train", halves.get("val"))
    val = halves.get("val", train)
    assert train is not None and val is not None  # there is one half at least
    if (train.in_folders, train.indices) != (val.in_folders, val.indices):
        raise UserError(
            f"the train and val shards in {root} are labelled in different ways: {few(train.classes)} and "
            f"{few(val.classes)}"
        )
    if train.in_folders:
        compare_classes(f"the train shards in {root}", "the val shards", train.classes, val.classes)
    unknown = sorted(set(val.classes) - set(train.classes), key=int if val.indices else str)
    if unknown:
        raise UserError(
            f"the val shards in {root} have images of class {shown(unknown[0], NAME)}, the train shards none: "
            f"their classes are {few(train.classes)}, those of the val shards {few(val.classes)}"
        )
    return [str(label) for label in range(int(train.classes[-1]) + 1)] if train.indices else train.classes


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _shard_paths(root: Path) -> dict[str, list[Path]]:
    """The shards of each half; the main process looks for all."""

    def find() -> dict[str, list[Path]]:
        paths: dict[str, list[Path]] = {"train": [], "val": [], "": []}
        for folder, names in walk(root, Passed()):
            for name in names:
                path = posixpath.join(folder, name)
                halves = [half for half in ("train", "val") if half in path.lower()]
                if path.lower().endswith(PACKED_TARS) and halves:
                    raise UserError(
                        f"the shard {shown(str(root / path))} is compressed, so that its images cannot be read one "
                        "by one: unpack it to a plain .tar (e.g. gunzip), and remove the compressed one"
                    )
                if ending(name) != ".tar":
                    continue
                if len(halves) > 1:
                    raise UserError(
                        f"{shown(str(root / path))} has both 'train' and 'val' in its name or folder: rename it"
                    )
                paths[halves[0] if halves else ""].append(root / path)
        if paths[""]:
            example = shown(paths[""][0].name, NAME)
            print_main(f"skipped in {root}: {len(paths[''])} tar files of neither half (e.g. {example})")
        return {half: sorted(found) for half, found in paths.items()}

    found: dict[str, list[Path]] = broadcast_object(find)
    return found


def _read_half(root: Path, half: str, paths: Sequence[Path], args: Args) -> Shards:
    """The samples of one half's shards, read once for both halves of the data set, unless the files change."""
    state: bytes = broadcast_object(lambda: b"".join(fingerprint(path) for path in paths))
    return _shards_of(root, half, tuple(paths), state, args.output_dir, args.single_class)


@cache
def _shards_of(
    root: Path, half: str, paths: tuple[Path, ...], state: bytes, output_dir: str, single_class: bool
) -> Shards:
    """The samples of one half's shards, which are in this state; the main process looks for all."""

    def find() -> Shards:
        members = read_members(paths, f".{half}.index.npz", index_folders(root, output_dir))
        passed = Passed()
        shards = [_samples(path, each, passed) for path, each in zip(paths, members, strict=True)]
        labelled = any(shard.labels for shard in shards)
        for path, shard in zip(paths, shards, strict=True):
            if labelled:
                _check_pairs(path, shard)
        chosen = [shard.images if labelled else shard.alone for shard in shards]
        places = _gather(paths, members, chosen)
        if labelled:
            texts = [shard.labels[key] for shard in shards for key in shard.images]
            found = _by_label(places, texts, root, half)
        else:
            found = _by_folder(
                places, [folder for shard in shards for folder in shard.folders], root, passed, single_class
            )
        if passed.counts:
            print_main(f"skipped in the {half} shards: {passed}")
        return found

    found: Shards = broadcast_object(find)
    return found


class Shard(NamedTuple):
    """What one shard holds.

    Attributes:
        images: sample -> the name and member of its image, where it has a label.
        labels: sample -> what its `.cls` says.
        alone: image -> its name and member, where there is no label.
        folders: all folders.
    """

    images: dict[str, tuple[str, int]]
    labels: dict[str, str]
    alone: dict[str, tuple[str, int]]
    folders: set[str]


def _samples(path: Path, members: Members, passed: Passed) -> Shard:
    """Pair the images of a shard with their labels: `key.jpg` (or another image) with `key.cls`.

    Raises:
        UserError: a sample has two images.
    """
    held = contents(path, members, passed)
    labels: dict[str, str] = {}
    found: list[tuple[str, str]] = []  # names of images, without and with their endings
    for name, row in held.rows.items():
        key, kind = split(name)
        if kind == ".cls" and not any(is_hidden(part) for part in name.split("/")):
            labels[key] = members.notes[row]
        elif not passed.file(name):
            found.append((key, name))
    images: dict[str, tuple[str, int]] = {}
    alone: dict[str, tuple[str, int]] = {}
    for key, name in found:
        place = name, held.rows[name]
        if key in labels and key in images:
            raise UserError(
                f"the shard {shown(str(path))} has {shown(key)} twice; a sample is one image and its class index"
            )
        if key in labels:
            images[key] = place
        elif "." in posixpath.basename(key) and posixpath.join(posixpath.dirname(key), _first(key)) in labels:
            passed.add("further images of a sample", name)
        else:
            alone[name] = place
    return Shard(images, labels, alone, held.folders)


def _first(key: str) -> str:
    """A file's name up to its first dot, where WebDataset ends a key."""
    return posixpath.basename(key).partition(".")[0]


def _check_pairs(path: Path, shard: Shard) -> None:
    """Refuse a shard of labelled samples with an image or a label alone."""
    lack = ""
    if shard.alone:
        name = next(iter(shard.alone))
        lack = f"{shown(name)} without {shown(posixpath.splitext(name)[0])}.cls"
    elif missing := shard.labels.keys() - shard.images.keys():
        lack = f"{shown(min(missing))}.cls without an image"
    if lack:
        raise UserError(f"the shard {shown(str(path))} has {lack}; a sample is an image and its class index")
    empty = next((key for key in shard.images if not shard.labels[key]), None)
    if empty is not None:
        raise UserError(f"the label {shown(empty)}.cls in the shard {shown(str(path))} is empty, not a class index")


def _gather(
    paths: Sequence[Path], members: Sequence[Members], chosen: Sequence[Mapping[str, tuple[str, int]]]
) -> Places:
    """The places of the chosen images of all shards."""
    rows = [np.array([row for _, row in each.values()], np.int64) for each in chosen]
    return Places(
        [str(path) for path in paths],
        np.repeat(np.arange(len(paths), dtype=np.int32), [len(each) for each in chosen]),
        np.concatenate([each.offsets[row] for each, row in zip(members, rows, strict=True)]),
        np.concatenate([each.sizes[row] for each, row in zip(members, rows, strict=True)]),
        Texts(name for each in chosen for name, _ in each.values()),
    )


def _by_label(places: Places, texts: Sequence[str], root: Path, half: str) -> Shards:
    """Samples whose labels are texts: all of them class indices, or all of them names."""
    classes = sorted(set(texts))
    odd = [label for label in classes if not _is_index(label)]
    if odd and len(odd) < len(classes):
        raise UserError(
            f"the labels of the {half} shards in {root} are class indices, but also {few(odd)}: give all classes "
            "indices, or all of them names"
        )
    if not odd and (most := max((int(label) for label in classes), default=0)) >= MOST_CLASSES:
        raise UserError(
            f"the {half} shards in {root} have the label {shown(str(most), NAME)}, but class indices are less than "
            f"{MOST_CLASSES:,}: number the classes 0, 1, ..."
        )
    if not odd:
        texts = [str(int(label)) for label in texts]
        classes = sorted(set(texts), key=int)
    number_of = {label: number for number, label in enumerate(classes)}
    return Shards(places, classes, np.array([number_of[text] for text in texts], np.int32), False)


def _by_folder(places: Places, folders: Sequence[str], root: Path, passed: Passed, single_class: bool) -> Shards:
    """Samples of shards without any label: a tree of class folders, in pieces."""
    tree = sort_images(places.names, folders, single_class)
    if not tree.order and len(places):
        name = places.names[0]
        stem = posixpath.splitext(name)[0]
        raise UserError(
            f"the shard {shown(places[0].path)} has {shown(name)} without {shown(stem)}.cls; a sample is an "
            "image and its class index, or all images lie in class folders"
        )
    check_tree(tree, f"the shards in {root}", places.names)
    for number in tree.loose:
        passed.add("images in no class folder", places.names[number])
    return Shards(pick(places, tree.order), tree.classes, np.array(tree.labels, np.int32), True)
