"""What happens around a run: signals at any time, a terminal that goes away, hung reads, two runs in one folder."""

from __future__ import annotations

import array
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forks
import pytest
from processes import PATIENCE, ends
from small_runs import FLAGS, make_images, saved, train

import main
from errors import UserError
from loggers.meters import Meters
from loggers.progress import Progress
from program import Lasting
from state import lock as lock_module
from state.lock import Lock

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "main.py"
LONG = ["--epochs", "1000", "--print-freq", "1"]
ENV = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@contextmanager
def started(images: Path, output: Path, *flags: str, **options) -> Iterator[subprocess.Popen[str]]:
    """A run as a user starts it; it is dead when the test is over."""
    words = [sys.executable, "main.py", *FLAGS, "--data-path", str(images), "--output_dir", str(output), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with subprocess.Popen(words, cwd=ROOT, env=ENV, text=True, **pipes) as run:
        try:
            yield run
        finally:
            run.kill()


class Run(forks.Fork):
    """A run as a fork (forks.py), of main.py or another script; it is dead when the test is over."""

    def __init__(
        self, images: Path, output: Path, *flags: str, script: Path = MAIN, one_pipe: bool = False, **variables: str
    ) -> None:
        words = [*FLAGS, "--data-path", str(images), "--output_dir", str(output), *flags]
        reading, writing = os.pipe()
        self.stdout, self.stderr = os.fdopen(reading), os.fdopen(os.memfd_create("errors"), "w+")
        errors = writing if one_pipe else self.stderr.fileno()
        super().__init__(script, words, {**ENV, **variables}, writing, errors)
        os.close(writing)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.wait()
        self.stdout.close(), self.stderr.close()

    def communicate(self) -> tuple[str, str]:
        """What it still writes to both streams, until its end."""
        out = self.stdout.read()
        self.wait()
        self.stderr.seek(0)
        return out, self.stderr.read()


def wait_for(run: Run | subprocess.Popen[str], text: str) -> None:
    assert run.stdout is not None
    for line in run.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


def workers_of(run: Run | subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


# ------------------------------------------------------------------------------------------------------------
# Signals


SAID = {
    signal.SIGTERM: (75, "main.py: stopped by a signal"),
    signal.SIGUSR1: (75, "main.py: stopped by a signal"),
    signal.SIGINT: (130, "main.py: interrupted"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_signal_while_torch_is_imported(images, tmp_path, name):
    with started(images, tmp_path / "run", *LONG) as run:
        while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(name)
        _, error = run.communicate(timeout=PATIENCE)
    assert (run.returncode, error.strip()) == SAID[name]


BEGINNING = """
import os, runpy, signal, sys

class Killing:
    def find_spec(self, name, *rest):
        if name.startswith(("options", "tables", "torch")):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Killing())
sys.path.insert(0, "")
name = sys.argv[1]
(runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
"""


@pytest.mark.parametrize("name", ["main.py", "segmentation", "redundancy", "script/reproduce_table.py"])
def test_a_signal_before_the_command_line_is_read(name):
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING, name], cwd=ROOT, env=ENV, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, f"\n{Path(name).name}: interrupted\n")


BUILDING = """
import io, os, runpy, sys, time
import build

class Interrupting(io.RawIOBase):
    def writable(self):
        return True

    def write(self, text):
        os.kill(os.getpid(), int(os.environ["NUMBER"]))
        return len(text)

def build_for_long(*_):
    name = os.environ["WRITING"]
    kept = sys.stdout, sys.stderr  # they would be closed
    if name:
        stream = io.TextIOWrapper(io.BufferedWriter(Interrupting()), write_through=True)
        setattr(sys, name, stream)
        print("x", file=stream, flush=True)
    else:
        os.kill(os.getpid(), int(os.environ["NUMBER"]))
    time.sleep(10_000)

build.build_backbone = build_for_long
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("writing", ["", "stdout", "stderr"])
@pytest.mark.parametrize("name", SAID)
def test_a_signal_while_the_model_is_built(images, tmp_path, name, writing):
    """Also in the middle of a write, as of one that its reader holds up: streams cannot be used again then."""
    script = tmp_path / "building.py"
    script.write_text(BUILDING)
    variables = {"NUMBER": str(int(name)), "WRITING": writing}
    with Run(images, tmp_path / "run", *LONG, script=script, **variables) as run:
        _, error = run.communicate()
    assert (run.returncode, error.strip()) == SAID[name]
    assert not (tmp_path / "run").exists()


def in_pipe(reading: int) -> int:
    """Bytes that wait to be read; a pipe holds some 64 thousand."""
    count = array.array("i", [0])
    fcntl.ioctl(reading, termios.FIONREAD, count)
    return count[0]


def fill_pipe(run: Run) -> None:
    """Wait until a pipe is full that nobody reads, and hardly holds anything."""
    fcntl.fcntl(run.stdout, fcntl.F_SETPIPE_SZ, 4096)
    while in_pipe(run.stdout.fileno()) < 3900:
        assert run.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "both"])
def test_a_signal_while_nobody_reads_the_output(images, tmp_path, both):
    """The write never ends, but the program does; also where its last words have no reader either."""
    script = tmp_path / "held_up.py"
    script.write_text(BUILDING.replace('name = os.environ["WRITING"]', 'print("x" * 1_000_000); name = None'))
    with Run(images, tmp_path / "run", *LONG, script=script, one_pipe=both) as run:
        fill_pipe(run)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 75


@pytest.mark.parametrize(("name", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_a_run_whose_output_nobody_reads(images, tmp_path, name, code):
    """It no longer waits for a reader: the step ends, and is saved."""
    with Run(images, tmp_path / "run", *LONG, "--val-interval", "1000", one_pipe=True) as run:
        fill_pipe(run)
        run.send_signal(name)
        assert run.wait() == code
    assert not (tmp_path / "run/.lock").exists()
    if code == 75:
        assert train(images, tmp_path / "run", "--resume", "auto", "--epochs", "1") == 0


def test_more_signals_while_it_stops(images, tmp_path):
    """The first one asks; the others change nothing, whatever the run is doing."""
    with Run(images, tmp_path, *LONG, "--num_workers", "1") as run:
        wait_for(run, "Epoch 2/1000")
        workers = workers_of(run)
        stop = threading.Event()

        def insist() -> None:
            while run.poll() is None and not stop.is_set():
                run.send_signal(signal.SIGTERM)
                time.sleep(0.01)

        thread = threading.Thread(target=insist)
        thread.start()
        out, error = run.communicate()
        stop.set()
        thread.join()
    assert run.returncode == 75 and "Traceback" not in error
    assert "and saved: continue with --resume auto" in out + error
    assert workers and all(map(ends, workers))
    assert saved(tmp_path)["epoch"] >= 0


def test_interrupted_twice(images, tmp_path):
    """By a Ctrl-C that the terminal sends to all processes; the workers leave it to the run."""
    with Run(images, tmp_path, *LONG, "--num_workers", "1") as run:
        wait_for(run, "Epoch 2/1000")
        for worker in workers_of(run):
            os.kill(worker, signal.SIGINT)
        wait_for(run, "Epoch 4/1000")
        workers = workers_of(run)
        run.send_signal(signal.SIGINT)
        time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate()
    assert run.returncode == 130 and "Traceback" not in error
    assert all(map(ends, workers))


LOSING = """
import os, runpy, signal, sys
import state.checkpoint
whole = state.checkpoint.write_atomically

class Interrupting:
    def __init__(self, file):
        self.file, self.written = file, 0

    def write(self, content):
        self.written += 1
        if os.environ["WHERE"] == "writing" and self.written == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(content)

    def flush(self):
        self.file.flush()

    def __del__(self):
        if os.environ["WHERE"] == "deleting":
            os.kill(os.getpid(), signal.SIGINT)

def write_atomically(path, write, *rest):
    whole(path, lambda file: write(Interrupting(file)), *rest)

state.checkpoint.write_atomically = write_atomically
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("where", ["writing", "deleting"])
def test_a_ctrl_c_that_is_lost(images, tmp_path, where):
    """In the middle of torch.save it becomes a RuntimeError, and what __del__ raises is dropped."""
    script = tmp_path / "losing.py"
    script.write_text(LOSING)
    with Run(images, tmp_path / "run", "--epochs", "2", script=script, WHERE=where) as run:
        _, error = run.communicate()
    assert (run.returncode, error) == (130, "\nmain.py: interrupted\n")


# ------------------------------------------------------------------------------------------------------------
# Output that nobody reads


def test_a_closed_pipe_and_a_lost_connection(images, tmp_path):
    """`| head`, then the terminal is gone: the run goes on, and everything is saved."""
    with started(images, tmp_path, "--epochs", "3", "--print-freq", "1", "--num_workers", "1") as run:
        wait_for(run, "Epoch 1/3")
        run.stdout.close()
        run.stderr.close()
        for pid in [run.pid, *workers_of(run)]:
            os.kill(pid, signal.SIGHUP)
        assert run.wait(timeout=PATIENCE) == 0
    assert saved(tmp_path)["epoch"] == 2 and len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_streams_that_were_closed_before_the_start(images, tmp_path):
    command = (
        f"'{sys.executable}' main.py {' '.join(FLAGS)} --data-path {images} --output_dir {tmp_path} --epochs 1"
    )
    done = subprocess.run(f"{command} <&- >&- 2>&-", shell=True, cwd=ROOT, env=ENV, timeout=PATIENCE, check=False)
    assert done.returncode == 0 and saved(tmp_path)["epoch"] == 0


def test_help_into_a_closed_pipe():
    done = subprocess.run(
        f"'{sys.executable}' main.py --help | head -1; echo ${{PIPESTATUS[0]}}",
        **{"shell": True, "executable": "/bin/bash", "cwd": ROOT, "capture_output": True, "text": True},
        check=False,
    )
    assert done.stdout.splitlines() == ["usage: main.py --data-path FOLDER [--config FILE.yaml] [FLAGS]", "0"]
    assert done.stderr == ""


def test_a_terminal_that_is_not_utf8(monkeypatch):
    raw = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(stream._stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    progress = Progress("Épreuve", interval=1)
    assert list(progress.over(1, 2, Meters())) == [1, 2]
    stream.flush()
    shown = raw.getvalue().decode("ascii")
    assert "\\xc9preuve |############------------|" in shown


def test_a_full_disk_behind_stdout_ends_nothing():
    with open("/dev/full", "w", encoding="utf-8") as full:
        stream = Lasting(full)
        print("text", file=stream, flush=True)
        print("more", file=stream, flush=True)


# ------------------------------------------------------------------------------------------------------------
# What hangs


def test_a_stopped_worker_ends_the_run(images, tmp_path):
    with Run(images, tmp_path, *LONG, "--num_workers", "1", "--dist-timeout", "15") as run:
        wait_for(run, "Epoch 2/1000")
        workers = workers_of(run)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        _, error = run.communicate()
    assert run.returncode == 1
    assert "error: reading a batch of images takes longer than --dist-timeout, 15 seconds: a data " in error
    assert workers and all(map(ends, workers))


HANGING = """
import os, sys, time
import datasets, main
decode = datasets.LabelledImages.decode

def hang_later(self, index):
    if os.path.exists(os.environ["LATER"]):
        time.sleep(10_000)
    return decode(self, index)

datasets.LabelledImages.decode = hang_later
sys.exit(main.main())
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_system_that_hangs_ends_the_run(images, tmp_path, workers):
    """Also where the one process reads by itself."""
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    later = {"LATER": str(tmp_path / "log.txt")}
    flags = [*LONG, "--dist-timeout", "12", "--num_workers", workers]
    with Run(images, tmp_path, *flags, script=script, **later) as run:
        _, error = run.communicate()
    assert run.returncode == 1
    assert "reading a batch of images takes longer than --dist-timeout, 12 seconds" in error
    assert "Traceback" not in error and saved(tmp_path)["epoch"] >= 0


# ------------------------------------------------------------------------------------------------------------
# Two runs in one folder


def test_a_second_run_in_the_folder_is_refused(images, tmp_path, capsys):
    """Until the first one is dead, in whatever way."""
    folder = tmp_path / "run"
    with Run(images, folder, *LONG, "--num_workers", "1") as run:
        wait_for(run, "Epoch 2/1000")
        capsys.readouterr()
        before = {path.name: path.read_bytes() for path in folder.glob("args.yaml")}
        assert train(images, folder, "--epochs", "1") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"main.py: error: another run is writing to --output_dir {folder}: wait for its end")
        assert {path.name: path.read_bytes() for path in folder.glob("args.yaml")} == before
        for worker in workers_of(run):
            os.kill(worker, signal.SIGSTOP)  # what outlives the run must not hold the lock
        run.kill()
        run.wait()
        assert train(images, folder, "--epochs", "1") == 0
    assert not (folder / ".lock").exists()


def test_a_folder_that_cannot_be_locked_is_used(tmp_path, monkeypatch, capsys):
    def unknown(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock_module.fcntl, "lockf", unknown)
    with Lock(tmp_path / "run"):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write to --output_dir .*: Not a directory"),
        Lock(tmp_path / "file/x"),
    ):
        pass


def test_a_folder_that_is_removed_during_the_run(images, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    monkeypatch.setattr(main.Classification, "print_plan", lambda *_: shutil.rmtree(folder))
    assert train(images, folder, "--epochs", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: error: cannot write checkpoints to {folder}: No such file or directory")
