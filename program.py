"""What a program owes to its surroundings: signals, a terminal that may go away, and an end in every case.

Nothing is imported here that takes time, so that a signal is answered before torch is there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from errors import is_first_on_machine

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

T = TypeVar("T")
FAILED, STOPPED, INTERRUPTED = 1, 75, 130  # exit codes
STOPPING = (signal.SIGTERM, signal.SIGUSR1)
ENDING = (*STOPPING, signal.SIGINT)
READING_SECONDS = 1.0  # that a program that was told to end waits for whoever reads its output


def begin(name: str) -> None:
    """Prepare this process, before anything else happens in it.

    Until training has begun, SIGTERM, SIGUSR1 and Ctrl-C end it at once, with the documented exit codes. A lost
    connection (SIGHUP) does not end it, nor does output that nobody reads any more.

    Args:
        name: of the program, for its messages.
    """
    outlive_readers()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in ENDING:
        signal.signal(number, lambda number, _: end(*_told(name, number)))
    sys.unraisablehook = _tell_unless_interrupted


def leave(code: int) -> NoReturn:
    """End this process when all is done; a signal that still comes does not change how it ends.

    It ends the waiting for a reader of what is left.
    """
    for number in ENDING:
        signal.signal(number, lambda *_: stop_waiting())
    sys.stdout.flush(), sys.stderr.flush()
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def end(code: int, message: str, alone: bool = False) -> NoReturn:
    """End this process and its workers now, whatever it is doing: also in the middle of a write.

    Args:
        alone: whether other processes do not say the same.
    """
    stop_waiting()
    if alone or is_first_on_machine():
        with suppress(OSError):  # nobody reads it
            os.write(2, f"{message}\n".encode(sys.stderr.encoding, "backslashreplace"))
    for process in daemons():
        process.kill()
    with suppress(RuntimeError):  # a write that a signal has interrupted, and that nothing can finish
        sys.stdout.flush()
    os._exit(code)


@contextmanager
def leaving_nothing(name: str) -> Iterator[None]:
    """A signal ends the program as before, but what is half written is removed first, once SystemExit comes by.

    Args:
        name: of the program, for its messages.
    """
    told: list[tuple[int, str]] = []

    def stop(number: int, frame: object) -> None:
        for each in ENDING:  # the first one is enough
            signal.signal(each, signal.SIG_IGN)
        stop_waiting()
        told.append(_told(name, number))
        raise SystemExit

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if told:  # also where SystemExit was lost, see Signals
            end(*told[0])


def _told(name: str, number: int) -> tuple[int, str]:
    """The exit code of a signal, and what is said of it."""
    if number == signal.SIGINT:
        return INTERRUPTED, f"\n{name}: interrupted"
    return STOPPED, f"{name}: stopped by a signal"


def _tell_unless_interrupted(lost: sys.UnraisableHookArgs) -> None:
    """Say nothing of a signal that was lost: it is remembered (see Signals)."""
    if lost.exc_type not in (KeyboardInterrupt, SystemExit):
        sys.__unraisablehook__(lost)


def daemons() -> list[BaseProcess]:
    """The processes that end with this one: all loaders' workers."""
    return [process for process in multiprocessing.active_children() if process.daemon]


def end_workers() -> None:
    """Kill them; also those that are stopped."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would report their deaths
    for process in daemons():
        process.kill()


# ------------------------------------------------------------------------------------------------------------
# Signals while a run can be saved


class Signals:
    """Remembers SIGTERM and SIGUSR1, which ask a run to save and stop, while it is entered.

    Ctrl-C raises KeyboardInterrupt meanwhile, wherever the process happens to be. There it may be lost: Python
    drops what is raised while an object is deleted, and libraries raise something else instead. So it is
    remembered, too.
    """

    def __init__(self) -> None:
        self.received = False
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {name: signal.signal(name, self._remember) for name in STOPPING}
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if kind is not None:
            self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt again after a Ctrl-C that was lost."""
        if self._interrupted:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: object) -> None:
        self.received = True
        stop_waiting()

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        stop_waiting()
        self.check()


# ------------------------------------------------------------------------------------------------------------
# Output


class Lasting:
    """A text stream that outlives its reader: what cannot be written any more is dropped.

    A character that its encoding lacks is written as an escape. A pipe that is full, or a terminal that was stopped
    by Ctrl-S, is waited for, until a signal says that the program is to end.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._waits = True
        stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._find_reader()
            return int(self._stream.write(text))
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._find_reader()
            self._stream.flush()
        except OSError:
            self._drop()

    def stop_waiting(self) -> None:
        """From now on drop what finds no reader soon; also what is being written at this moment."""
        self._waits = False
        self._find_reader()

    def _find_reader(self) -> None:
        if self._waits:
            return
        room = select.poll()
        room.register(self._stream.fileno(), select.POLLOUT)
        if not room.poll(1000 * READING_SECONDS):
            self._drop()

    def _drop(self) -> None:
        """Let all that follows, and what is still in the buffer, go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let output that nobody reads any more, and streams that are closed, end nothing."""
    _open_standard_streams()
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)


def stop_waiting() -> None:
    """Let no reader hold this process up any more, which a signal has told to end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Lasting):
            stream.stop_waiting()


def _open_standard_streams() -> None:
    """Let no file that is opened later take the place of a closed stdin, stdout or stderr."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


# ------------------------------------------------------------------------------------------------------------
# Patience


class Patience:
    """Ends the program if a piece of work takes too long: a worker is stopped, or a file system hangs.

    A thread waits for that, since the main one may be inside a call that never returns.

    Args:
        seconds: that a piece may take; infinity: any time.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Around a piece of work.

        Args:
            what: in words, e.g. 'reading a batch of images'.
        """
        if self.seconds > threading.TIMEOUT_MAX:
            yield
            return
        timer = threading.Timer(self.seconds, self._give_up, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def over_each(self, items: Iterator[T], what: str) -> Iterator[T]:
        """The items, each of which may take that long to come."""
        while True:
            with self.over(what):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _give_up(self, what: str) -> None:
        end(
            FAILED,
            f"error: {what} takes longer than --dist-timeout, {self.seconds:g} seconds: a data loading "
            "worker is stopped, or a file system hangs. Continue with --resume auto",
            alone=True,
        )
