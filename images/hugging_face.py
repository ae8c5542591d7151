"""Hugging Face's data sets: which columns hold images and labels, and what both halves call the classes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from PIL import Image

from errors import BAD_ARGUMENT, UserError, did_you_mean, reason, shown
from images.decode import decode
from images.found import Found, Samples
from images.tree import MOST_CLASSES, few, order_note
from options.flags import Args
from utils import broadcast_object, print_main

TRAINING_SPLITS = ("train", "training")  # the first that there is
EVALUATION_SPLITS = ("validation", "val", "test")
IMAGE_NAMES = ("image", "img")  # columns, where several are of the right type: the first that there is
LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels", "class", "target")
NAME = "datasets"  # of Hugging Face's package, and of a file of this project
ROOT = Path(__file__).resolve().parents[1]


def hugging_face_set(args: Args, is_train: bool) -> Found:
    """`hfds/NAME`, with the labels of its training split in both halves.

    Raises:
        UserError: it cannot be read, has no such columns, or its splits have different classes.
    """
    opened: list[tuple[Table | None, Table | None]] = []
    broadcast_object(lambda: opened.append(_open_halves(args)))  # the main process fills the package's cache first
    train, val = opened[0] if opened else _open_halves(args)
    table, other = (train, val) if is_train else (val, train)
    if table is None:
        wanted, splits = ("training", TRAINING_SPLITS) if is_train else ("evaluation", EVALUATION_SPLITS)
        raise UserError(f"--data-set {args.data_set} has no split for {wanted}: none of {', '.join(splits)}")
    classes = common_classes(train or table, val or table, args.data_set)
    labels = table.labels_in(classes)
    if is_train or other is None:
        absent = [classes[label] for label in np.setdiff1d(np.arange(len(classes)), labels)]
        print_main(
            f"{args.data_set}: images of column {shown(repr(table.image_key))}, labels of column "
            f"{shown(repr(table.label_key))}, "
            f"{len(classes)} classes" + (f"; no image of {few(absent)} in {table.source[2]}" if absent else "")
        )
        if note := order_note(classes):
            print_main(note)
    return Found(Samples(range(len(table)), labels), classes, table.read, table.name_of)


def _open_halves(args: Args) -> tuple[Table | None, Table | None]:
    source = args.data_set.removeprefix("hfds/"), args.data_path, args.image_key, args.target_key
    train, val = (_first_split(*source, splits) for splits in (TRAINING_SPLITS, EVALUATION_SPLITS))
    return train, val


def _first_split(
    name: str, root: str | None, image_key: str, target_key: str, splits: Sequence[str]
) -> Table | None:
    """The first of some splits that a data set has; None if it has none of them."""
    for split in splits:
        try:
            return Table(name, root, split, image_key, target_key)
        except NoSuchSplitError:
            continue
    return None


class NoSuchSplitError(Exception):
    """A data set lacks a split."""


class Table:
    """A split of a Hugging Face data set.

    Args:
        name: as the package's load_dataset takes it: of a data set on the hub, or a folder.
        root: the package's cache; its usual one if None.
        split: which rows.
        image_key, target_key: the columns; '' chooses by type.

    Attributes:
        labels: of each row: class indices, or the classes' names.
        classes: the names of class indices 0, 1, ...; None if the labels are plain numbers or texts.
    """

    def __init__(self, name: str, root: str | None, split: str, image_key: str, target_key: str) -> None:
        self.source = name, root, split, image_key, target_key
        where = f"--data-set hfds/{name}"
        with hugging_face():
            if find_spec(NAME) is None:
                raise UserError(f"{where} needs Hugging Face's package: pip install datasets")
            rows = _load(name, root, split)
            features = rows.features
            self.image_key = choose(image_key, "--image-key", features, IMAGE_NAMES, IMAGE_TYPES, where)
            self.label_key = choose(target_key, "--target-key", features, LABEL_NAMES, LABEL_TYPES, where)
            own = _own_names(name, root, split, self.label_key)
            self.classes = own or getattr(features[self.label_key], "names", None)
            column = rows.select_columns([self.label_key]).with_format("arrow")[:][self.label_key]
            self.labels = _labels(column, f"split {split!r} of {where}")
            if not target_key:
                self._refuse_identifiers(where)
            self._rows = rows.select_columns([self.image_key]).cast_column(self.image_key, _undecoded())

    def _refuse_identifiers(self, where: str) -> None:
        """A column that only its type speaks for, with another value in each row, holds no labels."""
        guessed = self.classes is None and self.label_key not in LABEL_NAMES
        if guessed and 2 < len(self.labels) == len(np.unique(self.labels)):
            raise UserError(
                f"column {shown(repr(self.label_key))} of {where} is the only one that could hold labels, but "
                "differs in every row, as identifiers do: name the column of the labels by --target-key"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type[Table], tuple[Any, ...]]:
        return Table, self.source  # a worker that is not forked opens it again

    def labels_in(self, classes: Sequence[str]) -> np.ndarray:
        """The rows' labels as positions in a list of classes, int32 [rows]."""
        if self.classes is None and self.labels.dtype.kind == "i":
            return self.labels.astype(np.int32)
        position = {name: label for label, name in enumerate(classes)}
        if self.classes is None:
            return np.array([position[str(label)] for label in self.labels], np.int32)
        return np.array([position[name] for name in self.classes], np.int32)[self.labels]

    def name_of(self, row: int) -> str:
        """What to call a row's image in a message."""
        return f"{row} of hfds/{self.source[0]}, split {self.source[2]}"

    def read(self, row: int) -> Image.Image:
        """Decode the image of a row."""

        def read() -> IO[bytes]:
            with hugging_face():
                image = self._rows[row][self.image_key]
            if image is None:
                raise ValueError("there is none in this row")
            return io.BytesIO(image["bytes"]) if image["bytes"] is not None else open(image["path"], "rb")

        return decode(read, self.name_of(row))


