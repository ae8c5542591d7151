"""Processes without the time of their imports: forks of one that has imported what main.py does, and no more.

A new interpreter imports torch and timm for several seconds of CPU time; a fork has them. In each fork a script
runs as `python SCRIPT ARGUMENTS` would run it: as __main__, in a process of its own, with its own arguments,
environment, streams and signals. What is about the start itself, or a launcher, is tested with new interpreters.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from processes import PATIENCE

ROOT = Path(__file__).parents[1]
# sklearn itself starts a thread, which no fork would have
IMPORTED = ("main", "torch.distributed.fsdp", "scipy.stats", "scipy.sparse.csgraph", "joblib")
NUMBER = struct.Struct("i")


# ------------------------------------------------------------------------------------------------------------
# Here: what tests call


class Fork:
    """A running script; as subprocess.Popen, as far as tests need it."""

    def __init__(self, script: Path, argv: list[str], env: Mapping[str, str], out: int, err: int) -> None:
        self._watcher, theirs = socket.socketpair()
        asked = {"argv": [str(script), *argv], "env": dict(env)}
        socket.send_fds(_server(), [json.dumps(asked).encode()], [out, err, theirs.fileno()])
        theirs.close()
        self.returncode: int | None = None
        self.pid = self._read()

    def _read(self) -> int:
        report = self._watcher.recv(NUMBER.size)
        assert len(report) == NUMBER.size, "the process that others are forks of is gone"
        return NUMBER.unpack(report)[0]

    def poll(self) -> int | None:
        """The exit code, if there is one: that of subprocess, negative for signals."""
        if self.returncode is None and select.select([self._watcher], [], [], 0)[0]:
            self.returncode = self._read()
            self._watcher.shutdown(socket.SHUT_WR)
            self._watcher.recv(1)  # nothing comes, but the watcher's end: then the process is gone as well
            self._watcher.close()
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} seconds")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, if the process has ended. If it ends meanwhile, its number is still its own (`watch_over`)."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Group:
    """One script in several processes that know of one another, as torchrun starts them.

    Attributes:
        forks: the processes, by rank.
        store: where they meet.
    """

    def __init__(
        self, processes: int, script: str, argv: list[str], env: Mapping[str, str], out: int, err: int
    ) -> None:
        self.forks: list[Fork] = []
        self.store = None
        for rank in range(processes):
            own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **env}
            if processes > 1:
                own |= self._place(rank, processes)
            self.forks.append(Fork(ROOT / script, argv, own, out, err))

    def _place(self, rank: int, processes: int) -> dict[str, str]:
        """Variables that torchrun sets: the processes meet in a store of this process."""
        if self.store is None:
            from torch.distributed import TCPStore

            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_RESTART_COUNT": 0}
        return {**{key: str(value) for key, value in place.items()}, "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code of the first that failed, or 0. As with torchrun, one that fails is the end of all."""
        end, failed = time.monotonic() + timeout, 0
        try:
            while any(fork.poll() is None for fork in self.forks):
                codes = [fork.returncode for fork in self.forks]
                if not failed and (failed := next((code for code in codes if code), 0)):
                    for fork in self.forks:
                        fork.send_signal(signal.SIGTERM)
                if time.monotonic() > end:
                    raise TimeoutError(f"{len(self.forks)} processes still run after {timeout} seconds")
                time.sleep(0.01)
            return failed or next((fork.returncode for fork in self.forks if fork.returncode), 0)
        finally:
            self.kill()

    def kill(self) -> None:
        """All at once; when this returns they are gone."""
        for fork in self.forks:
            fork.kill()
        for fork in self.forks:
            fork.wait()


def run(processes: int, script: str, *argv: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What subprocess.run gives of a script, here in that many processes, with their outputs in one."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Group(processes, script, [*argv], env, out.fileno(), err.fileno()).wait()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess([script, *argv], code, out.read(), err.read())


def start_as_the_runner(command: Sequence[str], output: IO[bytes], devices: str = "") -> Fork:
    """In place of `tables.runner.start`: start a run of a table, on the CPU."""
    script, *flags = [f"{command[2]}/__main__.py", *command[3:]] if command[1] == "-m" else command[1:]
    return Fork(ROOT / script, flags, dict(os.environ), output.fileno(), output.fileno())


@cache
def _server() -> socket.socket:
    """A connection to the process that others are forks of; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], cwd=ROOT, env=env, pass_fds=[theirs.fileno()]
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# ------------------------------------------------------------------------------------------------------------
# There: the process that others are forks of


class Asked(NamedTuple):
    """What a fork is to become."""

    words: dict[str, Any]
    out: int
    err: int
    watched: int


def serve(control: socket.socket) -> Asked | None:
    """Fork until the connection ends; what is asked of a fork, in it, and None in the end."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not message:
            return None
        asked = Asked(json.loads(message), *fds)
        if os.fork() == 0:
            control.close()
            return watch_over(asked)
        for fd in fds:
            os.close(fd)


def watch_over(asked: Asked) -> Asked:
    """Fork once more, and tell how the second fork ends; in it, return.

    The second fork stays a zombie until its end was read: who still believes it to run can send a signal to its
    number, and no other process has it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.close(asked.watched)
        return asked
    os.close(asked.out), os.close(asked.err)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # an end without words, if nobody waits for the second fork
    os.write(asked.watched, NUMBER.pack(child))
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert end is not None
    code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    os.write(asked.watched, NUMBER.pack(code))
    os.read(asked.watched, 1)  # nothing comes, but the end of the other side
    os.waitpid(child, 0)
    os._exit(0)


def become(asked: Asked) -> None:
    """Let this process be one that was started with these words."""
    for fd, number in ((os.open(os.devnull, os.O_RDONLY), 0), (asked.out, 1), (asked.err, 2)):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.clear()
    os.environ.update(asked.words["env"])
    sys.argv = asked.words["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int) and threading.active_count() == 1:
            atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(end.code)  # without freeing all objects one by one, which takes half a second
        raise


def main() -> None:
    for name in IMPORTED:
        __import__(name)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a fork would lack other threads"
    gc.collect()
    gc.freeze()  # a fork shares these objects until something is written to them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch over others
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        become(asked)


if __name__ == "__main__":
    main()
