"""Data sets: the door to images/. From `--data-set` and `--data-path` to decoded images and labels.

Where images are found and how they are decoded is in images/; how they become batches is in loaders.py. To read
data of another form, write a function there that returns a `Found`, and add its line to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from errors import UserError, did_you_mean
from images.archives import tar
from images.decode import load_image
from images.folders import image_folder
from images.found import Found, Sample
from images.hugging_face import hugging_face_set
from images.lists import cifar, digits, inaturalist
from images.shards import shards
from images.torchvision_sets import torchvision_set
from images.transforms import Box, Preprocessing, build_transform, check_sides, preprocessing, to_bytes
from options.flags import DATA_SETS, Args, sides

STREAMS = ("tfds", "hfids")  # timm's other sources of data
PREFIXES = ("wds", "torch")  # of names with a part of their own

Example = tuple[Tensor, int | Tensor, list[Box]]  # uint8 [C, H, W], label or mask [H, W], boxes to erase


class LabelledImages(Dataset[Example]):
    """Images with their labels. Reading one and transforming it are two steps: many views may follow one decode.

    Args:
        samples: of each image what `read` takes, and its label.
        transform: makes uint8 [C, H, W] of a decoded image.
        read: decodes an image.
        as_bytes: `--fast-resize`: decoded images are uint8 [3, H, W], not PIL images.
        name: what to call what `read` takes, in a message.
        size: height and width to which the transform resizes images.
        crop: how evaluation resizes them; too thin ones are refused. None: it does not.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Any], Tensor],
        read: Callable[[Any], Image.Image] = load_image,
        as_bytes: bool = False,
        name: Callable[[Any], str] = str,
        size: tuple[int, int] = (0, 0),
        crop: Preprocessing | None = None,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.read = read
        self.as_bytes = as_bytes
        self.name = name
        self.size = size
        self.crop = crop

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, index: int) -> tuple[Any, int]:
        """An image, ready for the transform, and its label.

        Raises:
            ImageError: it cannot be decoded, or is too thin to be resized.
        """
        source, label = self.samples[index]
        image = self.read(source)
        if self.crop is not None:
            check_sides(partial(self.name, source), *image.size, self.size, self.crop)
        return to_bytes(image) if self.as_bytes else image, label

    def example(self, decoded: Any, label: int) -> tuple[Tensor, int]:
        """What training takes of a decoded image and its label."""
        return self.transform(decoded), label

    def __getitem__(self, index: int) -> Example:
        """The image transformed, uint8 [C, H, W], its label, and no boxes to erase: what evaluation takes."""
        image, label = self.decode(index)
        return self.transform(image), label, []


# The sets in a folder, by name: `--data-path`, whether the training half is wanted, the flags -> the half.
READERS: Mapping[str, Callable[[Path, bool, Args], Found]] = {
    "IMNET": image_folder,
    "tar": tar,
    "wds": lambda root, is_train, args: shards(root / args.data_set.removeprefix("wds/"), is_train, args),
    "torch": torchvision_set,
    "CIFAR": lambda root, is_train, args: cifar(root, is_train),
    "INAT": lambda root, is_train, args: inaturalist(root, is_train, 2018, args.inat_category),
    "INAT19": lambda root, is_train, args: inaturalist(root, is_train, 2019, args.inat_category),
}


def build_dataset(is_train: bool, args: Args) -> tuple[LabelledImages, list[str]]:
    """The training or the evaluation half of `--data-set`, and the classes' names in the order of their labels.

    Classes that have no names are '0', '1', ..., or as --class-names calls them.

    Raises:
        UserError: unknown name, missing or malformed files, a single class, other classes than --class-names says,
            or augmentation flags that do not work.
    """
    transform = build_transform(is_train, args)
    found = _find(is_train, args)
    classes = list(found.classes)
    if len(classes) == 1 and not args.single_class:
        what = f"{len(found.samples)} images of a single class, {classes[0]!r}"
        example = f" (e.g. {found.name(found.samples[0][0])})" if len(found.samples) else ""
        raise UserError(
            f"the data holds {what}{example}: there is nothing to learn from them. A data set has one folder of "
            "images per class; if one class is meant, give --single-class"
        )
    if args.class_names:
        classes = _check_names(classes, args.class_names)
    size, crop = sides(args.input_size), preprocessing(args)
    if is_train and args.src:
        crop = crop._replace(crop_mode="center")  # which keeps the shape
    images = LabelledImages(found.samples, transform, found.read, args.fast_resize, found.name, size, crop)
    return images, classes


def named(classes: Sequence[str]) -> list[str]:
    """Classes that have names; none for '0', '1', ..."""
    return [] if _are_indices(classes) else list(classes)


def _are_indices(classes: Sequence[str]) -> bool:
    return list(classes) == [str(label) for label in range(len(classes))]


def _check_names(classes: list[str], names: list[str]) -> list[str]:
    """The names that are asked for, if the data's classes have none, or these."""
    if _are_indices(classes) and len(names) >= len(classes):
        return list(names)
    if classes != names:
        pairs = zip_longest(classes, names, fillvalue="none")
        label, (own, asked) = next((label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"class {label} of the data is {own}, but --class-names, args.yaml or the other half says {asked}: "
            f"labels would change their meaning. The data has {len(classes)} classes, {len(names)} names are given"
        )
    return classes


def _find(is_train: bool, args: Args) -> Found:
    name, prefix = args.data_set, args.data_set.partition("/")[0]
    _check_flags(args)
    if name == "DIGITS":
        return digits(is_train, sides(args.input_size))
    if prefix == "hfds" and name != prefix:
        return hugging_face_set(args, is_train)
    if prefix in STREAMS:
        raise UserError(
            f"--data-set {name} is a stream, whose images cannot be indexed; repeated augmentation, exact resume "
            "and exact evaluation need an index: unpack it into folders (IMNET) or a tar file of them (tar)"
        )
    reader = READERS.get(prefix)
    if reader is None or ("/" in name) != (prefix in PREFIXES):
        raise UserError(f"--data-set {name} is not one of {', '.join(DATA_SETS)}.{did_you_mean(name, DATA_SETS)}")
    if not args.data_path:
        raise UserError(f"--data-set {name} needs --data-path, the folder that holds the data")
    root = Path(args.data_path).expanduser()
    if not root.is_dir() and not args.download:
        raise UserError(f"--data-path {args.data_path} is not a folder; give the folder that holds the data")
    return reader(root, is_train, args)


def _check_flags(args: Args) -> None:
    """Refuse flags of one reader where another one reads."""
    for flag, value, takers in (
        ("--val-labels", args.val_labels, ("IMNET", "tar")),
        ("--image-key", args.image_key, ("hfds",)),
        ("--target-key", args.target_key, ("hfds",)),
        ("--download", args.download, ("torch",)),
    ):
        if value and args.data_set.partition("/")[0] not in takers:
            raise UserError(f"{flag} is for --data-set {' and '.join(takers)}, not {args.data_set}: drop it")
