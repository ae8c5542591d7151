"""Hugging Face's data sets, through timm's reader."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from PIL import Image

from errors import BAD_ARGUMENT, UserError, reason
from images.decode import Found, decode
from utils import broadcast_object

EVALUATION_SPLITS = ("validation", "val", "test")  # of a Hugging Face set: the first that it has
NAME = "datasets"  # of Hugging Face's package, and of a file of this project
ROOT = Path(__file__).resolve().parents[1]


def hugging_face_set(name: str, is_train: bool, root: str | None) -> Found:
    """`hfds/NAME`: its split `train`, and for evaluation the first of EVALUATION_SPLITS that it has."""
    source = name.removeprefix("hfds/"), root, ("train",) if is_train else EVALUATION_SPLITS
    opened: list[Table] = []
    broadcast_object(lambda: opened.append(Table(*source)))  # the main process fills the package's cache first
    table = opened[0] if opened else Table(*source)
    return Found(table.samples, table.num_classes, table.read)


class Table:
    """A split of a Hugging Face data set with the columns `image` and `label`.

    Args:
        name: as the package's load_dataset takes it: of a data set on the hub, or a folder.
        root: the package's cache; its usual one if None.
        splits: the first that there is will be read.
    """

    def __init__(self, name: str, root: str | None, splits: Sequence[str]) -> None:
        self.source = name, root, splits
        with hugging_face():
            if find_spec(NAME) is None:
                raise UserError(f"--data-set hfds/{name} needs Hugging Face's package: pip install datasets")
            try:
                self.reader = _open_split(name, root, splits)
                labels = list(self.reader.dataset[self.reader.label_key])
            except BAD_ARGUMENT as error:
                raise UserError(f"cannot read --data-set hfds/{name}: {reason(error)}") from error
        self.num_classes = len(self.reader.class_to_idx)
        if not self.num_classes or not all(label in range(self.num_classes) for label in labels):
            raise UserError(f"--data-set hfds/{name} is not labelled by named classes; use another data set")
        self.samples = list(enumerate(labels))

    def __reduce__(self) -> tuple[type[Table], tuple[Any, ...]]:
        return Table, self.source  # a worker that is not forked opens it again

    def read(self, row: int) -> Image.Image:
        """Decode the image of a row."""

        def read() -> IO[bytes]:
            with hugging_face():
                file: IO[bytes] = self.reader[row][0]
            return file

        return decode(read, f"{row} of hfds/{self.source[0]}")


def _open_split(name: str, root: str | None, splits: Sequence[str]) -> Any:
    from timm.data.readers.reader_hfds import ReaderHfds

    for split in splits[:-1]:
        try:
            return ReaderHfds(name, root=root, split=split)
        except ValueError as error:
            if "Unknown split" not in str(error):
                raise
    return ReaderHfds(name, root=root, split=splits[-1])


@contextmanager
def hugging_face() -> Iterator[None]:
    """Inside, `import datasets` finds Hugging Face's package; outside, this project's file of the same name."""
    ours, path = sys.modules.pop(NAME, None), sys.path[:]
    sys.path[:] = [folder for folder in path if not _is_root(folder)]
    sys.modules.update(_THEIRS)
    try:
        yield
    finally:
        if NAME in sys.modules:
            _THEIRS[NAME] = sys.modules.pop(NAME)
        if ours is not None:
            sys.modules[NAME] = ours
        sys.path[:] = path


_THEIRS: dict[str, ModuleType] = {}  # Hugging Face's package, once it is imported


@cache
def _is_root(folder: str) -> bool:
    return Path(folder).resolve() == ROOT
