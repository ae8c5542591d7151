"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from errors import UserError
from utils import broadcast_object, print_main

NAME = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
TAKEN_WORDS = "another run is writing to"
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # the file system has no locks


def is_locked(folder: Path) -> bool:
    """Whether a run of another process is at work in a folder."""
    try:
        file = open(folder / NAME, "rb+")  # noqa: SIM115 - closed below
    except OSError:
        return False  # there is none, or main.py will say why it cannot be opened
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in TAKEN
    return False


def taken(folder: Path, flag: str) -> UserError:
    """What a second run in a folder is told."""
    return UserError(f"{TAKEN_WORDS} {flag} {folder}: wait for its end, or choose another one")


class Lock:
    """Holds an output folder for this run while it is entered. All processes must enter together.

    The main process holds a POSIX lock on a file in the folder. The system gives it up when that process ends, in
    whatever way, and no loader's worker inherits it. The folder is made if need be, and goes if it stays empty.

    Args:
        folder: None locks nothing.
        flag: that names the folder, for messages.
    Raises:
        UserError: another run holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path | None, flag: str = "--output_dir") -> None:
        self.folder, self.flag = folder, flag
        self._file: IO[str] | None = None
        self._made = False

    def __enter__(self) -> Lock:
        if self.folder is not None:
            broadcast_object(self._take)
        return self

    def _take(self) -> None:
        assert self.folder is not None
        try:
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._is_current():
                self._close()
                self._file = open(self.folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held while entered
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_taken = error.errno in TAKEN and self._file is not None
            self._close()
            if error.errno in UNKNOWN:
                (self.folder / NAME).unlink(missing_ok=True)
                print_main(f"note: {self.folder} cannot be locked ({error.strerror}): start no second run in it")
            elif is_taken:
                raise taken(self.folder, self.flag) from error
            else:
                raise UserError(f"cannot write to {self.flag} {self.folder}: {error.strerror}") from error

    def _close(self) -> None:
        """Give the lock up."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_current(self) -> bool:
        """Whether the locked file is still the one in the folder: a run that ended may have removed it."""
        if self._file is None or self.folder is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.folder / NAME))
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is None:
            return
        with suppress(OSError):  # the folder is gone, or cannot be written to any more
            if self._file is not None:
                (self.folder / NAME).unlink(missing_ok=True)
            if self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()
        self._close()
