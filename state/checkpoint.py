"""Checkpoints: written atomically, checked when read, read without running code, in DeiT's keys.

A checkpoint is plain data (tensors, numbers, strings, lists, dicts): model, optimizer, lr_scheduler, epoch,
model_ema, scaler, args, max_acc. `model` and `model_ema` carry timm's own parameter names, so
`timm.create_model(..., checkpoint_path="checkpoint.pth")` (which takes the average, where there is one) and
`torch.load(..., weights_only=True)` read them. torch writes them as zip archives, with a CRC-32 of every tensor and
of the rest; what is read must match these. Files of DeiT, the reference and earlier versions are read as well.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shutil
import stat
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from torch import Tensor

from errors import UserError, reason, shown
from options.paths import check_address
from state.pickles import GLOBALS, LEGACY_PICKLES, NotPlain, Unbounded, check_bounds, in_the_way, survey
from utils import print_main, put_in_place, write_atomically

# What reading arbitrary bytes may raise besides OSError, found by fuzzing: tests/test_checkpoint.py
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
)

LATEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
_NAMES = re.compile(r"checkpoint(\.[1-9]\d*|_best)?\.pth")  # what `newest` looks at
_LEFTOVERS = "checkpoint*.tmp"  # what a save that was killed leaves behind
_VALUES = (type(None), bool, int, float, str, torch.dtype)
ARCHIVE = b"PK\x03\x04"  # what one begins with
_MEBIBYTE = 2**20
_FOLDER = 0x10  # what marks one in an archive


# ------------------------------------------------------------------------------------------------------------
# Writing


def save(state: Mapping[str, Any], path: Path, keep: int = 1) -> None:
    """Write a checkpoint so that `path` holds either the old file or the new one, whole, at any moment.

    Args:
        state: plain data.
        path: the file.
        keep: how many of the last checkpoints remain: `checkpoint.pth`, the one before it as `checkpoint.1.pth`,
            and so on. With 1, files with higher numbers are left alone.
    Raises:
        UserError: the disk is full or failing, or the folder cannot be written to.
        TypeError: the state is not plain data.
    """
    try:
        for leftover in path.parent.glob(_LEFTOVERS):
            leftover.unlink()
        write_atomically(path, partial(write, state), partial(_keep_previous, path, keep))
    except (OSError, RuntimeError) as error:
        failure = _os_error(error)
        if failure is None:
            raise
        raise UserError(
            f"cannot save {path}: {failure.strerror or failure}; what was there before is still there"
        ) from error


def write(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a checkpoint into an open file.

    Raises:
        TypeError: the state is not plain data.
    """
    _check_plain(state, "checkpoint")
    torch.save(dict(state), file)


def try_out(state: Mapping[str, Any]) -> Any:
    """What would be read from a checkpoint of this state; nothing is written to the disk.

    Raises:
        TypeError: the state is not plain data.
    """
    file = io.BytesIO()
    write(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception, if any: torch.save raises a RuntimeError after one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _keep_previous(path: Path, keep: int) -> None:
    """Give the file at `path` the number 1 as well, the former 1 the number 2, up to keep - 1.

    `path` itself stays until the new file replaces it.
    """
    if keep < 2 or not path.exists():
        return
    numbered = [path] + [path.with_name(f"{path.stem}.{i}{path.suffix}") for i in range(1, keep)]
    if numbered[1].exists() and numbered[1].samefile(path):
        return  # a save was killed right after this step
    free = next((i for i in range(1, keep - 1) if not numbered[i].exists()), keep - 1)
    for i in range(free, 1, -1):
        os.replace(numbered[i - 1], numbered[i])
    give_name(path, numbered[1])


def give_name(path: Path, other: Path) -> None:
    """Let `other` name the content of `path` as well, whole at any moment; it is not written again.

    Raises:
        UserError: the disk is full or failing, or the folder cannot be written to.
    """
    spare = other.with_name(other.name + ".tmp")
    try:
        spare.unlink(missing_ok=True)
        try:
            _link_or_copy(path, spare)
            put_in_place(spare, other)
        finally:
            spare.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot save {other}: {error.strerror or error}; what was there before is still there"
        ) from error


