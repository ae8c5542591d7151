"""main.py, but the last process kills itself once, in the middle of an epoch or of its evaluation.

Started by tests/test_resume.py, with main.py's flags. DIES says when: "EPOCH step STEP", or "EPOCH batch BATCH" for
the evaluation; both are counted from 1.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import main
from state.saver import Saver
from utils import rank, world_size

EPOCH, KIND, NUMBER = os.environ["DIES"].split()


def then_die(hook: str) -> None:
    """Let the saver's hook kill the process, when it is told of that number in that epoch."""
    original = getattr(Saver, hook)

    def deadly(self: Saver, number: int) -> None:
        original(self, number)
        assert self.folder is not None
        marker = Path(self.folder) / "died"
        now = self.run_state.epoch + 2 == int(EPOCH) and number == int(NUMBER)
        if now and rank() == world_size() - 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Saver, hook, deadly)


then_die("after_step" if KIND == "step" else "after_batch")
sys.exit(main.main())
