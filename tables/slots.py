"""Room for runs on this machine: its GPUs, shared out, and what else it is."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from tables.cells import Cell


@dataclass
class Slot:
    """Room for one run: the GPUs that it has.

    Attributes:
        devices: for CUDA_VISIBLE_DEVICES; '' leaves them as they are.
    """

    devices: str = ""
    cell: Cell | None = None
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    measures: bool = False  # the report, not main.py
    printed: int = 0  # bytes that output.txt held when the process began


def make_slots(jobs: int, processes: int, device: str) -> list[Slot]:
    """Room for so many runs at a time, each with GPUs of its own.

    Raises:
        UserError: there are not so many, or --device names one.
    """
    import torch

    if not torch.cuda.is_available() or not (device == "auto" or device.startswith("cuda")):
        return [Slot() for _ in range(jobs)]
    if ":" in device:
        if jobs > 1:
            raise UserError(
                f"--device {device} is one GPU, and --jobs {jobs} runs need one each: give --device cuda"
            )
        return [Slot()]
    gpus = visible_gpus(torch.cuda.device_count())
    if jobs * processes > len(gpus):
        raise UserError(
            f"--jobs {jobs} runs of --nproc {processes} processes need {jobs * processes} GPUs, and there are "
            f"{len(gpus)}: give fewer"
        )
    return [Slot(",".join(gpus[k * processes : (k + 1) * processes])) for k in range(jobs)]


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs, as CUDA_VISIBLE_DEVICES has them: up to one that is none, like -1."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else [str(k) for k in range(count)]
    return names[:count]


def machine() -> dict[str, str]:
    """What the runs have: processor and GPU."""
    import torch

    found = {"processor": f"{_processor()}, {os.cpu_count()} logical cores"}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found


def _processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
