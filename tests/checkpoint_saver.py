"""Processes that save checkpoints and are killed while they do. Started by tests/test_checkpoint.py.

Each line on stdin is a job. It is done by a forked process, which needs no start of its own: saves with rising
counters, the number of each finished save appended to the file `saved`. The process is killed after `delay`
seconds; or it kills itself, in its second save, at the event with number `event`: before and after the calls that
change the disk, and before, in and after every write. The answer is the signal that ended it, 0 if none did.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import utils
from state import checkpoint

STEPS = 3  # checkpoints per epoch


def content(counter: int, size: int) -> dict[str, Any]:
    """A checkpoint that says which one it is, in every value."""
    weights = {name: torch.full((size,), float(counter)) for name in ("a", "b")}
    return {"model": weights, "epoch": counter // STEPS, "step": counter % STEPS}


class Events:
    """Counts what happens to the disk, and kills the process at the event with a given number."""

    def __init__(self, deadly: int) -> None:
        self.left = deadly
        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, self.watch(getattr(os, name)))
        utils.open = self.open  # this module's, before the builtin

    def happen(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, function: Any) -> Any:
        def watched(*args: Any, **options: Any) -> Any:
            self.happen()
            result = function(*args, **options)
            self.happen()
            return result

        return watched

    def open(self, path: Path, mode: str) -> Any:
        if mode != "wb":
            return open(path, mode)
        self.happen()
        file = Unbuffered(path, mode)
        file.happen = self.happen
        return file


class Unbuffered(io.FileIO):
    """A file whose writes reach the disk in two parts."""

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        super().write(data[: len(data) // 2])
        self.happen()
        super().write(data[len(data) // 2 :])
        self.happen()
        return len(data)


def run(folder: Path, start: int, size: int, event: int | None) -> None:
    with open(folder / "saved", "ab", buffering=0) as saved:
        for counter in itertools.count(start) if event is None else range(start, start + 2):
            if event is not None and counter > start:
                Events(event)
            checkpoint.save(content(counter, size), folder / "checkpoint.pth", keep=2)
            saved.write(f"{counter}\n".encode())


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(Path(job["folder"]), job["start"], job["size"], job["event"])
            os._exit(0)
        if job["delay"] is not None:
            time.sleep(job["delay"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or status == 0, status
        print(os.WTERMSIG(status), flush=True)


if __name__ == "__main__":
    main()
