"""A resumed run: which checkpoint it continues, and which of its flags hold.

Each flag says in the table (options/flags.py) what a resumed run makes of another value than the checkpoint's. What
comes out of here is what is in force: the plan, args.yaml and the next checkpoint say the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError, shown
from options.config import R
from options.flags import Args
from options.parser import Resume, dashed, declared
from regularizers import REFERENCE_FLAGS, parse_spec
from schedules import scaled_lr
from state import checkpoint
from state.contents import check_contents
from state.saved_flags import flags_of
from utils import broadcast_object, print_main

NEEDED = ("model", "optimizer", "lr_scheduler", "epoch")
OF_THE_OPTIMIZER = ("optimizer", "lr_scheduler")  # without --no-resume-opt
# Flags that contradict the state of an optimizer or schedule; where none is continued, they may change.
FREE_WITHOUT_STATE = ("opt", "opt_kwargs", "layer_decay", "sched")


@dataclass(frozen=True)
class Change:
    """A flag that is not what it was.

    Attributes:
        name: the field.
        was, now: its values.
        rule: what the table says.
        table: the flags' table.
    """

    name: str
    was: Any
    now: Any
    rule: Resume
    table: type = Args

    def __str__(self) -> str:
        return f"{self.option(self.now)}, before {_value(self.was)}"

    def option(self, value: Any) -> str:
        """The flag with a value, as one would type it."""
        if not isinstance(value, bool):
            return f"--{dashed(self.name)} {_value(value)}"
        action = "store_true" if value else "store_false"
        options = [
            option for option in declared(self.table)[self.name].options if option.keywords["action"] == action
        ]
        return options[-1].names[0].format(dashed(self.name)) if options else f"no --{dashed(self.name)}"


@dataclass
class Earlier:
    """The run that is continued.

    Attributes:
        path: of its checkpoint.
        state: the content, until it is loaded: it takes as much memory as the run itself.
        changes: the flags that are not what they were, and hold from here on.
    """

    path: str
    state: dict[str, Any]
    changes: list[Change] = field(default_factory=list)

    @property
    def was(self) -> dict[str, Any]:
        """The former values of the flags that have changed."""
        return {change.name: change.was for change in self.changes}

    def is_in(self, folder: Path | None) -> bool:
        """Whether its checkpoint lies in this folder."""
        return folder is not None and Path(self.path).resolve().parent == folder.resolve()

    @property
    def processes(self) -> int | None:
        """How many there were, if the checkpoint says so."""
        own = self.state.get("processes")
        return len(own) if own is not None else None


def find(args: Args) -> Earlier | None:
    """Read the checkpoint that `--resume` names; None for a fresh run. All processes must ask together.

    Raises:
        UserError: it cannot be read, does not hold what a continuation needs, or is of the middle of an epoch where
            --no-resume-opt begins one.
    """
    if not args.resume:
        return None
    path = args.resume
    if path == "auto":
        folder = Path(args.output_dir)
        newest: str | None = broadcast_object(lambda: _path_of_newest(folder))
        if newest is None:
            print_main(f"--resume auto: no checkpoint in {folder}, this is a fresh run")
            return None
        path = newest
    state = checkpoint.load(path)
    needed = [key for key in NEEDED if args.resume_opt or key not in OF_THE_OPTIMIZER]
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(
            f"{path} cannot be resumed, it has no {', '.join(missing)}; --{args.starts_from} starts from its "
            "weights, --eval --resume evaluates them"
        )
    check_contents(state, path)
    if state.get("step") and not args.resume_opt:
        raise UserError(
            f"{path} was written in the middle of an epoch, and --no-resume-opt begins one with a fresh optimizer: "
            "take a checkpoint of a whole epoch"
        )
    return Earlier(path, state)


def _path_of_newest(folder: Path) -> str | None:
    found = checkpoint.newest(folder)
    return str(found[0]) if found is not None else None


def in_force(args: R, earlier: Earlier) -> R:
    """The flags that hold in a resumed run. Each change is named once, here, and noted in `earlier`.

    Raises:
        UserError: a flag has changed that must stay.
    """
    state, path = earlier.state, earlier.path
    step = state.get("step", 0)
    saved = flags_of(state)
    if isinstance(state.get("args"), argparse.Namespace) and saved.get("lr") == scaled_lr(args):
        del saved["lr"]  # DeiT and the reference save it scaled
    found = differences(saved, args)
    if not args.resume_opt:
        found = [
            replace(change, rule=Resume.NOW) if change.name in FREE_WITHOUT_STATE else change for change in found
        ]
    kept: dict[str, Any] = {}
    for change in found:
        before = change.option(change.was)
        if change.rule is Resume.STAYS:
            raise UserError(
                f"{path} was trained with {before}, not {_value(change.now)}: keep it, or start from its weights "
                f"with --{args.starts_from}"
            )
        if change.rule is Resume.EPOCH and step:
            raise UserError(
                f"{path} was written in the middle of an epoch with {before}, not {_value(change.now)}: keep it, "
                "or resume from a checkpoint of a whole epoch"
            )
        if change.rule is Resume.SAVED:
            kept[change.name] = change.was
            print_main(f"note: {change.option(change.now)} has no effect: the checkpoint's {before} holds")
    earlier.changes = [change for change in found if change.rule in (Resume.EPOCH, Resume.NOW)]
    for change in earlier.changes:
        print_main(f"note: from here on {change}")
    return replace(args, **kept)


def differences(saved: Mapping[str, Any], args: Args) -> list[Change]:
    """The flags whose values differ, of those that a checkpoint holds, without those that may be anything."""
    table = declared(type(args))
    terms = _terms(saved)
    found = []
    for name, flag in table.items():
        if flag.resume is Resume.FREE or name in REFERENCE_FLAGS or name == "class_names":
            continue  # the reference's coefficients are in `reg`; classes are compared when the data is there
        if name == "reg" and terms is not None:
            was, now = terms, sorted(args.reg)
        elif name != "reg" and name in saved:
            was, now = _as_list(saved[name]), _as_list(getattr(args, name))
        else:
            continue
        if was != now:
            found.append(Change(name, was, now, flag.resume, type(args)))
    return found


def _terms(saved: Mapping[str, Any]) -> list[str] | None:
    """A checkpoint's `reg`, or the terms that the reference's coefficients in it mean; None if it has neither."""
    if isinstance(saved.get("reg"), list):
        return sorted(str(text) for text in saved["reg"])
    coefficients = {term: saved[name] for name, term in REFERENCE_FLAGS.items() if name in saved}
    if not coefficients:
        return None
    specs = [parse_spec(f"{term}={coef!r}") for term, coef in coefficients.items() if coef]
    return sorted(f"{spec.name}={spec.coef!r}" for spec in specs)


def _as_list(value: Any) -> Any:
    """YAML and the command line make lists of what Python may have as tuples."""
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    """A value as one would type it; what a file holds may be anything."""
    if isinstance(value, list):
        text = " ".join(str(each) for each in value)
    elif isinstance(value, dict):
        text = " ".join(f"{key}={each}" for key, each in value.items())
    else:
        text = "" if value is None else str(value)
    return shown(text) or "(none)"
