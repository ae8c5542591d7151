"""A loader's worker processes: how many, what signals they hear, and what to say when one dies."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from errors import LocalError
from program import STOPPING, Patience, daemons, end_workers

SIGNAL_SECONDS = 5  # until the death of a worker is known, at most
WORKERS: WeakSet[BaseProcess] = WeakSet()  # of the loaders that are being read
MOST_WORKERS = 10  # of a process that is not told how many to start: DeiT's number


class WorkerDied(LocalError):
    """A loader's worker process ended without an exception of its own, for example killed for lack of memory."""


@contextmanager
def name_dead_workers() -> Iterator[None]:
    """Turn torch's report of a worker that died into a WorkerDied with advice.

    It belongs around everything that runs while loaders do: torch learns of the death from a signal, and raises
    wherever the process happens to be, not only in the loader. A worker that dies while it hands over a batch
    breaks a connection first; then the signal is awaited. Where the signal comes while the loader waits, torch says
    only that a worker exited, and the reason stands in the error's cause. Where it comes while an object is
    deleted, Python drops what torch raises; so at last the workers' exit codes are asked.
    """
    WORKERS.clear()
    try:
        try:
            yield
        except (ConnectionError, EOFError) as error:
            time.sleep(SIGNAL_SECONDS)  # where torch's handler of the signal raises
            codes = [worker.exitcode for worker in WORKERS if worker.exitcode]
            if not codes:
                raise
            raise _worker_died(_how_it_ended(codes[0])) from error
    except RuntimeError as error:
        report = r"DataLoader worker \(pid.*?\) ((?:is killed by|exited unexpectedly)[^.]*)"
        death = re.match(report, str(error.__cause__)) or re.match(report, str(error))
        if death is None:
            raise
        raise _worker_died(death[1]) from error


def _how_it_ended(code: int) -> str:
    """A worker's exit code in the words of torch's report."""
    if code < 0:
        return f"is killed by signal: {signal.strsignal(-code)}"
    return f"exited unexpectedly with exit code {code}"


def _worker_died(how: str) -> WorkerDied:
    return WorkerDied(
        f"a data loading worker died: {how}. Often memory or /dev/shm is full (look at dmesg, df -h /dev/shm): "
        "give fewer --num_workers, a smaller --batch-size or more memory"
    )


def default_workers(env: Mapping[str, str] = os.environ) -> int:
    """DeiT's ten, but not more than this process's share of the cores that it may use.

    srun gives each process cores of its own. torchrun starts LOCAL_WORLD_SIZE processes that share theirs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = min(cores, int(env.get("SLURM_CPUS_PER_TASK", cores))) // int(env.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST_WORKERS, share))


class SteadyLoader(DataLoader[Any]):
    """A DataLoader whose workers do not hear SIGTERM and SIGUSR1, which ask a run to stop, nor Ctrl-C.

    Such a signal often reaches all processes of a run, and the main one needs its workers until the last step is
    saved; what is to be said of Ctrl-C, it says itself. They start with the signals blocked, and keep that.

    What else ends a worker by SIGTERM has to kill it: torch, if it does not end by itself, and multiprocessing at
    the end of this process, which would wait for ever. There `end_workers` comes first.

    Args:
        seconds: that a batch may take, before the program is ended.
        options: DataLoader's.
    """

    def __init__(self, dataset: Any, seconds: float = math.inf, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=_begin, **options)
        self._patience = Patience(seconds)
        Finalize(None, end_workers, exitpriority=0)

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, signal.SIGINT))
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in daemons():
            process.terminate = process.kill  # type: ignore[method-assign]
        own = getattr(batches, "_workers", [])  # none, if this process reads by itself
        return _known_while_read(self._patience.over_each(batches, "reading a batch of images"), own)


def _begin(worker: int) -> None:
    """In a worker: say nothing when the process that it hands a batch to goes away meanwhile.

    Whoever ended that process knows why, or else `name_dead_workers` there says it.
    """
    sys.excepthook = _tell_unless_left


def _tell_unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _known_while_read(batches: Iterator[Any], own: Sequence[BaseProcess]) -> Iterator[Any]:
    """Hand batches on. Their workers are in WORKERS until the last one, or until nobody reads on.

    After an error they stay there, to be asked how they ended. Later torch may kill them on purpose.
    """
    WORKERS.update(own)
    try:
        yield from batches
    except GeneratorExit:
        WORKERS.difference_update(own)
        raise
    WORKERS.difference_update(own)
