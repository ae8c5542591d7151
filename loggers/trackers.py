"""--log-with: each epoch's line of log.txt goes to experiment trackers, through accelerate's classes.

Only the main process has trackers. An epoch is handed over once it is saved, so that a run that is killed and
continued gives no tracker an epoch twice. `trackers.json` in the output folder says what each tracker has; what it
lacks is handed over when the run starts, continues, or ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from errors import Interrupted, UserError, reason
from loggers.backends import BACKENDS, Backend, TrackedRun, flattened, spelled
from utils import broadcast_object, is_main, keep_random_state, print_main, write_atomically

BOOK = "trackers.json"


@dataclass
class Had:
    """What a tracker has of a run.

    Attributes:
        epochs: how many lines of log.txt.
        digest: of these lines.
        own_id: the tracker's own name for the run, if it gives one.
    """

    epochs: int = 0
    digest: str = ""
    own_id: str = ""


@dataclass
class Book:
    """The content of trackers.json.

    Attributes:
        id: of the run, for trackers that take one.
        trackers: what each has, by its name.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # draws from no seeded stream
    trackers: dict[str, Had] = field(default_factory=dict)

    def is_of(self, lines: Sequence[str]) -> bool:
        """Whether all that the trackers have is the beginning of this log."""
        return all(
            had.epochs <= len(lines) and had.digest in ("", digest_of(lines[: had.epochs]))
            for had in self.trackers.values()
        )

    def write(self, path: Path) -> None:
        """Raises OSError if it cannot be written."""
        content = (json.dumps(asdict(self), indent=1) + "\n").encode()
        write_atomically(path, lambda file: file.write(content))


