"""Checkpoints: written atomically, checked when read, read without running code, in DeiT's keys.

A checkpoint is plain data (tensors, numbers, strings, lists, dicts): model, optimizer, lr_scheduler, epoch,
model_ema, scaler, args, max_acc. `model` and `model_ema` carry timm's own parameter names, so
`timm.create_model(..., checkpoint_path="checkpoint.pth")` (which takes the average, where there is one) and
`torch.load(..., weights_only=True)` read them. The key `checksum` is over everything else; files without it (of
DeiT, the reference, earlier versions) are read as well.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from errors import UserError
from utils import flush, print_main, write_atomically

StateDict = dict[str, Tensor]

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

CHECKSUM = "checksum"
HEADS = ("head.weight", "head_dist.weight")
ADVICE = "Check --model, --input-size and --data-set; --finetune accepts another head and image size"

_NAMES = re.compile(r"checkpoint(\.[1-9]\d*|_best)?\.pth")  # what `newest` looks at
_LEFTOVERS = "checkpoint*.tmp"  # what a save that was killed leaves behind
_VALUES = (type(None), bool, int, float, str)
_MEBIBYTE = 2**20


# ------------------------------------------------------------------------------------------------------------
# Writing


def save(state: Mapping[str, Any], path: Path, keep: int = 1) -> None:
    """Write a checkpoint so that `path` holds either the old file or the new one, whole, at any moment.

    Args:
        state: plain data; a checksum of it is stored with it.
        path: the file.
        keep: how many of the last checkpoints remain: `checkpoint.pth`, the one before it as `checkpoint.1.pth`,
            and so on. With 1, files with higher numbers are left alone.
    Raises:
        UserError: the disk is full or failing, or the folder cannot be written to.
        TypeError: the state is not plain data.
    """
    content = {key: value for key, value in state.items() if key != CHECKSUM}
    content[CHECKSUM] = checksum(content)
    try:
        for leftover in path.parent.glob(_LEFTOVERS):
            leftover.unlink()
        write_atomically(path, partial(torch.save, content), partial(_keep_previous, path, keep))
    except (OSError, RuntimeError) as error:
        failure = _os_error(error)
        if failure is None:
            raise
        raise UserError(
            f"cannot save {path}: {failure.strerror or failure}; what was there before is still there"
        ) from error


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
    spare = numbered[1].with_name(numbered[1].name + ".tmp")
    spare.unlink(missing_ok=True)
    try:
        try:
            os.link(path, spare)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, spare)
            flush(spare)
        os.replace(spare, numbered[1])
    finally:
        spare.unlink(missing_ok=True)


def checksum(state: Mapping[str, Any]) -> str:
    """A checksum of everything in a checkpoint but the checksum itself.

    It depends on values, types, shapes and the order of keys, and not on devices, strides or how torch writes them.

    Raises:
        TypeError: the state is not plain data.
    """
    digest = hashlib.sha256()  # with the processor's own instructions for it faster than blake2b
    _add(digest, {key: value for key, value in state.items() if key != CHECKSUM}, "checkpoint")
    return f"sha256:{digest.hexdigest()}"


def _add(digest: Any, value: Any, where: str) -> None:
    """Feed a value: its type and length, then its content, so that no two values feed the same bytes."""
    kind = type(value)
    if isinstance(value, Tensor):
        _add_text(digest, "tensor", f"{value.dtype} {list(value.shape)} {value.requires_grad}")
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif kind in _VALUES:
        _add_text(digest, kind.__name__, str(value))
    elif kind in (list, tuple, torch.Size):
        _add_text(digest, kind.__name__, str(len(value)))
        for i, item in enumerate(value):
            _add(digest, item, f"{where}[{i}]")
    elif kind in (dict, OrderedDict):
        _add_text(digest, kind.__name__, str(len(value)))
        for key, item in value.items():
            _add(digest, key, f"a key of {where}")
            _add(digest, item, f"{where}[{key!r}]")
        if kind is OrderedDict:  # Module.state_dict() puts the versions of its modules there
            _add(digest, vars(value), f"vars({where})")
    elif kind is argparse.Namespace:
        _add_text(digest, kind.__name__, "")
        _add(digest, vars(value), where)
    else:
        raise TypeError(f"{where} is a {kind.__module__}.{kind.__qualname__}: a checkpoint holds plain data only")


def _add_text(digest: Any, kind: str, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    digest.update(f"{kind} {len(content)}:".encode() + content)


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
        UserError: the folder cannot be written to, or its file system has less room than needed.
    """
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

    Checkpoints of the reference, whose `args` is an argparse.Namespace, are read too. The checksum, where there is
    one, is checked and left out of what is returned.

    Raises:
        UserError: no such file, not a checkpoint, or a damaged one.
    """
    state = _read(path, "cpu")
    if not isinstance(state, dict) or not str(state.get(CHECKSUM)).startswith("sha256:"):
        return state
    expected = state.pop(CHECKSUM)
    try:
        found = checksum(state)
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}){_way_out(path)}") from error
    if found != expected:
        raise UserError(f"{path} is damaged: its content does not match its checksum{_way_out(path)}")
    return state


def _way_out(path: str) -> str:
    """How to get an undamaged file: torch keeps what it downloads."""
    return f"; delete it in {torch.hub.get_dir()}/checkpoints" if path.startswith("https://") else ""


def _read(path: str, device: str) -> Any:
    """The content of a file, or of an address; device 'meta' leaves the values of its tensors out."""
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # torch warns of a pickle protocol other than its own, and then reads the file or refuses it.
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        try:
            if path.startswith("https://"):
                return torch.hub.load_state_dict_from_url(path, map_location="cpu", weights_only=True)
            _check_archive(path)
            return torch.load(path, map_location=device, weights_only=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise UserError(f"cannot read the checkpoint {path}: {error}") from error
            damage: Exception = error  # what torch raises for some archives that are cut off
        except UNREADABLE as error:
            damage = error
        raise UserError(
            f"{path} is not a checkpoint, or a damaged one ({type(damage).__name__}){_way_out(path)}"
        ) from damage


def _check_archive(path: str) -> None:
    """Refuse what torch would believe of an archive: compressed or overlapping members, and a changed pickle.

    Raises:
        zipfile.BadZipFile: it is damaged.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # not an archive: torch reads the older format, or refuses it
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise zipfile.BadZipFile("compressed members")
            if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile("more content than file")
            for member in members:
                if member.filename.endswith("/data.pkl") and member.CRC:  # 0: written without
                    archive.read(member)


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
    progress: list[tuple[tuple[int, int], Path]] = []
    found = files(folder)
    for path in found:
        try:
            progress.append((_progress(path), path))
        except UserError as error:
            print_main(f"warning: skipped: {error}")
    for _, path in sorted(progress, key=lambda entry: entry[0], reverse=True):
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


def _progress(path: Path) -> tuple[int, int]:
    """The last finished epoch, and the steps after it, without the values of the tensors."""
    state = _read(str(path), "meta")
    epoch, step = (state.get("epoch"), state.get("step", 0)) if isinstance(state, dict) else (None, 0)
    if not isinstance(epoch, int) or not isinstance(step, int):
        raise UserError(f"{path} does not say which epoch it is of")
    return epoch, step
