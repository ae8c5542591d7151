"""main.py, but the last process kills itself once, in the middle of the second epoch.

Started by tests/test_resume.py through torchrun, with main.py's flags.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import main
from state.saver import Saver
from utils import rank, world_size

saver_after_step = Saver.after_step


def after_step(self: Saver, step: int) -> None:
    saver_after_step(self, step)
    assert self.folder is not None
    marker = Path(self.folder) / "died"
    if self.run_state.epoch == 0 and step == 7 and rank() == world_size() - 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


Saver.after_step = after_step  # type: ignore[method-assign]
sys.exit(main.main())