# ------------------------------------------------------------------------------------------------------------
# Columns


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _is_encoded(feature: Any) -> bool:
    """The bytes of files, as parquet holds them that other programs wrote: plain, or beside the files' names."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"} and _is_encoded(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_class_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _is_integer(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string", "bool")


IMAGE_TYPES = [_is_image, _is_encoded]  # the first that there is
LABEL_TYPES = [_is_class_label, _is_integer, _is_text]


def choose(
    key: str,
    flag: str,
    features: Any,
    names: Sequence[str],
    types: Sequence[Callable[[Any], bool]],
    where: str,
) -> str:
    """The column that a flag names; else the first of the usual names; else the one of the first type there is.

    Raises:
        UserError: there is none, it has another type, or there are several.
    """
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    there = shown(columns, 1000)
    if key:
        if key not in features:
            raise UserError(
                f"{where} has no column {shown(repr(key))} for {flag}; it has {there}.{did_you_mean(key, features)}"
            )
        if not any(fits(features[key]) for fits in types):
            raise UserError(f"{flag} {shown(key)} of {where} is of another type; its columns are {there}")
        return key
    usual = [name for name in names if name in features]
    for name in usual:
        if any(fits(features[name]) for fits in types):
            return name
    if usual:
        raise UserError(
            f"column {shown(repr(usual[0]))} of {where} is of another type; choose by {flag}; its columns are "
            f"{there}"
        )
    for fits in types:
        found = [name for name, feature in features.items() if fits(feature)]
        if len(found) == 1:
            return found[0]
        if found:
            several = shown(", ".join(found), 1000)
            raise UserError(f"{where} has several columns that could be meant: {several}; choose by {flag}")
    raise UserError(f"{where} has no column for {flag}; its columns are {there}")


def _labels(column: Any, where: str) -> np.ndarray:
    """The labels of a split's rows, an arrow column: int64, or texts.

    Raises:
        UserError: they are hidden, or no class indices.
    """
    hidden = column.null_count
    labels: np.ndarray = column.drop_null().to_numpy()
    if labels.dtype.kind == "i":
        hidden += int((labels == -1).sum())
    if hidden:
        raise UserError(
            f"{where} hides {hidden} of its {len(column)} labels (-1 or none), as test splits do: use a data set "
            "with a labelled split, or another column (--target-key)"
        )
    if labels.dtype.kind not in "iu":
        return np.array([str(label) for label in labels], np.str_)
    if labels.min(initial=0) < 0:
        raise UserError(f"{where} has the label {labels.min()}, which is no class index")
    return labels.astype(np.int64)


def common_classes(train: Table, val: Table, where: str) -> list[str]:
    """The classes of both splits, in the order of the training split's labels.

    Raises:
        UserError: the splits have different classes.
    """
    if train.classes is not None and val.classes is not None:
        if sorted(train.classes) != sorted(val.classes):
            _differ(where, train.classes, val.classes)
        return list(train.classes)
    kinds = {(table.classes is None, table.labels.dtype.kind) for table in (train, val)}
    if len(kinds) > 1:
        _differ(where, _shown(train), _shown(val))
    if train.labels.dtype.kind == "i":
        most = max(int(table.labels.max(initial=-1)) for table in (train, val))
        if most >= MOST_CLASSES:
            raise UserError(
                f"--data-set {where} has the label {most} in column {shown(repr(train.label_key))}: these are no "
                "class indices 0, 1, ...; choose another column (--target-key), or number the classes"
            )
        return [str(label) for label in range(most + 1)]
    names = sorted({str(label) for label in train.labels})
    if {str(label) for label in val.labels} - set(names):
        _differ(where, names, _shown(val))
    return names


def _shown(table: Table) -> list[str]:
    """A split's classes, or the labels that occur in it."""
    return list(table.classes or (str(label) for label in np.unique(table.labels)))


