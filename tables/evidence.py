"""What a run leaves in its folder: its log, what it cost, its redundancy, and where its numbers come from."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, reason
from loggers.text import LOG
from tables.spec import LARGEST, OF_COST, OF_REPORT, Column
from utils import write_atomically

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, COST, ARGS, REPORT, BAD_END = "output.txt", "cost.json", "args.yaml", "report.json", "failed.txt"
PROGRESS = re.compile(r"^Epoch (\d+)/\d+ .*?\[(\d+)/(\d+)\].*? ([\d.]+) it/s", re.MULTILINE)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run's log.txt; none if there is no such file.

    Raises:
        UserError: it is no log.
    """
    path = folder / LOG
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no log of a run: {reason(error)}") from error
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} is no log of a run: a line is no JSON object")
    return lines


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; remove it, and run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: remove it, and run again")
    return content


@dataclass(frozen=True)
class Measured:
    """A run's redundancy report.

    Attributes:
        findings: by the metrics' names.
        known: the metrics that were measured, or of which the report says why they have no number.
        images: how many were drawn, as its command says.
    """

    findings: Mapping[str, Any]
    known: tuple[str, ...]
    images: int


def read_report(folder: Path) -> Measured | None:
    """What `python -m redundancy` has left for a run; None if nothing.

    Raises:
        UserError: it is damaged.
    """
    path = folder / REPORT
    content = read_object(path)
    if content is None:
        return None
    try:
        model = content["models"][0]
        words = str(content["about"]["command"]).split()
        images = int(words[words.index("--images") + 1])
        return Measured(model["findings"], (*model["findings"], *model["gaps"]), images)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no redundancy report of a table: remove it, and run again") from error


def read_value(column: Column, folder: Path) -> float | None:
    """The number of a finished run in a column; None if it has none, or none that is finite."""
    if column.value in OF_COST:
        value = (read_object(folder / COST) or {}).get(column.value)
    elif column.value.startswith(OF_REPORT):
        value = _of_report(read_report(folder), column.value.removeprefix(OF_REPORT))
    else:
        log = read_log(folder)
        value = log[-1].get(column.value) if log else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return value / column.divide


def _of_report(report: Measured | None, place: str) -> float | None:
    """METRIC@LAYER of a report: 'mean' over the blocks, 'first', 'last', or a layer's name."""
    metric, _, layer = place.partition("@")
    finding = report.findings.get(metric) if report is not None else None
    if finding is None:
        return None
    labels = finding["axes"][0]["labels"] if finding["axes"] else []
    if not layer or not labels:
        return _mean(finding["mean"])
    blocks = [k for k, label in enumerate(labels) if label.isdigit()]
    chosen = {"mean": blocks, "first": blocks[:1], "last": blocks[-1:]}.get(
        layer, [k for k, label in enumerate(labels) if label == layer]
    )
    return _mean([finding["mean"][k] for k in chosen])


def _mean(values: Any) -> float | None:
    """Of all numbers in lists of lists; None if one is a gap, or there are none."""
    flat = [*_flat(values)]
    return statistics.fmean(flat) if flat and None not in flat else None


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list):
        for each in values:
            yield from _flat(each)
    else:
        yield values


def origin(folder: Path) -> dict[str, str]:
    """Where a run's numbers come from: revision and versions, as its args.yaml says them, and the machine."""
    path = folder / ARGS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    said = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    return {**said, **{name: str(value) for name, value in (read_object(folder / COST) or {}).items()}}


# ------------------------------------------------------------------------------------------------------------
# What it cost


def write_cost(folder: Path, images: int, epochs: int, processes: int, machine: Mapping[str, str]) -> None:
    """Say what a run cost, from the progress that it printed; with this it is finished.

    Args:
        images: of a step, of all processes.
        epochs: of the whole run.
    """
    rates: dict[int, tuple[int, float]] = {}  # of each epoch: its steps, and how many a second
    for text in printed(folder):
        for epoch, step, steps, rate in PROGRESS.findall(text):
            if step == steps and float(rate) > 0:
                rates[int(epoch)] = int(steps), float(rate)
    cost: dict[str, Any] = {name: None for name in OF_COST}
    if rates:
        seconds = [steps / rate for steps, rate in rates.values()]
        cost["images_per_second"] = images * statistics.median(rate for _, rate in rates.values())
        cost["hours"] = statistics.fmean(seconds) * epochs / 3600
    content = json.dumps({**cost, "processes": processes, **machine}, indent=1) + "\n"
    write_atomically(folder / COST, lambda file: file.write(content.encode()))


def printed(folder: Path) -> Iterator[str]:
    """What a run has printed, here or in a job."""
    for path in (folder / OUTPUT, *sorted(folder.glob("submitit/*/*_0_log.out"))):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
