"""Where a run stands, for the terminal and for files that its output is sent to."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping

from loggers.meters import Meters
from utils import is_main


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _can_show(text: str) -> bool:
    """Whether the terminal's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class Progress:
    """Count steps and show where the work stands: a bar on a terminal, a line per interval elsewhere.

    The bar moves at every step, and drops what a narrow terminal has no room for. tqdm's would cut a number in two.

    Args:
        header: what the line starts with, e.g. 'Epoch 3/300'.
        interval: steps between updates of the shown means; reading them waits for the device, so none are read in
            between.
        units_after: units of the same length still to come after this one, for the run's ETA.
    """

    BAR = 24
    FULL, EMPTY = "█", "·"
    PAUSE = 0.1  # seconds between two pictures of the bar, if its means are the same

    def __init__(self, header: str, interval: int = 10, units_after: int = 0) -> None:
        self.header = header
        self.interval = interval
        self.units_after = units_after
        self._terminal = sys.stdout.isatty()
        self._shown_width = 0
        self._marks = (self.FULL, self.EMPTY) if _can_show(self.FULL + self.EMPTY) else ("#", "-")

    def over(self, first: int, total: int, meters: Meters) -> Iterator[int]:
        """Yield the steps from `first` to `total`; show progress every `interval` steps and after the last."""
        start = shown = time.perf_counter()
        means: Mapping[str, float] = {}
        for step in range(first, total + 1):
            yield step
            now = time.perf_counter()
            news = step % self.interval == 0 or step == total
            if is_main() and (news or (self._terminal and now - shown >= self.PAUSE)):
                means = meters.means() if news else means
                self._show(step, total, means, (now - start) / (step - first + 1))
                shown = now
        if is_main() and self._terminal:
            print(flush=True)

    def _show(self, step: int, total: int, means: Mapping[str, float], each: float) -> None:
        eta = f"eta {clock(each * (total - step))}"
        if self.units_after:
            eta += f", run {clock(each * (total - step + total * self.units_after))}"
        entries = [f"[{step}/{total}]", eta, f"{1 / each:.2f} it/s"]
        entries += [f"{name} {value:.4g}" for name, value in means.items()]
        if not self._terminal:
            print("  ".join([self.header, *entries]), flush=True)
            return
        done = round(self.BAR * step / max(total, 1))
        full, empty = self._marks
        line = f"{self.header} |{full * done}{empty * (self.BAR - done)}|"
        room = shutil.get_terminal_size().columns - 1
        for entry in entries:
            if len(line) + 2 + len(entry) > room:
                break
            line += "  " + entry
        print("\r" + line.ljust(self._shown_width), end="", flush=True)
        self._shown_width = len(line)
