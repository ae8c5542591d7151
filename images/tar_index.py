"""What tar files hold, and an index that keeps it from one start to the next.

Reading the headers of a million images takes minutes. The index holds what was found, and a fingerprint of each
tar file. It is data, not code: numpy's arrays, read without pickle. A missing, stale or damaged one is made again.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import signal
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from errors import UserError, reason, shown
from images.found import Texts
from images.tree import clean, ending
from utils import print_main, put_in_place

VERSION = 1  # of the index's form
EDGE = 65536  # bytes of a tar file's head and tail that its fingerprint covers
REST = 2**20  # bytes behind the end mark that are looked at
PACKED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)  # how gz, bz2, xz, zst, lz4 begin
# What the names of compressed tar files end in
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.z")
LONGEST_LABEL = 1000  # bytes of a file `.cls` that are read
MANY = 8  # shards whose headers are read by several processes
FILE, FOLDER, LINK, SPECIAL, SPARSE = range(5)  # kinds of members


class Members(NamedTuple):
    """The members of a tar file, in its order; those of tar files inside it stand in folders of their names.

    Attributes:
        names: as in images.tree.
        kinds: uint8 [M]: FILE, FOLDER, LINK, SPECIAL or SPARSE.
        offsets: int64 [M], where a file's content begins in the tar file.
        sizes: int64 [M], its bytes.
        notes: the name of the member that a link leads to; the content of a file `.cls`; else ''.
    """

    names: Texts
    kinds: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    notes: Texts


# ------------------------------------------------------------------------------------------------------------
# Reading headers


def scan(path: Path) -> Members:
    """Read all headers of a tar file.

    Raises:
        UserError: no tar file, or one that is compressed, cut off or damaged.
    """
    try:
        refuse_special(path)
        with open(path, "rb") as file:
            if file.read(6).startswith(PACKED):
                raise ValueError("it is compressed, so that its images cannot be read one by one; unpack it")
            file.seek(0)
            rows = list(_walk(file, "", 0))
    except tarfile.TarError as error:
        raise UserError(
            f"cannot read the tar file {shown(str(path))}: it is none, or is damaged ({reason(error)})"
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cannot read the tar file {shown(str(path))}: {reason(error)}") from error
    names, kinds, offsets, sizes, notes = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Members(
        Texts(names),
        np.array(kinds, np.uint8),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        Texts(notes),
    )


def _walk(file: IO[bytes], folder: str, base: int) -> Iterator[tuple[str, int, int, int, str]]:
    """Name, kind, offset, size and note (see Members) of all that an open tar file holds.

    Args:
        folder: the name of the tar file, inside another one.
        base: where it begins there.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            name = clean(posixpath.join(folder, member.name.lstrip("/")))
            kind, note, content = _kind(member), "", None
            if kind == LINK:  # a hard link names a member, a symbolic one a way from its own folder
                note = clean(posixpath.join(folder if member.islnk() else posixpath.dirname(name), member.linkname))
            if kind == FILE and name.lower().endswith((".tar", ".cls", *PACKED_TARS)):
                content = tar.extractfile(member)
            if content is not None and name.lower().endswith(PACKED_TARS):
                raise ValueError(f"{shown(name)} in it is compressed; unpack it first")
            if content is not None and ending(name) == ".tar":
                inner = name[: -len(".tar")]
                yield inner, FOLDER, 0, 0, ""
                yield from _walk(content, inner, base + member.offset_data)
                continue
            if content is not None:
                note = content.read(LONGEST_LABEL).decode("utf-8", "replace").strip()
            yield name, kind, base + member.offset_data, member.size, note
        _check_end(file, tar.offset)


def _kind(member: tarfile.TarInfo) -> int:
    if member.issparse():
        return SPARSE
    if member.isreg():
        return FILE
    if member.isdir():
        return FOLDER
    return LINK if member.islnk() or member.issym() else SPECIAL


def _check_end(file: IO[bytes], offset: int) -> None:
    """Refuse a tar file that does not end where tarfile found no further header: it would be read in part.

    Raises:
        ValueError: it is cut off, damaged, or several that were joined by `cat`.
    """
    file.seek(offset)
    rest = file.read(REST)
    if any(rest[: tarfile.BLOCKSIZE]):
        raise ValueError(f"its header at byte {offset} is damaged; pack it again")
    if len(rest) < tarfile.BLOCKSIZE:
        raise ValueError(f"it ends at byte {offset} without a mark of its end, so it may be cut off; pack it again")
    if any(rest):
        raise ValueError(
            f"it goes on after its end at byte {offset}; join tar files with tar --concatenate, not cat"
        )