def _link_or_copy(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)


def _check_plain(value: Any, where: str) -> None:
    """Raise a TypeError for what could be written, but not be read without running code."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple, torch.Size):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and kind not in _VALUES:
        raise TypeError(f"{where} is a {kind.__module__}.{kind.__qualname__}: a checkpoint holds plain data only")


# ------------------------------------------------------------------------------------------------------------
# Room on the disk


def nbytes(state: Any) -> int:
    """The bytes of all tensors in nested dicts, lists and tuples: about the size of the file."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(nbytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(nbytes(value) for value in state)
    return 0


def check_space(folder: Path, needed_bytes: int) -> None:
    """Fail before training rather than at its first checkpoint: write, flush and rename a small file.

    Raises:
        UserError: the folder cannot be written to, or its file system has less room than needed; or a checkpoint's
            place is taken by a folder.
    """
    for path in (folder / LATEST, folder / BEST):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a checkpoint is to be written there: move it away")
    trial = folder / "checkpoint_trial.tmp"
    try:
        free = shutil.disk_usage(folder).free
        write_atomically(trial, lambda file: file.write(b"trial"))
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {folder}: {error.strerror or error}; choose another --output_dir"
        ) from error
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / _MEBIBYTE:,.1f} MiB free, and the checkpoints need "
            f"{needed_bytes / _MEBIBYTE:,.1f} MiB: make room, or choose another --output_dir"
        )


# ------------------------------------------------------------------------------------------------------------
# Reading


def load(path: str) -> Any:
    """Read a checkpoint file, or download it from an https address. Nothing in it is executed.

    Checkpoints of the reference, whose `args` is an argparse.Namespace, are read too, and numpy's numbers as
    Python's. The key `checksum`, which earlier versions wrote, is left out of what is returned.

    Raises:
        UserError: no such file, not a checkpoint, a damaged one, or one of other things than plain data.
    """
    state = _read(path)
    checksum = state.get("checksum") if isinstance(state, dict) else None
    if isinstance(checksum, str) and checksum.startswith("sha256:"):
        del state["checksum"]
    return state


def _read(path: str, with_tensors: bool = True) -> Any:
    """The content of a file, or of an address, once it is checked; perhaps without the values of its tensors."""
    file, advice = path, ""
    if path.startswith("https://"):
        file, advice = _download(path), f"; delete it in {torch.hub.get_dir()}/checkpoints"
    try:
        if not _is_intact(file, with_tensors):
            raise UserError(f"{path} is damaged: its content does not match its checksum{advice}")
        return _read_plain(file, with_tensors)
    except NotPlain as error:
        raise UserError(
            f"{path} is intact, but holds more than plain data: {shown(str(error))} is in the way. Read it where "
            f"it was made, and save from there what is needed, e.g. torch.save(model.state_dict(), FILE){advice}"
        ) from error
    except Unbounded as error:
        raise UserError(f"{path} is no checkpoint: it holds {shown(str(error))}{advice}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise UserError(f"cannot read the checkpoint {path}: {error}") from error
        damage: Exception = error  # what torch raises for some archives that are cut off
    except UNREADABLE as error:
        damage = error
    raise UserError(f"{path} is not a checkpoint, or a damaged one ({type(damage).__name__}){advice}") from damage


def _read_plain(file: str, with_tensors: bool) -> Any:
    """What torch reads of a file that has been looked through first.

    Raises:
        NotPlain, Unbounded: see state.pickles.
        OSError, *UNREADABLE: it cannot be read.
    """
    pickled = _survey(file)
    with torch.serialization.safe_globals(GLOBALS), warnings.catch_warnings():
        # torch warns of a pickle protocol other than its own, and then reads the file or refuses it.
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        try:
            state = torch.load(file, map_location="cpu" if with_tensors else "meta", weights_only=True)
        except pickle.UnpicklingError as error:
            if name := in_the_way(error):
                raise NotPlain(name) from error
            raise
    check_bounds(state, pickled, os.path.getsize(file) if with_tensors else None)
    return state


def _survey(path: str) -> int:
    """The bytes of a file's pickles, which nothing in them makes larger than they are."""
    if path.endswith(".safetensors"):
        return 0
    with open(path, "rb") as file:
        if file.read(4) != ARCHIVE:
            file.seek(0)
            return survey(file, LEGACY_PICKLES)
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise NotPlain("a TorchScript module")
            found = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
            for each in found:
                if not each.CRC:
                    del each.CRC  # written without
            return sum(survey(io.BytesIO(archive.read(each))) for each in found)


def _download(address: str) -> str:
    """The file of an address, where torch.hub keeps such files.

    Raises:
        UserError: the address is none, or cannot be reached.
    """
    check_address(address)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(urlparse(address).path).name
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            print_main(f'Downloading: "{address}" to {file}')
            torch.hub.download_url_to_file(address, str(file))
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"cannot read the checkpoint {address}: {reason(error)}") from error
    return str(file)


