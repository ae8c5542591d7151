"""A run that is killed at every single write, rename, link and fsync of its last save, and continued each time.

Started by tests/test_resume.py with a folder of images and an empty one. Every run is a fork of this process, which
has imported everything and computed nothing. The accuracy rises, so that the last epoch is the best. It prints how
many kills there were.

Of the some hundred writes of a checkpoint the first, second, fourth, eighth, ... count; with ALL_WRITES=1 all do.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from small_runs import assert_same, saved, train

import main
import utils
from state.run_state import RunState

ALL_WRITES = os.environ.get("ALL_WRITES") == "1"
FLAGS = ["--epochs", "3", "--lr", "3e-2", "--resume", "auto"]


class Countdown:
    """Kills the process at the n-th operation on files from the last epoch's end on."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.armed = False

    def tick(self, before: Callable[[], object] = lambda: None) -> None:
        if self.armed:
            self.left -= 1
            if self.left == 0:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        """Watch all that saving calls, once the last epoch is in the state."""
        finish = RunState.finish_epoch

        def finish_epoch(run_state: RunState, *measured: Any) -> Any:
            record = finish(run_state, *measured)
            self.armed = run_state.epoch == 2
            return record

        RunState.finish_epoch = finish_epoch  # type: ignore[method-assign]
        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, self.counted(getattr(os, name)))
        utils.open = lambda *args: Counted(open(*args), self)  # type: ignore[attr-defined]  # noqa: SIM115

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.tick()
            return call(*args, **options)

        return watched


class Counted:
    """An open file, whose writes count; the one that is killed writes a half."""

    def __init__(self, file: IO[bytes], countdown: Countdown) -> None:
        self.file, self.countdown = file, countdown
        self.writes = 0

    def write(self, content: Any) -> int:
        def half() -> None:
            self.file.write(bytes(content)[: len(bytes(content)) // 2])
            self.file.flush()

        self.writes += 1
        if ALL_WRITES or self.writes & (self.writes - 1) == 0:
            self.countdown.tick(half)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def forked(work: Callable[[], int]) -> int:
    """The exit status of a copy of this process that does some work."""
    child = os.fork()
    if child == 0:
        os._exit(work())
    return os.waitpid(child, 0)[1]


def run(images: Path, output: Path, kill_at: int = 0) -> int:
    def work() -> int:
        evaluate = main.evaluate_run

        def better_each_time(run_state: RunState, *others: Any) -> Any:
            tested, averaged = evaluate(run_state, *others)
            rising = {"acc1": 10.0 * (run_state.epoch + 2)}
            return tested | rising, averaged | rising

        main.evaluate_run = better_each_time
        if kill_at:
            Countdown(kill_at).arm()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return train(images, output, *FLAGS)

    return forked(work)


def content(folder: Path) -> dict[str, Any]:
    """What a run has left: its checkpoints without the name of their folder, its log and its summary."""
    states = {path.name: saved(folder, path.name) for path in folder.glob("checkpoint*")}
    for state in states.values():
        del state["args"]["output_dir"]
    return {**states, "log": (folder / "log.txt").read_text(), "summary": (folder / "summary.csv").read_text()}


def kill_everywhere(images: Path, root: Path) -> None:
    assert run(images, root / "whole") == 0
    expected = content(root / "whole")
    assert {"checkpoint.pth", "checkpoint.1.pth", "checkpoint_best.pth", "log", "summary"} == set(expected)
    assert expected["checkpoint_best.pth"]["epoch"] == 2, "the last epoch must be the best one"
    assert os.WTERMSIG(run(images, root / "killed1", kill_at=1)) == signal.SIGKILL
    shutil.copytree(root / "killed1", root / "before")  # the last epoch is all that the other runs train
    kills = 0
    while True:
        output = root / f"killed{kills + 1}"
        shutil.copytree(root / "before", output, dirs_exist_ok=True)
        status = run(images, output, kill_at=kills + 1)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        kills += 1
        assert run(images, output) == 0
        assert_same(content(output), expected, f"killed at operation {kills}: ")
        left = {path.name for path in output.iterdir()} - set(expected) - {"args.yaml", "log.txt", "summary.csv"}
        assert not left, (kills, left)
    print(kills)


if __name__ == "__main__":
    kill_everywhere(Path(sys.argv[1]), Path(sys.argv[2]))
