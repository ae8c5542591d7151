"""Data sets: the door to images/. From `--data-set` and `--data-path` to decoded images and labels.

Where images are found and how they are decoded is in images/; how they become batches is in loaders.py. To read
data of another form, write a function there that returns a `Found`, and add its line to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from errors import UserError, did_you_mean
from images.archives import shards, tar
from images.decode import Found, Sample, load_image
from images.folders import cifar, digits, image_folder, inaturalist
from images.hugging_face import hugging_face_set
from images.transforms import Box, build_transform, to_bytes
from options.flags import DATA_SETS, Args

STREAMS = ("tfds/", "hfids/")  # timm's other sources of data

Example = tuple[Tensor, int, list[Box]]  # uint8 [3, S, S], label, boxes to erase


class LabelledImages(Dataset[Example]):
    """Images with their labels. Reading one and transforming it are two steps: many views may follow one decode.

    Args:
        samples: of each image what `read` takes, and its label.
        transform: makes uint8 [3, S, S] of a decoded image.
        read: decodes an image.
        as_bytes: `--fast-resize`: decoded images are uint8 [3, H, W], not PIL images.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Any], Tensor],
        read: Callable[[Any], Image.Image] = load_image,
        as_bytes: bool = False,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.read = read
        self.as_bytes = as_bytes

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, index: int) -> tuple[Any, int]:
        """An image, ready for the transform, and its label."""
        source, label = self.samples[index]
        image = self.read(source)
        return to_bytes(image) if self.as_bytes else image, label

    def __getitem__(self, index: int) -> Example:
        """The image transformed, uint8 [3, S, S], its label, and no boxes to erase: what evaluation takes."""
        image, label = self.decode(index)
        return self.transform(image), label, []


# The sets in a folder, by name: `--data-path`, whether the training half is wanted, the flags -> the half.
READERS: Mapping[str, Callable[[Path, bool, Args], Found]] = {
    "IMNET": lambda root, is_train, args: image_folder(root, is_train),
    "tar": lambda root, is_train, args: tar(root, is_train),
    "wds": lambda root, is_train, args: shards(root / args.data_set.removeprefix("wds/"), is_train),
    "CIFAR": lambda root, is_train, args: cifar(root, is_train),
    "INAT": lambda root, is_train, args: inaturalist(root, is_train, 2018, args.inat_category),
    "INAT19": lambda root, is_train, args: inaturalist(root, is_train, 2019, args.inat_category),
}


def build_dataset(is_train: bool, args: Args) -> tuple[LabelledImages, int]:
    """The training or the evaluation half of `--data-set`, and its number of classes.

    Raises:
        UserError: unknown name, missing or malformed files, or augmentation flags that do not work.
    """
    transform = build_transform(is_train, args)
    found = _find(is_train, args)
    return LabelledImages(found.samples, transform, found.read, args.fast_resize), found.num_classes


def _find(is_train: bool, args: Args) -> Found:
    name = args.data_set
    if name == "DIGITS":
        return digits(is_train, args.input_size)
    if name.startswith("hfds/"):
        return hugging_face_set(name, is_train, args.data_path)
    if name.startswith(STREAMS):
        raise UserError(
            f"--data-set {name} is a stream, whose images cannot be indexed; repeated augmentation, exact resume "
            "and exact evaluation need an index: unpack it into folders (IMNET) or a tar file of them (tar)"
        )
    reader = READERS.get("wds" if name.startswith("wds/") else name)
    if reader is None or name == "wds":
        raise UserError(f"--data-set {name} is not one of {', '.join(DATA_SETS)}.{did_you_mean(name, DATA_SETS)}")
    if not args.data_path:
        raise UserError(f"--data-set {name} needs --data-path, the folder that holds the data")
    root = Path(args.data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-path {args.data_path} is not a folder; give the folder that holds the data")
    return reader(root, is_train, args)
