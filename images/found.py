"""Half of a data set, as readers hand it over: what images can be read from, and their labels, kept as arrays.

Python's lists of paths and labels would be copied into every worker process, since counting references writes to
their memory. Arrays are shared for as long as nobody writes to them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from images.decode import load_image

Sample = tuple[Any, int]  # what an image can be read from, label
MOST_SIZES = 10_000  # files whose size is looked at, to tell data sets apart


class Texts(Sequence[str]):
    """Many texts in two arrays: their bytes, and where each ends.

    Args:
        texts: in any number; lone surrogates, which stand for odd bytes in file names, are kept.
        prefix: what all begin with, kept once.
    """

    def __init__(self, texts: Iterable[str], prefix: str = "") -> None:
        self.prefix = prefix
        ends = [0]
        content = bytearray()
        for text in texts:
            content += text.encode("utf-8", "surrogateescape")
            ends.append(len(content))
        self._content = np.frombuffer(bytes(content), np.uint8)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        content = self._content[self._ends[number] : self._ends[number + 1]].tobytes()
        return self.prefix + content.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        content = self._content.tobytes()
        for start, end in pairwise(self._ends.tolist()):
            yield self.prefix + content[start:end].decode("utf-8", "surrogateescape")

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Their bytes, uint8, and where each begins and the last ends, int64 [N + 1]: what a file can hold."""
        return self._content, self._ends

    def part(self, start: int, end: int) -> Texts:
        """The texts from `start` to before `end`; the bytes are shared."""
        first, last = self._ends[start], self._ends[end]
        return Texts.of_arrays(self._content[first:last], self._ends[start : end + 1] - first, self.prefix)

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """The texts of several, one after the other; their prefixes must be empty."""
        starts = np.cumsum([0, *(len(part._content) for part in parts)], dtype=np.int64)
        ends = [part._ends[1:] + start for part, start in zip(parts, starts, strict=False)]
        content = np.concatenate([np.zeros(0, np.uint8), *(part._content for part in parts)])
        return cls.of_arrays(content, np.concatenate([np.zeros(1, np.int64), *ends]))

    @classmethod
    def of_arrays(cls, content: np.ndarray, ends: np.ndarray, prefix: str = "") -> Texts:
        """The inverse of `arrays`.

        Raises:
            ValueError: the arrays do not belong together.
        """
        texts = cls((), prefix)
        texts._content, texts._ends = content, ends
        if content.dtype != np.uint8 or ends.dtype != np.int64 or ends.ndim != 1 or not len(ends):
            raise ValueError("these are not the arrays of texts")
        if ends[0] != 0 or ends[-1] != len(content) or (np.diff(ends) < 0).any():
            raise ValueError("texts end where there are none")
        return texts


class Samples(Sequence[Sample]):
    """The samples of half a data set: `samples[i]` is (source, label).

    Args:
        sources: a sequence that makes source i when asked, or an array [N, ...] of pixels.
        labels: class indices [N].
    """

    def __init__(self, sources: Sequence[Any] | np.ndarray, labels: Sequence[int] | np.ndarray) -> None:
        if len(sources) != len(labels):
            raise ValueError(f"{len(sources)} images, but {len(labels)} labels")
        self.sources = sources
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self.sources[index], int(self.labels[index])


class Found(NamedTuple):
    """Half of a data set.

    Attributes:
        samples: what can be read, and labels.
        classes: the classes' names, in the order of their labels; '0', '1', ... where the data has none.
        read: makes an RGB image of a source; raises an ImageError that names it.
        name: what to call a source in a message.
    """

    samples: Sequence[Sample]
    classes: Sequence[str]
    read: Callable[[Any], Image.Image] = load_image
    name: Callable[[Any], str] = str


def digest(samples: Sequence[Sample]) -> str:
    """Tells other samples from these: by number, order and labels, and by what is known of their sources.

    That is the pixels of an array; the names and sizes of the images in tar files; the names of single files below
    their common folder, which may have moved, and of up to 10,000 of them the sizes.
    """
    labels = samples.labels if isinstance(samples, Samples) else np.array([label for _, label in samples])
    sources = samples.sources if isinstance(samples, Samples) else ()
    parts = [np.array([len(samples)]), labels, *traits(sources)]
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(np.ascontiguousarray(part).data)
    return hashed.hexdigest()


def traits(sources: Any) -> list[np.ndarray]:
    """What `digest` takes into account of sources: arrays that differ where these do."""
    if isinstance(sources, np.ndarray):
        return [sources]
    if isinstance(sources, Texts):
        sizes = [_size(sources[number]) for number in range(0, len(sources), 1 + len(sources) // MOST_SIZES)]
        return [*sources.arrays(), np.array(sizes)]
    return list(sources.arrays()) if hasattr(sources, "arrays") else []


def _size(path: str) -> int:
    """Of a file in bytes; -1 if it is gone."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
