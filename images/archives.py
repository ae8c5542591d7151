"""Images inside tar files: where they are, so that each can be read by itself, in any order and by any process."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from errors import UserError, shown
from images.decode import decode
from images.found import Found, Samples, Texts
from images.tar_index import FOLDER, LINK, PACKED_TARS, SPARSE, SPECIAL, Members, read_members
from images.tree import (
    Passed,
    check_tree,
    compare_classes,
    is_image,
    order_note,
    sort_images,
)
from images.val_labels import label_flat
from options.flags import Args
from utils import broadcast_object, print_main


class Stored(NamedTuple):
    """An image inside a tar file: the bytes from `offset` on."""

    path: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def open(self) -> IO[bytes]:
        """The image's bytes. The tar file is opened for them alone: processes can share no position in it."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


class Places(Sequence[Stored]):
    """Where many images are, as arrays.

    Args:
        paths: of the tar files.
        files: which of them each image is in, int32 [N].
        offsets, sizes: int64 [N].
        names: of the images.
    """

    def __init__(
        self, paths: Sequence[str], files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, names: Texts
    ) -> None:
        self.paths, self.files, self.offsets, self.sizes, self.names = paths, files, offsets, sizes, names

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        place = int(self.offsets[index]), int(self.sizes[index])
        return Stored(self.paths[self.files[index]], *place, self.names[index])

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What tells other images from these: their names and sizes."""
        return (*self.names.arrays(), self.sizes)


def load_stored(image: Stored) -> Image.Image:
    """Decode an image inside a tar file, as `load_image` does."""
    return decode(image.open, str(image))


# ------------------------------------------------------------------------------------------------------------
# What is in one tar file


class Contents(NamedTuple):
    """The files of a tar file that may matter, by name; of a name that comes twice the last one.

    Attributes:
        members: all members.
        rows: name -> which member holds its bytes.
        folders: all folders' names.
    """

    members: Members
    rows: dict[str, int]
    folders: set[str]


def contents(path: Path, members: Members, passed: Passed) -> Contents:
    """Sort the members of a tar file, with links followed.

    Raises:
        UserError: something with an image's name is no file.
    """
    rows: dict[str, int] = {}
    links: dict[str, str] = {}
    folders: set[str] = set()
    for row, (name, kind) in enumerate(zip(members.names, members.kinds.tolist(), strict=True)):
        folders.add(name if kind == FOLDER else posixpath.dirname(name))
        if kind in (FOLDER, LINK, SPECIAL, SPARSE):
            rows.pop(name, None)
        links.pop(name, None)
        if kind == LINK:
            links[name] = members.notes[row]
        elif kind in (SPECIAL, SPARSE):
            what = "a device or a FIFO" if kind == SPECIAL else "stored with holes (tar --sparse)"
            if is_image(name):
                raise UserError(
                    f"{shown(f'{path}:{name}')} is {what}, not an image file: pack the tar file without it"
                )
            passed.add("devices and FIFOs" if kind == SPECIAL else "files with holes", name)
        elif kind != FOLDER:
            rows.pop(name, None)  # the last one counts, and in its place
            rows[name] = row
    for name in links:
        target = _target(name, links)
        if target in rows:
            rows[name] = rows[target]
        else:
            passed.add("links to folders" if target in folders else "broken links", name)
    return Contents(members, rows, folders - {""})


def _target(name: str, links: Mapping[str, str]) -> str:
    """Where a link leads in the end; '' for a circle."""
    for _ in range(len(links) + 1):
        if name not in links:
            return name
        name = links[name]
    return ""


# ------------------------------------------------------------------------------------------------------------
# Tar files of folders


def tar(root: Path, is_train: bool, args: Args) -> Found:
    """`train.tar` and `val.tar`: each holds one folder, or one tar file, of images per class.

    Raises:
        UserError: they are not there, not of this form, or do not agree.
    """
    train, val = root / "train.tar", root / "val.tar"
    path = train if is_train else val
    if not path.is_file():
        packed = [name for end in PACKED_TARS if (name := f"{path.stem}{end}") and (root / name).exists()]
        advice = f"; {packed[0]} is compressed, unpack it" if packed else ""
        raise UserError(
            f"no file {path}{advice}; --data-path must hold train.tar and val.tar with a folder per class"
        )
    if args.val_labels:
        return _flat_tar(train, val, is_train, args)
    found = _tar_half(path, args.output_dir, args.single_class)
    if is_train and val.is_file():  # the other way round an evaluation would read all of train.tar
        compare_classes(train, val, found.classes, _tar_half(val, args.output_dir, args.single_class).classes)
    if is_train and (note := order_note(found.classes)):
        print_main(note)
    return found


def _tar_half(path: Path, output_dir: str, single_class: bool) -> Found:
    """A tar file of class folders; the main process looks for all."""

    def find() -> Found:
        names, places, folders, passed = _tar_images(path, output_dir)
        tree = sort_images(names, folders, single_class)
        check_tree(tree, path, names)
        for number in tree.loose:
            passed.add("images in no class folder", names[number])
        if passed.counts:
            print_main(f"skipped in {path}: {passed}")
        return Found(Samples(pick(places, tree.order), tree.labels), tree.classes, load_stored)

    found: Found = broadcast_object(find)
    return found


def _flat_tar(train: Path, val: Path, is_train: bool, args: Args) -> Found:
    """As `tar`, where `val.tar` is flat and --val-labels names the list of its labels."""
    trained = _tar_half(train, args.output_dir, args.single_class) if train.is_file() else None
    if is_train and trained is not None:
        return trained
    classes = trained.classes if trained is not None else None

    def find() -> Found:
        names, places, folders, passed = _tar_images(val, args.output_dir)
        if len(sort_images(names, folders).classes) > 1:
            raise UserError(f"{val} has class folders, which say what --val-labels would: drop the flag")
        labelled, labels, known = label_flat(names, Path(args.val_labels), classes)
        if passed.counts:
            print_main(f"skipped in {val}: {passed}")
        number_of = {name: number for number, name in enumerate(names)}
        return Found(Samples(pick(places, [number_of[name] for name in labelled]), labels), known, load_stored)

    found: Found = broadcast_object(find)
    return found


def _tar_images(path: Path, output_dir: str) -> tuple[list[str], Places, set[str], Passed]:
    """The images of a tar file: their names, their places, all folders, and what else there is."""
    (members,) = read_members([path], f".{path.name}.index.npz", index_folders(path.parent, output_dir))
    passed = Passed()
    held = contents(path, members, passed)
    names = [name for name in held.rows if not passed.file(name)]
    rows = np.array([held.rows[name] for name in names], np.int64)
    files = np.zeros(len(rows), np.int32)
    return (
        names,
        Places([str(path)], files, members.offsets[rows], members.sizes[rows], Texts(names)),
        held.folders,
        passed,
    )


def index_folders(folder: Path, output_dir: str) -> list[Path]:
    """Where an index may be: beside the data, else beside the run."""
    return [folder, Path(output_dir)] if output_dir else [folder]


def pick(places: Places, order: Sequence[int]) -> Places:
    rows = np.array(order, np.int64)
    names = Texts(places.names[row] for row in order)
    return Places(places.paths, places.files[rows], places.offsets[rows], places.sizes[rows], names)
