"""The report: models that were measured, beside each other, as a page, tables and figures."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from errors import UserError, did_you_mean, reason, shown
from redundancy.finding import Assessed
from redundancy.presentation import stored, tables, wording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from redundancy.presentation.figures import Picture


@dataclass
class Report:
    """What was measured, to be read, saved and compared.

        report = redundancy.assess(model, loader)
        print(report.table())
        report.plot("patch.cosine_abs")
        report.save("out")

    Two reports are joined by `+`. Models of one label are seeds of one run: they are averaged.

    Attributes:
        models: in the order in which they are shown; the others are compared with the first.
        about: command, revision, versions, data, seed, date, ...
    """

    models: list[Assessed]
    about: dict[str, str]

    def __add__(self, other: Report) -> Report:
        """Both reports' models; what this one does not say of itself, the other does."""
        return Report([*self.models, *other.models], other.about | self.about)

    def groups(self) -> dict[str, list[Assessed]]:
        """Label -> its models. One whose layers differ from the others' is no seed of theirs: 'LABEL (2)'."""
        groups: dict[str, list[Assessed]] = {}
        for model in self.models:
            label, number = model.label, 1
            while label in groups and not _alike(groups[label][0], model):
                number += 1
                label = f"{model.label} ({number})"
            groups.setdefault(label, []).append(model)
        return groups

    def table(self) -> str:
        """The summary: a Markdown table with aligned columns, and what its standard errors are."""
        return tables.text(self.groups())

    def plot(self, metric: str) -> Figure:
        """The figure of one metric; of a spectrum, that of the last layer.

        Raises:
            UserError: no model has such a metric.
        """
        pictures = self.pictures(metric)
        if not pictures:
            known = [name for model in self.models for name in model.findings]
            raise UserError(f"{metric}: nothing to plot.{did_you_mean(metric, dict.fromkeys(known))}")
        return pictures[-1].figure

    def pictures(self, metric: str) -> list[Picture]:
        """All figures of one metric.

        Raises:
            UserError: matplotlib is not installed.
        """
        groups = self.groups()
        found = {label: tables.findings(models, metric) for label, models in groups.items()}
        pictures: list[Picture] = _figures().draw(metric, found, list(groups))
        return pictures

    def to_json(self) -> str:
        """All numbers, exactly; null where there is none. Examples and numbers of single images are left out."""
        return json.dumps(stored.pack(self.models, self.about), ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote.

        Raises:
            UserError: it is something else.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(f"this is no report.json: {reason(error)}") from error
        return cls(*stored.unpack(data))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write report.html, report.json, numbers.csv, summary.csv, summary.tex and figures/ into a new folder.

        The folder appears when all is written.

        Raises:
            UserError: the folder exists, or cannot be written; matplotlib is not installed.
        """
        folder = Path(folder)
        if os.path.lexists(folder):
            raise UserError(f"{shown(str(folder))} exists; give another --output")
        _figures()
        unfinished = folder.parent / f".{folder.name}.{os.getpid()}.unfinished"
        try:
            unfinished.mkdir(parents=True)
            self._write(unfinished)
            unfinished.rename(folder)
        except OSError as error:
            raise UserError(f"{shown(str(folder))} cannot be written: {reason(error)}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        from redundancy.presentation import figures, page, strips

        groups = self.groups()
        names = wording.names(self.models)
        pictures = {name: self.pictures(name) for name in names}
        (folder / "figures").mkdir()
        for picture in (*chain.from_iterable(pictures.values()), *strips.draw(groups)):
            figures.save(picture.figure, str(folder / "figures" / picture.name))
        texts = {
            "report.html": page.render(groups, self.about, pictures),
            "report.json": self.to_json(),
            "numbers.csv": tables.numbers_csv(groups),
            "summary.csv": tables.summary_csv(groups),
            "summary.tex": tables.latex(groups),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def _alike(a: Assessed, b: Assessed) -> bool:
    """Whether their numbers run over the same layers."""
    return all(a.findings[name].axes == b.findings[name].axes for name in a.findings.keys() & b.findings.keys())


def _figures() -> ModuleType:
    """The drawing half, which needs matplotlib."""
    try:
        from redundancy.presentation import figures
    except ModuleNotFoundError as error:
        raise UserError("the report's figures need matplotlib: pip install matplotlib") from error
    return figures