def _differ(where: str, train: Sequence[str], val: Sequence[str]) -> None:
    only = sorted(set(val) - set(train)) or sorted(set(train) - set(val))
    raise UserError(
        f"the splits of --data-set {where} have different classes: {few(train)} in training, {few(val)} in "
        f"evaluation; only one of them has {few(only)}"
    )


# ------------------------------------------------------------------------------------------------------------
# The package, whose name is that of a file of this project


def _load(name: str, root: str | None, split: str) -> Any:
    """The rows of a split.

    Raises:
        NoSuchSplitError: there is none of this name.
        UserError: the data set cannot be read.
    """
    package = import_module(NAME)

    try:
        if _is_saved(name):
            saved = package.load_from_disk(name)
            if not hasattr(saved, "keys"):
                saved = {"train": saved}
            if split not in saved:
                raise NoSuchSplitError(split)
            return saved[split]
        return package.load_dataset(name, split=split, cache_dir=root)
    except (*BAD_ARGUMENT, import_module(f"{NAME}.exceptions").DatasetsError) as error:
        if "Unknown split" in str(error):
            raise NoSuchSplitError(split) from error
        raise UserError(f"cannot read --data-set hfds/{name}: {reason(error.__cause__ or error)}") from error


def _own_names(name: str, root: str | None, split: str, key: str) -> list[str] | None:
    """The classes' names as the files of a split have them, in a folder of parquet or arrow files; else None.

    load_dataset gives all splits the features of one of them, and keeps the labels' numbers. So where another split
    has the names in another order, its labels would change their meaning.

    Raises:
        UserError: the files of the split do not agree.
    """
    package = import_module(NAME)
    if not Path(name).is_dir() or _is_saved(name):
        return None
    files = package.load_dataset_builder(name, cache_dir=root).config.data_files or {}
    first: tuple[str, list[str]] | None = None
    for file in files.get(split, ()):
        names = getattr(_features(file).get(key), "names", None)
        if names and first and names != first[1]:
            raise UserError(
                f"{shown(first[0])} and {shown(file)} have different classes, or another order of them, in column "
                f"{shown(repr(key))}: "
                f"{few(first[1])} and {few(names)}; write the split anew with one list of classes"
            )
        first = first or (names and (file, names))
    return first[1] if first else None


def _features(file: str) -> Any:
    """The features that a parquet or arrow file carries; none if it is another file."""
    arrow, package = import_module("pyarrow"), import_module(NAME)
    if file.endswith(".parquet"):
        schema = import_module("pyarrow.parquet").read_schema(file)
    elif file.endswith(".arrow"):
        with arrow.memory_map(file) as opened:
            try:
                schema = arrow.ipc.open_stream(opened).schema
            except arrow.ArrowInvalid:
                schema = arrow.ipc.open_file(file).schema
    else:
        return {}
    return package.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}


def _is_saved(name: str) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any((Path(name) / file).is_file() for file in ("dataset_dict.json", "dataset_info.json"))


def _undecoded() -> Any:
    package = import_module(NAME)

    return package.Image(decode=False)


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