def _is_intact(path: str, with_tensors: bool) -> bool:
    """Whether the members of an archive have their CRC-32: all of them, or that which holds no tensor.

    torch.load does not look at these, and believes in compressed or overlapping members and in folders.

    Raises:
        zipfile.BadZipFile: it is not an archive as torch writes it.
        OSError: the file cannot be read.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.ESPIPE, "it is a device, a FIFO or a socket, not a file")
    with open(path, "rb") as file:
        if file.read(4) != ARCHIVE:
            return True  # not an archive: torch reads the older format, or refuses it
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise zipfile.BadZipFile("compressed members")
            if any(member.external_attr & _FOLDER for member in members):
                raise zipfile.BadZipFile("folders")  # torch would leave their tensors empty
            if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile("more content than file")
            wanted = [each for each in members if with_tensors or each.filename.endswith("/data.pkl")]
            return all(_has_its_crc(archive, each) for each in wanted if each.CRC)  # 0: written without


def _has_its_crc(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    with archive.open(member) as content:
        try:
            while content.read(_MEBIBYTE):
                pass
        except zipfile.BadZipFile:
            return False
    return True


def files(folder: Path) -> list[Path]:
    """checkpoint.pth, checkpoint.N.pth and checkpoint_best.pth, those that there are, the last modified first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAMES.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name != "checkpoint.pth", path.name))


def newest(folder: Path) -> tuple[Path, Any] | None:
    """The valid checkpoint of a folder that is furthest on, and its content; None if there is no checkpoint.

    `epoch` is the last finished epoch, and `step` (0 where it is missing) counts the steps of the epoch after it.
    How far each file is is read without its tensors; only the furthest is read whole, and the next one if that
    is damaged. Equally far files are tried from the last modified on.

    Raises:
        UserError: there are checkpoints, but none is valid; starting afresh would lose the run.
    """
    found_at: list[tuple[tuple[int, int], Path]] = []
    found = files(folder)
    for path in found:
        try:
            found_at.append((progress(path), path))
        except UserError as error:
            print_main(f"warning: skipped: {error}")
    for _, path in sorted(found_at, key=lambda entry: entry[0], reverse=True):
        try:
            return path, load(str(path))
        except UserError as error:
            print_main(f"warning: skipped: {error}")
    if found:
        raise UserError(
            f"no checkpoint in {folder} is valid: {', '.join(path.name for path in found)}; "
            "move them away to start afresh"
        )
    return None


def progress(path: Path) -> tuple[int, int]:
    """The last finished epoch of a checkpoint, and the steps after it; tensors are not read.

    Raises:
        UserError: no such file, not a checkpoint, or a damaged one.
    """
    state = _read(str(path), with_tensors=False)
    epoch, step = (state.get("epoch"), state.get("step", 0)) if isinstance(state, dict) else (None, 0)
    if type(epoch) is not int or type(step) is not int:
        raise UserError(f"{path} does not say which epoch it is of")
    return epoch, step
