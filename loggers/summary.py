"""summary.csv: one row per epoch, in the columns of timm's training script."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loggers.text import TextLog

SUMMARY = "summary.csv"
EVALUATED = {"eval_loss": "loss", "eval_top1": "acc1", "eval_top5": "acc5"}  # timm's names, and log.txt's


class Summary(TextLog):
    """Writes summary.csv after each epoch, from the lines of log.txt.

    timm's columns come first: epoch, train_loss, eval_loss, eval_top1, eval_top5, lr. As in timm, `eval_*` are the
    numbers of the moving average in an epoch that has one, else the model's. The rest of log.txt follows under its
    own names, among it `test_*` (the model) and `ema_test_*` (the average). A cell is empty where an epoch has no
    such number.

    Args:
        path, lines: as in TextLog.
        evaluated: the columns of an evaluation, and their keys in log.txt behind 'test_'.
    """

    def __init__(self, path: Path, lines: Sequence[str], evaluated: Mapping[str, str] = EVALUATED) -> None:
        super().__init__(path, lines)
        self.evaluated = evaluated

    def _content(self) -> bytes:
        rows = [row_of(json.loads(line), self.evaluated) for line in self.lines]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


def row_of(record: Mapping[str, Any], evaluated: Mapping[str, str] = EVALUATED) -> dict[str, Any]:
    """A record of log.txt as a row: timm's columns, then the others."""
    row: dict[str, Any] = {"epoch": record["epoch"], "train_loss": record.get("train_loss")}
    prefix = "ema_test_" if "ema_test_loss" in record else "test_"
    row |= {column: record.get(prefix + name) for column, name in evaluated.items()}
    row["lr"] = record.get("train_lr")
    return row | {name: value for name, value in record.items() if name not in row and name != "train_lr"}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))
