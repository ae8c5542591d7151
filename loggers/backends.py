"""The trackers of --log-with: what each is called with, and what each makes of names and numbers.

accelerate has a class for each of them, which loggers/trackers.py starts. Nothing is imported here that takes time,
so that a mistyped name and a missing package are told before torch is there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError

REQUIREMENTS = "pip install -r requirements-tracking.txt"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        folder: --output_dir.
        project, name: what the tracker shows.
        id: 32 hexadecimal digits that no other run has; a continued run keeps them.
        first: the first epoch that the tracker does not have yet.
        own_id: the tracker's own name for the run that is continued; empty for a new one, and for trackers that
            take ours.
    """

    folder: Path
    project: str
    name: str
    id: str
    first: int = 0
    own_id: str = ""

    @property
    def unique_name(self) -> str:
        """For trackers that know runs by their names alone."""
        return f"{self.name}-{self.id[:8]}"


@dataclass(frozen=True)
class Backend:
    """A tracker.

    Attributes:
        arguments: those of accelerate's class, for a run.
        package: what is installed for it, where that has another name.
        module: what is imported, where that has another name.
        environment: variables that say where it writes, unless the user has set them.
        hint: what to do if it does not start.
        spells: whether it refuses characters in names, which are spelled out for it (see `spelled`).
        log_with: what else its `log` is called with.
        flags_once: whether the flags are told at the beginning of a run only, not when it is continued.
        own_id: how its own name for the run is read from accelerate's object.
    """

    arguments: Callable[[TrackedRun], dict[str, Any]]
    package: str = ""
    module: str = ""
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}
    hint: str = ""
    spells: bool = False
    log_with: Mapping[str, Any] = field(default_factory=dict)
    flags_once: bool = False
    own_id: Callable[[Any], str] = lambda tracker: ""


# ------------------------------------------------------------------------------------------------------------
# What each is called with


def _tensorboard(run: TrackedRun) -> dict[str, Any]:
    # readers drop what an earlier process wrote of an epoch from `purge_step` on
    return {"run_name": run.unique_name, "logging_dir": run.folder / "tensorboard", "purge_step": run.first}


def _wandb(run: TrackedRun) -> dict[str, Any]:
    arguments: dict[str, Any] = {"run_name": run.project, "name": run.name, "id": run.id, "resume": "allow"}
    if "WANDB_CONSOLE" not in os.environ:
        arguments["settings"] = {"console": "off"}  # stdout and stderr stay as they are
    return arguments


def _trackio(run: TrackedRun) -> dict[str, Any]:
    return {"run_name": run.project, "name": run.unique_name, "resume": "allow", "embed": False}


def _mlflow(run: TrackedRun) -> dict[str, Any]:
    arguments: dict[str, Any] = {"experiment_name": run.project, "run_name": run.name}
    if os.environ["MLFLOW_TRACKING_URI"] == _mlflow_database(run.folder)["MLFLOW_TRACKING_URI"]:
        arguments["logging_dir"] = (run.folder / "mlflow").resolve().as_uri()
    return arguments | ({"run_id": run.own_id} if run.own_id else {})


def _mlflow_database(folder: Path) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').resolve()}"}


def _aim(run: TrackedRun) -> dict[str, Any]:
    continued = {"run_hash": run.own_id} if run.own_id else {}
    return {"run_name": run.name, "logging_dir": str(run.folder), "experiment": run.project, **continued}


def _comet_ml(run: TrackedRun) -> dict[str, Any]:
    return {"run_name": run.project, "experiment_key": run.id, "mode": "get_or_create"}


def _clearml(run: TrackedRun) -> dict[str, Any]:
    new = {"reuse_last_task_id": False}
    continued = {"continue_last_task": run.own_id} if run.own_id else new
    return {"run_name": run.project, "project_name": run.project, "task_name": run.name, **continued}


def _dvclive(run: TrackedRun) -> dict[str, Any]:
    folder = run.folder / "dvclive" / run.unique_name
    return {"dir": str(folder), "resume": run.first > 0, "dvcyaml": None, "save_dvc_exp": False}


def _swanlab(run: TrackedRun) -> dict[str, Any]:
    return {"run_name": run.project, "experiment_name": run.name, "id": run.id, "resume": "allow"}


BACKENDS = {
    "tensorboard": Backend(_tensorboard, flags_once=True),
    "wandb": Backend(
        _wandb,
        environment=lambda folder: {"WANDB_DIR": str(folder)},
        hint="log in with `wandb login`, or export WANDB_MODE=offline",
        log_with={"commit": True},  # else the last epoch waits for the next one
    ),
    "trackio": Backend(_trackio, environment=lambda folder: {"TRACKIO_DIR": str(folder / "trackio")}),
    "mlflow": Backend(
        _mlflow,
        environment=_mlflow_database,
        hint="to write a file it needs the whole of mlflow, not only mlflow-skinny; or export MLFLOW_TRACKING_URI",
        spells=True,
        flags_once=True,  # which cannot be changed there
        own_id=lambda tracker: str(tracker.info.run_id),
    ),
    "aim": Backend(_aim, own_id=lambda tracker: str(tracker.hash)),
    "comet_ml": Backend(
        _comet_ml,
        package="comet-ml",
        environment=lambda folder: {"COMET_OFFLINE_DIRECTORY": str(folder / "comet_ml")},
        hint="export COMET_API_KEY",
    ),
    "clearml": Backend(_clearml, hint="set it up with clearml-init", own_id=lambda tracker: str(tracker.id)),
    "dvclive": Backend(_dvclive),
    "swanlab": Backend(
        _swanlab,
        environment=lambda folder: {"SWANLAB_LOG_DIR": str(folder / "swanlab")},
        hint="log in with `swanlab login`, or export SWANLAB_MODE=local",
        spells=True,
    ),
}


def check_packages(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are missing.

    Raises:
        UserError: with what to install.
    """
    for name in names:
        backend = BACKENDS[name]
        package = backend.package or name
        if not _is_installed("accelerate"):
            raise UserError(f"--log-with {name} needs the package accelerate: {REQUIREMENTS}")
        if not _is_installed(backend.module or name):
            install = REQUIREMENTS if name == "tensorboard" else f"pip install {package}"
            raise UserError(f"--log-with {name} needs the package {package}: {install}")


def _is_installed(module: str) -> bool:
    """Whether a module is there. A folder of that name in the current folder (wandb makes one) is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


# ------------------------------------------------------------------------------------------------------------
# Names and flags

WORDS = {"@": "at", ":": "colon", ",": "comma", "=": "is", "/": "slash", " ": "space"}
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def spelled(name: str) -> str:
    """A name without characters that a tracker refuses: each becomes a word between two spaces.

    Two names stay two, since a space in a name becomes a word as well.

    spelled("train_patch.cosine@last") == "train_patch.cosine at last"
    """
    return "".join(char if char in PLAIN else f" {WORDS.get(char, f'u{ord(char):04x}')} " for char in name)


def flattened(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as trackers take them: numbers, switches and text; a table as one entry for each of its keys."""
    flat: dict[str, Any] = {}
    for name, value in flags.items():
        if isinstance(value, Mapping):
            flat |= flattened({f"{name}.{key}": inner for key, inner in value.items()})
        elif isinstance(value, (list, tuple)):
            flat[name] = " ".join(str(each) for each in value)
        else:
            flat[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