def refuse_special(path: Path) -> None:
    """Refuse what is no file before it is opened: reading a FIFO or a device may never end.

    Raises:
        OSError: it does not exist, or cannot be looked at.
        ValueError: it is no file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is a device, a FIFO, a socket or a folder, not a file")


# ------------------------------------------------------------------------------------------------------------
# The index


def fingerprint(path: Path) -> bytes:
    """16 bytes that change with a tar file's size, time, head or tail.

    Raises:
        UserError: it cannot be read.
    """
    try:
        refuse_special(path)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(EDGE)
            file.seek(max(0, status.st_size - EDGE))
            tail = file.read(EDGE)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tar file {shown(str(path))}: {reason(error)}") from error
    about = f"{status.st_size} {status.st_mtime_ns} ".encode()
    return hashlib.blake2b(about + head + tail, digest_size=16).digest()


def read_members(paths: Sequence[Path], name: str, folders: Sequence[Path]) -> list[Members]:
    """What each of some tar files holds: from an index, where it is true, else from their headers.

    The index is then brought up to date, in the first folder that can be written to.

    Args:
        paths: of the tar files.
        name: of the index.
        folders: where it may be.
    Raises:
        UserError: a tar file cannot be read.
    """
    prints = {path: fingerprint(path) for path in paths}
    known = next((index for folder in folders if (index := _load(folder / name))), {})
    fresh = [path for path in paths if prints[path] not in known]
    if fresh:
        if len(fresh) > 1:
            print_main(f"reading the headers of {len(fresh)} tar files in {fresh[0].parent}")
        known |= dict(zip([prints[path] for path in fresh], _scan_all(fresh), strict=True))
    members = [known[prints[path]] for path in paths]
    if fresh:
        _save(dict(zip(prints.values(), members, strict=True)), name, folders)
    return members


def _scan_all(paths: Sequence[Path]) -> list[Members]:
    """Scan tar files, many of them in several processes."""
    if len(paths) < MANY:
        return [scan(path) for path in paths]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(
        min(cores, len(paths), 16), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        return list(pool.map(scan, paths, chunksize=4))


def _load(path: Path) -> dict[bytes, Members]:
    """The members of tar files by their fingerprints; empty if there is no index, or one that cannot be used."""
    try:
        refuse_special(path)
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
        return _of_arrays(found)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile, zlib.error):
        return {}  # its absence or damage costs time alone


def _of_arrays(found: Mapping[str, np.ndarray]) -> dict[bytes, Members]:
    """The inverse of `_to_arrays`.

    Raises:
        ValueError, KeyError, IndexError, TypeError: these are not its arrays.
    """
    if found["version"].tolist() != [VERSION]:
        raise ValueError("an index of another version")
    names, notes = (Texts.of_arrays(found[key], found[f"{key}_ends"]) for key in ("names", "notes"))
    index: dict[bytes, Members] = {}
    if not len(names) == len(notes) == len(found["kinds"]) == len(found["offsets"]) == len(found["sizes"]):
        raise ValueError("an index with parts missing")
    ends = found["ends"].tolist()
    for print_, (start, end) in zip(found["prints"], pairwise(ends), strict=True):
        part = slice(start, end)
        columns = found["kinds"][part], found["offsets"][part], found["sizes"][part]
        index[print_.tobytes()] = Members(names.part(start, end), *columns, notes.part(start, end))
    return index


def _to_arrays(index: Mapping[bytes, Members]) -> dict[str, Any]:
    """The index as arrays: those of all tar files, one after the other, and where each one's end."""
    members = list(index.values())
    prints = np.frombuffer(b"".join(index), np.uint8).reshape(-1, 16)
    ends = np.cumsum([0, *(len(each.names) for each in members)], dtype=np.int64)
    arrays: dict[str, Any] = {"version": np.array([VERSION]), "prints": prints, "ends": ends}
    for key in ("kinds", "offsets", "sizes"):
        arrays[key] = np.concatenate([getattr(each, key) for each in members])
    for key in ("names", "notes"):
        arrays[key], arrays[f"{key}_ends"] = Texts.joined([getattr(each, key) for each in members]).arrays()
    return arrays


def _save(index: Mapping[bytes, Members], name: str, folders: Sequence[Path]) -> None:
    """Write the index, whole, into the first folder that can be written to; none is no mistake."""
    content = io.BytesIO()
    np.savez_compressed(content, **_to_arrays(index))
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{name}.{os.getpid()}.tmp"  # another run may write the same index
            try:
                temporary.write_bytes(content.getbuffer())
                put_in_place(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            return
        except OSError:
            continue