def read_book(path: Path) -> Book:
    """The book of the run before; a new one if there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return Book()
    try:
        content = json.loads(path.read_bytes())
        return Book(str(content["id"]), {name: Had(**had) for name, had in content["trackers"].items()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: delete it, and the trackers of --log-with begin new runs") from error


def digest_of(lines: Sequence[str]) -> str:
    """What tells these lines of log.txt from others."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Trackers:
    """Hands over each epoch to trackers, and closes them when it is left. It observes a run, after the saver.

    A tracker that does not start is an error. One that fails later is left alone, and the run goes on.

    Args:
        names: of BACKENDS.
        folder: --output_dir.
        project, name: what the trackers show.
        flags: of the run.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, project: str, name: str, flags: Mapping[str, Any]
    ) -> None:
        self.names = list(dict.fromkeys(names))
        self.folder = folder.resolve()
        self.project, self.name = project, name
        self.flags = flags
        self.lines: Sequence[str] = []
        self.resumed = False
        self._book: Book | None = None
        self._started: dict[str, Any] = {}  # accelerate's objects, by name
        self._failed: dict[str, str] = {}  # why, by name
        self._environment: list[str] = []  # variables that were set here

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Hand over what is left, if it is saved, and close all trackers."""
        if self._book is not None and (kind is None or kind is Interrupted):
            self._hand_over()
        for name, tracker in self._started.items():
            with self._guarded(name, "does not close"):
                tracker.finish()
        for name, why in self._failed.items():
            epochs = self._had(name).epochs
            if epochs < len(self.lines):
                print_main(
                    f"warning: {name} lacks the epochs after epoch {epochs} ({why}); the same command with "
                    "--resume auto hands them over"
                )
        self._started.clear()
        for variable in self._environment:
            os.environ.pop(variable, None)

    def follow(self, lines: Sequence[str], resumed: bool) -> None:
        """Say which run this is.

        Args:
            lines: of log.txt; the run adds to them.
            resumed: whether it continues another.
        """
        self.lines, self.resumed = lines, resumed

    def start(self) -> None:
        """Start all trackers, unless they are, and give them the epochs they lack. All processes take part.

        Raises:
            UserError: one does not start, or trackers.json cannot be read or written.
        """
        if self.names:
            broadcast_object(self._start)

    def complete(self) -> None:
        """Hand over the epochs that the run before has saved and was killed over."""
        if self.lines:
            self.start()

    def after_step(self, step: int) -> None:
        """Nothing: trackers get whole epochs."""

    def after_epoch(self, record: Mapping[str, Any]) -> None:
        """Hand over the epoch, which is saved by now."""
        if self.names and is_main():
            self._hand_over()

    # --------------------------------------------------------------------------------------------------------
    # On the main process

    def _start(self) -> None:
        if self._book is not None:
            return
        book = read_book(self.folder / BOOK)
        if not (self.resumed and book.is_of(self.lines)):
            if self.resumed and book.trackers:
                print_main("note: the trackers have other epochs than this run begins with; they begin a new run")
            book = Book()
        self._book = book
        self._write_book()
        with keep_random_state():
            _be_alone()
            for name in self.names:
                self._start_one(name, BACKENDS[name])
        self._write_book()
        self._hand_over()

    def _start_one(self, name: str, backend: Backend) -> None:
        """Start a tracker, and tell it the flags."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for variable, value in backend.environment(self.folder).items():
            if variable not in os.environ:
                os.environ[variable] = value
                self._environment.append(variable)
        had, run = self._had(name), self._tracked_run(name)
        flags = {_name(backend, flag): value for flag, value in flattened(self.flags).items()}
        try:
            tracker = LOGGER_TYPE_TO_CLASS[name](**backend.arguments(run))
            tracker.start()
            self._started[name] = tracker
            own_id = backend.own_id(tracker.tracker)
            if not (backend.flags_once and (had.own_id or had.epochs)):
                tracker.store_init_configuration(flags)
        except Exception as error:  # whatever the packages raise
            hint = f". {backend.hint[0].upper()}{backend.hint[1:]}" if backend.hint else ""
            raise UserError(f"--log-with {name} does not start: {reason(error)}{hint}") from error
        had.own_id = own_id

    def _hand_over(self) -> None:
        """Give each tracker the lines that it lacks."""
        for name in self._started:
            had = self._had(name)
            for line in self.lines[had.epochs :]:
                if name in self._failed:
                    break
                with self._guarded(name, f"fails at epoch {had.epochs + 1}"), keep_random_state():
                    self._log(name, json.loads(line))
                    had.epochs += 1
                    had.digest = digest_of(self.lines[: had.epochs])
                    self._write_book()

    def _log(self, name: str, record: Mapping[str, Any]) -> None:
        """Give a tracker one epoch; its step is log.txt's `epoch`, counted from 0."""
        backend = BACKENDS[name]
        values = {
            _name(backend, key): value
            for key, value in record.items()
            if isinstance(value, (int, float))  # None: it was not finite
        }
        self._started[name].log(values, step=record["epoch"], **backend.log_with)

    @contextmanager
    def _guarded(self, name: str, what: str) -> Iterator[None]:
        """Let no tracker end a run: it says so once, and gets nothing more."""
        try:
            yield
        except Exception as error:  # whatever the packages raise
            if name not in self._failed:
                self._failed[name] = reason(error)
                print_main(f"warning: --log-with {name} {what}: {reason(error)}. The run goes on without it")

    def _had(self, name: str) -> Had:
        assert self._book is not None
        return self._book.trackers.setdefault(name, Had())

    def _tracked_run(self, name: str) -> TrackedRun:
        had = self._had(name)
        first = int(json.loads(self.lines[had.epochs - 1])["epoch"]) + 1 if had.epochs else 0
        assert self._book is not None
        return TrackedRun(self.folder, self.project, self.name, self._book.id, first, had.own_id)

    def _write_book(self) -> None:
        assert self._book is not None
        path = self.folder / BOOK
        try:
            self._book.write(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _name(backend: Backend, name: str) -> str:
    """A number's or flag's name, as the tracker takes it."""
    return spelled(name) if backend.spells else name


def _be_alone() -> None:
    """Let accelerate take this process for a single one without a device.

    Its classes ask it which process they are in. Left to itself it would look for a process group, and set the
    current device.
    """
    from accelerate import PartialState

    changes = {"LOCAL_RANK": None, "ACCELERATE_TORCH_DEVICE": "cpu"}
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set_variables(changes)
        PartialState()
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
