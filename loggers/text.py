"""log.txt: one JSON object per epoch, in DeiT's keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from utils import broadcast_object, write_atomically

LOG = "log.txt"


class TextLog:
    """Writes log.txt after each epoch, before the checkpoint that holds the same lines.

    A run that is killed between the two evaluates the epoch again when it is resumed, and writes the same line.
    `complete` writes what is missing.

    Args:
        path: the file.
        lines: of all epochs, the newest included; the run adds to them.
    """

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.path = path
        self.lines = lines

    def after_step(self, step: int) -> None:
        """Nothing: the log has a line per epoch."""

    def after_epoch(self, record: Mapping[str, Any]) -> None:
        """Write all lines. All processes take part.

        Raises:
            UserError: the main process cannot write.
        """
        broadcast_object(self._write)

    def complete(self) -> None:
        """Write all lines that a resumed run has, unless the file holds them."""
        broadcast_object(self._complete)

    def _complete(self) -> None:
        written = self.path.read_bytes() if self.path.exists() else b""
        if self.lines and written != self._content():
            self._write()

    def _content(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()

    def _write(self) -> None:
        content = self._content()
        try:
            write_atomically(self.path, lambda file: file.write(content))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self.path}: {reason}; the old one is still there") from error


def set_aside(path: Path) -> None:
    """Keep the log of an earlier run in the same folder, log.txt as log.old.txt."""
    if path.exists():
        path.replace(path.with_name(f"{path.stem}.old{path.suffix}"))


def read_lines(path: Path, last_epoch: int) -> list[str]:
    """The lines of a log up to an epoch; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if json.loads(line)["epoch"] <= last_epoch]
