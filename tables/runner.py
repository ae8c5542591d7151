"""Runs cells side by side: keeps the finished ones, goes on with the broken ones, and leaves none behind.

A cell is main.py in a process of its own. If this program is killed, main.py goes on by itself, and the next runner
waits for it: main.py's lock on its folder says that it is still there. A signal to this program makes every run
save and stop.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from errors import UserError, shown
from loggers.progress import clock
from program import STOPPED
from state.lock import TAKEN_WORDS, is_locked
from tables.cells import BAD_END, COST, OUTPUT, REPORT, ROOT, Cell, interpreter, write_cost

PART = ".report"  # while it is made
PAUSE = 0.2  # seconds between two looks at what runs
SHOWN = 60.0, 1.0  # seconds between two lines that say where the work stands, in a file and on a terminal
LAST_WORDS = 300  # letters of a failed run's last line
OF_US = re.compile(r"(main\.py|redundancy): ")
OF_PYTHON = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
SAVED = "and saved"  # of a run that a signal has stopped
MOST_MEETINGS = 20  # of a cell with a run that holds its folder


@dataclass
class Slot:
    """Room for one run: the GPUs that it has.

    Attributes:
        devices: for CUDA_VISIBLE_DEVICES; '' leaves them as they are.
    """

    devices: str = ""
    cell: Cell | None = None
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    measures: bool = False  # the report, not main.py
    printed: int = 0  # bytes that output.txt held when the process began


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
        self._waiting = [cell for cell in self.cells if not (cell.finished and cell.reported)]
        self._kept = len(self.cells) - len(self._waiting)
        self._done = 0
        self._met: Counter[str] = Counter()  # how often a cell has met an earlier run
        self._epochs_before = self._epochs()
        self._training = 0.0  # seconds of the runs that have ended
        self._shown = 0.0
        self._terminal = sys.stdout.isatty()

    def run(self) -> None:
        """Run them all; those that fail are named, and the others go on."""
        total = len(self.cells)
        print(
            f"{total} cells: {self._kept} finished before, {len(self._waiting)} to run, {len(self.slots)} at a time"
        )
        with self._signals():
            while (self._waiting and not self.stopped) or any(slot.cell for slot in self.slots):
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
            self._end(slot, slot.process.returncode)
        if slot.cell is None and not self.stopped:
            cell = next((cell for cell in self._waiting if not is_locked(cell.path)), None)
            if cell is not None:
                self._waiting.remove(cell)
                self._begin(slot, cell)

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
        self._training += 0 if measured else time.monotonic() - slot.began
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
            write_cost(cell, self.processes, machine())
        if not cell.finished:  # other flags than those of the whole run
            self._fail(cell, f"{cell.epochs} of {cell.args.epochs} epochs are done, and main.py ended")
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
        self.failed[cell.name] = why
        (cell.path / BAD_END).write_text(f"{why}\n", encoding="utf-8")
        self._say(f"{cell.name}: FAILED: {why}")

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
        if not self.stopped:
            self._say("stopping: the runs finish their step and save")
        self.stopped = number
        self._stop_all()

    # --------------------------------------------------------------------------------------------------------
    # What is said meanwhile

    def _epochs(self) -> int:
        return sum(cell.epochs for cell in self.cells)

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
        done = self._epochs()
        here = done - self._epochs_before
        left = sum(cell.args.epochs for cell in self.cells) - done
        if not here:
            return "time left unknown yet"
        now = time.monotonic()
        at_work = sum(now - slot.began for slot in self.slots if slot.cell and not slot.measures)
        return f"about {clock((self._training + at_work) / here * left / len(self.slots))} left"


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


def make_slots(jobs: int, processes: int, device: str) -> list[Slot]:
    """Room for so many runs at a time, each with GPUs of its own.

    Raises:
        UserError: there are not so many, or --device names one.
    """
    import torch

    if not torch.cuda.is_available() or not (device == "auto" or device.startswith("cuda")):
        return [Slot() for _ in range(jobs)]
    if ":" in device:
        if jobs > 1:
            raise UserError(
                f"--device {device} is one GPU, and --jobs {jobs} runs need one each: give --device cuda"
            )
        return [Slot()]
    gpus = visible_gpus(torch.cuda.device_count())
    if jobs * processes > len(gpus):
        raise UserError(
            f"--jobs {jobs} runs of --nproc {processes} processes need {jobs * processes} GPUs, and there are "
            f"{len(gpus)}: give fewer"
        )
    return [Slot(",".join(gpus[k * processes : (k + 1) * processes])) for k in range(jobs)]


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs, as CUDA_VISIBLE_DEVICES has them: up to one that is none, like -1."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else [str(k) for k in range(count)]
    return names[:count]


def machine() -> dict[str, str]:
    """What the runs have: processor and GPU."""
    import torch

    found = {"processor": f"{_processor()}, {os.cpu_count()} logical cores"}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found


def _processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
