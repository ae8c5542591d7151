"""What tests need of processes: how long they wait for one, whether it is there, programs that stand for others."""

import time
from pathlib import Path

PATIENCE = 900  # seconds: a busy machine is slow, but a process that hangs must end


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or after
        return False


def ends(pid: int, seconds: float = 30) -> bool:
    """Whether a process that was killed is gone soon: on a busy machine it may still be there for a moment."""
    end = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def executable(path: Path, text: str) -> None:
    """Make a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
