"""Paths, addresses and texts that flags name: what no file system or server could take is refused at once.

Like flags.py, it imports nothing that takes time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from errors import UserError, shown

PATHS = (
    *("config", "data_path", "output_dir", "resume", "finetune", "teacher_path", "val_labels"),
    *("backbone", "head_weights", "class_file", "predictions"),  # of python -m segmentation
)
LONGEST_NAME = 255  # bytes of one part of a path, on the usual file systems
LONGEST_PATH = 4095


def usable(values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Flags as they were given, with '~' in paths as that folder.

    Args:
        values: by the names of fields.
        source: where they stand, for messages; on the command line by default.
    Raises:
        UserError: a text is none, a path is too long, an address names no file.
    """
    found = dict(values)
    for name, value in values.items():
        flag = f"{source}{name}" if source else f"--{name.replace('_', '-')}"
        if name != "class_names":  # of a data set, whose folders may have any names
            check_texts(flag, value)
        if name in PATHS and isinstance(value, str):
            if value.startswith("https://"):
                check_address(value, flag)
            else:
                found[name] = expand(value, flag)
                check_path(flag, found[name])
    return found


def expand(path: str, flag: str = "--config") -> str:
    """A path with '~' or '~user' at its start as that folder: a shell does so for some words, YAML for none.

    Raises:
        UserError: there is no such home.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{flag} {shown(path, 80)}: no home of this name; a name that begins with ~ is ./~...")
    return found


def check_path(flag: str, path: str) -> None:
    """Refuse a path that is too long to be one.

    Raises:
        UserError: with the flag's name.
    """
    content = path.encode("utf-8", "surrogatepass")
    if len(content) > LONGEST_PATH or max(map(len, content.split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{flag} {shown(path, 80)}: too long, a part of a path has {LONGEST_NAME} bytes at most")


def check_texts(flag: str, value: Any) -> None:
    """Refuse texts, in lists and dicts too, that are no text: args.yaml could not hold them.

    Raises:
        UserError: a byte that is no UTF-8, or a zero byte; with the flag's name.
    """
    for text in _texts(value):
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(
                f"{flag} {shown(text, 80)}: has bytes that are no text (UTF-8): rename what it names, or correct it"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def check_address(address: str, flag: str = "") -> None:
    """Refuse an https address that names no host, or no file.

    Raises:
        UserError: with what is wanted.
    """
    what = f"{flag} {shown(address, 120)}".strip()
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").encode("idna").decode()
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{what}: not an https address ({shown(str(error), 80)})") from error
    if not host or not address.isprintable() or " " in address:
        raise UserError(f"{what}: not an https address; expected https://HOST/PATH/FILE.pth")
    name = parts.path.rpartition("/")[2]
    if name in ("", ".", "..") or len(name.encode()) > LONGEST_NAME:
        raise UserError(f"{what}: its last part is no name of a file; expected https://HOST/PATH/FILE.pth")
