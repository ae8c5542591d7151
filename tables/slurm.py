"""Cells as jobs of SLURM, through script/run_with_submitit.py."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from errors import UserError, reason, shown
from state.lock import is_locked
from tables.cells import Cell
from tables.evidence import ROOT
from tables.programs import MAIN

JOB = "job.txt"  # in a cell's folder: its latest job
SUBMITTED = re.compile(r"submitted job (\S+);")


def submit(cells: Sequence[Cell], processes: int, flags: str) -> dict[str, str]:
    """Submit those that are neither finished nor queued, and close those that have ended; returns why some failed.

    Args:
        flags: of run_with_submitit.py, as they are typed.
    """
    words = shlex.split(flags)
    failed = {}
    for cell in (cell for cell in cells if not cell.finished):
        job = queued(cell)
        if job or is_locked(cell.path):
            print(f"{cell.name}: {f'job {job} is in the queue' if job else 'is being trained'}")
            continue
        if cell.epochs == cell.args.epochs:
            cell.close(processes, {})
            continue
        if not cell.has_backbone:
            print(f"{cell.name}: waits for its backbone {cell.row.backbone}; the same command later submits it")
            continue
        if (cell.path / JOB).is_file():
            before = (cell.path / JOB).read_text(encoding="utf-8").strip()
            logs = cell.folder / "submitit"
            print(f"{cell.name}: job {before} ended at epoch {cell.epochs} of {cell.args.epochs}; logs in {logs}")
        command = submission(cell, processes, words)
        submitted = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        found = SUBMITTED.search(submitted.stdout)
        if submitted.returncode != 0 or found is None:
            failed[cell.name] = shown((submitted.stderr or submitted.stdout).strip(), 400)
            print(f"{cell.name}: FAILED: {failed[cell.name]}", flush=True)
            continue
        cell.path.mkdir(parents=True, exist_ok=True)
        (cell.path / JOB).write_text(f"{found[1]}\n", encoding="utf-8")
        print(f"{cell.name}: job {found[1]}", flush=True)
    return failed


def submission(cell: Cell, processes: int, words: Sequence[str]) -> list[str]:
    """What submits a cell, in words that one could type in the project's folder."""
    own = [] if cell.program is MAIN else ["--program", cell.program.name]
    own += ["--ngpus", str(processes), "--job-name", f"{cell.table.runs}-{cell.row.name}-{cell.seed}"]
    return ["python", "script/run_with_submitit.py", *own, *words, "--", *cell.flags]


def queued(cell: Cell) -> str:
    """The number of a cell's job, if it waits or runs; else ''.

    Raises:
        UserError: SLURM does not answer.
    """
    try:
        job = (cell.path / JOB).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    try:
        asked = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"squeue cannot be run, to see whether job {job} still waits: {reason(error)}") from error
    return job if asked.returncode == 0 and asked.stdout.strip() else ""
