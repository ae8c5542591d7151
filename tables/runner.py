"""Runs cells side by side: keeps the finished ones, goes on with the broken ones, and leaves none behind.

A cell is a process of its own. If this program is killed, the cell goes on by itself, and the next runner waits for
it: the lock on its folder says that it is still there. A signal to this program makes every run save and stop. A
cell whose backbone is among the cells begins when that one is finished; if that one fails, it is named, too.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from errors import UserError, reason, shown
from loggers.progress import clock
from program import STOPPED, stop_waiting
from state.lock import TAKEN_WORDS, is_locked
from tables.cells import Cell, interpreter
from tables.evidence import BAD_END, COST, OUTPUT, REPORT, ROOT
from tables.programs import PROGRAMS
from tables.slots import Slot, machine

PART = ".report"  # while it is made
PAUSE = 0.2  # seconds between two looks at what runs
SHOWN = 60.0, 1.0  # seconds between two lines that say where the work stands, in a file and on a terminal
LAST_WORDS = 300  # letters of a failed run's last line
OF_US = re.compile(rf"({'|'.join(re.escape(program.called) for program in PROGRAMS.values())}|redundancy): ")
OF_PYTHON = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
SAVED = "and saved"  # of a run that a signal has stopped
MOST_MEETINGS = 20  # of a cell with a run that holds its folder


@dataclass
class Runner:
    """Brings cells to their end.

    Args:
        cells: in the order in which they begin.
        processes: of each run.
        slots: one for each of the runs at a time.
        after_cell: called when a cell is finished.
    Attributes:
        failed: what could not be finished, and why.
        stopped: by which signal, or 0.
        trouble: what could not be written meanwhile, or ''.
    """

    cells: Sequence[Cell]
    processes: int
    slots: list[Slot]
    after_cell: Callable[[Cell], None] = lambda cell: None
    failed: dict[str, str] = field(default_factory=dict)
    stopped: int = 0
    trouble: str = ""

    def __post_init__(self) -> None:
        self._waiting = [cell for cell in self.cells if not cell.is_done]
        self._by_folder = {cell.folder: cell for cell in self.cells}
        self._kept = len(self.cells) - len(self._waiting)
        self._done = 0
        self._met: Counter[str] = Counter()  # how often a cell has met an earlier run
        self._epochs_before = self._epochs()
        self._training: defaultdict[str, float] = defaultdict(float)  # seconds of runs that have ended
        self._shown = 0.0
        self._passed_on = False  # a signal, to the runs
        self._terminal = sys.stdout.isatty()

    def run(self) -> None:
        """Run them all; those that fail are named, and the others go on."""
        total = len(self.cells)
        print(
            f"{total} cells: {self._kept} finished before, {len(self._waiting)} to run, {len(self.slots)} at a time"
        )
        with self._signals():
            while (self._waiting and not self.stopped) or any(slot.cell for slot in self.slots):
                self._pass_on()
                for slot in self.slots:
                    self._look_at(slot)
                self._show()
                time.sleep(PAUSE)

    def _stop_all(self) -> None:
        """Let what runs save and stop."""
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                slot.process.terminate()

    def _look_at(self, slot: Slot) -> None:
        """Take note of a run that has ended, and begin the next."""
        if slot.process is not None and slot.process.poll() is not None:
            assert slot.cell is not None
            with self._failing_alone(slot, slot.cell):
                self._end(slot, slot.process.returncode)
        if slot.cell is None and not self.stopped:
            cell = next((cell for cell in self._waiting if self._may_begin(cell)), None)
            if cell is not None:
                self._waiting.remove(cell)
                with self._failing_alone(slot, cell):
                    self._begin(slot, cell)

    @contextmanager
    def _failing_alone(self, slot: Slot, cell: Cell) -> Iterator[None]:
        """A full disk, or a folder that cannot be written to, fails this cell, and ends no other."""
        try:
            yield
        except OSError as error:
            slot.cell = slot.process = None
            self._fail(cell, f"cannot go on: {reason(error)}")

    def _may_begin(self, cell: Cell) -> bool:
        """Whether nothing holds it up: an earlier run of it, or its backbone, which is still to be finished."""
        return not is_locked(cell.path) and self._held_up_by(cell) is None

    def _held_up_by(self, cell: Cell) -> Cell | None:
        """The cell that trains its backbone, unless that is finished, or not needed any more."""
        backbone = self._by_folder.get(cell.backbone) if cell.row.backbone and not cell.finished else None
        return None if backbone is None or backbone.finished else backbone

    # --------------------------------------------------------------------------------------------------------
    # One cell

    def _begin(self, slot: Slot, cell: Cell) -> None:
        slot.cell, slot.began, slot.measures = cell, time.monotonic(), cell.finished
        cell.path.mkdir(parents=True, exist_ok=True)
        (cell.path / BAD_END).unlink(missing_ok=True)
        if slot.measures:
            shutil.rmtree(cell.path / PART, ignore_errors=True)
            command = cell.report_command(cell.folder / PART)
        else:
            for name in (COST, REPORT):  # of a run that had other epochs
                (cell.path / name).unlink(missing_ok=True)
            command = cell.commands(self.processes)
        with open(cell.path / OUTPUT, "ab") as output:
            slot.printed = output.tell()
            slot.process = start(command, output, slot.devices)

    def _end(self, slot: Slot, code: int) -> None:
        cell, measured = slot.cell, slot.measures
        assert cell is not None
        slot.cell = slot.process = None
        spent = clock(time.monotonic() - slot.began)
        if not measured:
            self._training[cell.program.name] += time.monotonic() - slot.began
        if code != 0:
            self._end_badly(cell, code, measured, last_words(cell.path, slot.printed))
            return
        if measured and not (cell.path / PART / REPORT).is_file():
            self._fail(cell, f"the report ended and left none: {last_words(cell.path, slot.printed)}")
            return
        if measured:
            os.replace(cell.path / PART / REPORT, cell.path / REPORT)
            shutil.rmtree(cell.path / PART)
        else:
            cell.close(self.processes, machine())
        if not cell.finished:  # other flags than those of the whole run
            done = f"{cell.epochs} of {cell.args.epochs} epochs are done"
            self._fail(cell, f"{done}, and {cell.program.called} ended")
        elif not cell.reported:
            if measured:
                self._fail(cell, f"the report lacks {', '.join(cell.missing)}, see {cell.folder / REPORT}")
            elif not self.stopped:
                self._begin(slot, cell)
        else:
            self._done += 1
            self._say(f"{cell.name}: done in {spent}")
            self._tell(cell)

    def _tell(self, cell: Cell) -> None:
        """Call what waits for finished cells; what it cannot write does not end the runs."""
        try:
            self.after_cell(cell)
        except UserError as error:
            self.trouble = str(error)
            self._say(f"{error}: the runs go on")

    def _end_badly(self, cell: Cell, code: int, measured: bool, said: str) -> None:
        """Name what failed; what was stopped, or met an earlier run, goes on later."""
        if self.stopped:  # also torchrun, whose exit code says nothing of a run that saved
            return
        if TAKEN_WORDS in said and self._met[cell.name] < MOST_MEETINGS:  # it comes again when that run ends
            self._met[cell.name] += 1
            self._waiting.append(cell)
        elif code == STOPPED or SAVED in said:
            self._fail(cell, "stopped by a signal, and saved")
        else:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._fail(cell, f"{'the report ended' if measured else 'ended'} with {how}: {said}")

    def _fail(self, cell: Cell, why: str) -> None:
        """Name it, and those that cannot begin without it."""
        self.failed[cell.name] = why
        with suppress(OSError):  # it is told at the end, too
            cell.path.mkdir(parents=True, exist_ok=True)
            (cell.path / BAD_END).write_text(f"{why}\n", encoding="utf-8")
        self._say(f"{cell.name}: FAILED: {why}")
        for other in [other for other in self._waiting if self._held_up_by(other) is cell]:
            self._waiting.remove(other)
            self._fail(other, f"not run: its backbone ({cell.name}) is not finished")

    # --------------------------------------------------------------------------------------------------------
    # Signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and Ctrl-C let every run save and stop."""
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        except BaseException:  # whatever it is, no run stays behind; it is raised again
            self._stop_all()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        """Only note it: a run may be about to start, or a line half written."""
        self.stopped = number
        stop_waiting()

    def _pass_on(self) -> None:
        """What has come, once."""
        if self.stopped and not self._passed_on:
            self._passed_on = True
            self._say("stopping: the runs finish their step and save")
            self._stop_all()

    # --------------------------------------------------------------------------------------------------------
    # What is said meanwhile

    def _epochs(self) -> Counter[str]:
        """Those that are done, by the programs: an epoch of one takes another time than that of the other."""
        done: Counter[str] = Counter()
        for cell in self.cells:
            done[cell.program.name] += cell.epochs
        return done

    def _say(self, line: str) -> None:
        if self._terminal:
            print("\r\x1b[K", end="")
        finished = self._kept + self._done
        print(f"[{finished}/{len(self.cells)}] {line}", flush=True)
        self._shown = 0.0 if self._terminal else self._shown

    def _show(self) -> None:
        """Where the work stands, and how long it may take; a line now and then."""
        now = time.monotonic()
        if now - self._shown < SHOWN[self._terminal]:
            return
        self._shown = now
        names = ", ".join(
            f"{slot.cell.name} ({slot.cell.epochs}/{slot.cell.args.epochs})" for slot in self.slots if slot.cell
        )
        waits = [cell.name for cell in self._waiting if is_locked(cell.path)]
        line = (
            f"running {names}"
            if names
            else f"waiting for {waits[0]}, which an earlier run is still training"
            if waits
            else ""
        )
        line += f"; {self._left()}"
        if self._terminal:
            print(f"\r\x1b[K{line}"[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif line:
            print(f"[{self._kept + self._done}/{len(self.cells)}] {line}", flush=True)

    def _left(self) -> str:
        """The time that the epochs left will take at the pace so far, with all slots at work."""
        now, done = time.monotonic(), self._epochs()
        here, left, spent = done - self._epochs_before, Counter[str](), self._training.copy()
        for cell in self.cells:
            left[cell.program.name] += cell.args.epochs - cell.epochs
        for slot in self.slots:
            if slot.cell and not slot.measures:
                spent[slot.cell.program.name] += now - slot.began
        if any(left[name] and not here[name] for name in left):
            return "time left unknown yet"
        seconds = sum(spent[name] / here[name] * left[name] for name in left if left[name])
        return f"about {clock(seconds / len(self.slots))} left"


# ------------------------------------------------------------------------------------------------------------
# Processes and machines


def start(command: Sequence[str], output: IO[bytes], devices: str = "") -> subprocess.Popen[bytes]:
    """Start a command in the project's folder, where Ctrl-C and a closed terminal do not reach it."""
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": devices} if devices else {})}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    return subprocess.Popen(
        interpreter(command),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=env,
        start_new_session=True,
    )


def last_words(folder: Path, start: int = 0) -> str:
    """What a run said at its end: the error, if there is one, else its last line.

    Args:
        start: in bytes: what output.txt held before.
    """
    try:
        text = (folder / OUTPUT).read_bytes()[start:].decode("utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if OF_US.match(line)]  # torchrun's report comes behind it
    others = [line for line in lines[-60:] if OF_PYTHON.match(line)]
    return shown((own or others or lines or ["it printed nothing"])[-1], LAST_WORDS)
