"""Forks are processes as subprocess gives them (forks.py)."""

import os
import signal
import time
from pathlib import Path

import forks
import pytest


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n")
    return path


@pytest.mark.parametrize(
    ("seconds", "number", "code"), [(0, 0, 7), (60, signal.SIGTERM, -15), (60, signal.SIGKILL, -9)]
)
def test_exit_codes(script, seconds, number, code):
    fork = forks.Fork(script, [str(seconds), "7"], os.environ, 1, 2)
    if number:
        fork.send_signal(number)
    assert fork.wait() == fork.poll() == code
    assert not Path(f"/proc/{fork.pid}").exists()
    fork.kill()  # no process has the number any more, or another one has


def test_a_signal_to_one_that_ends_meanwhile(script, monkeypatch):
    """Between the look whether it runs and the signal."""
    fork = forks.Fork(script, ["0", "7"], os.environ, 1, 2)
    while Path(f"/proc/{fork.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(fork, "poll", lambda: None)
        fork.send_signal(signal.SIGTERM)
    assert fork.wait() == 7
