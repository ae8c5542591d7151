"""From a table of flags to a command line. Nothing is imported here that takes time.

The table is a dataclass, and each of its fields is a flag. The annotation gives the type; `flag` or `switch` says
what it and the default do not, and what a resumed run makes of another value:

    @dataclass
    class Args:
        epochs: int = flag(300, NOW, "epochs to train", limits=(1, 1000))           # --epochs N
        opt_betas: list[float] | None = flag(None, NOW, "the optimizer's", nargs="+")  # --opt-betas X [X ...]
        pin_mem: bool = switch(True, FREE, on="pin host memory", off="do not pin")  # --pin-mem, --no-pin-mem

Every name works in both spellings (--batch-size, --batch_size).
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from errors import UserError, did_you_mean

T = TypeVar("T")
Limits = tuple[float, float]
METAVARS = {float: "X", int: "N", str: "TEXT"}


# ------------------------------------------------------------------------------------------------------------
# A row of the table


class Resume(Enum):
    """What a flag's value is worth when a run is resumed with another one than it had."""

    STAYS = "must stay"
    SAVED = "the checkpoint's holds"
    EPOCH = "the new one holds from the next epoch on; within an epoch it must stay"
    NOW = "the new one holds from here on"
    FREE = "free: it does not change what is trained"


@dataclass(frozen=True)
class Option:
    """One way to give a flag: its names on the command line, and argparse's keywords.

    In a name, {} is the field's.
    """

    names: tuple[str, ...]
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class Flag:
    """What a field declares beside its name, type and default.

    Attributes:
        options: one, or several for a switch.
        group: a title, if this flag opens a group of --help. The flags after it stand in the same group.
        limits: smallest and largest value, if there are any.
        resume: what a resumed run makes of another value.
    """

    options: tuple[Option, ...]
    resume: Resume
    group: str = ""
    limits: Limits | None = None


def flag(
    default: T,
    resume: Resume,
    help: str,
    *names: str,
    group: str = "",
    limits: Limits | None = None,
    **keywords: Any,
) -> T:
    """A flag with a value.

    Args:
        names: on the command line, where they are not the field's alone. --help shows the spelling given here.
        resume, group, limits: see `Flag`.
        keywords: argparse's choices, metavar, nargs, const or action.
    """
    if "choices" in keywords:
        keywords.setdefault("metavar", None)  # --help shows the choices
    option = Option(names or ("--{}",), {"help": help, **keywords})
    return _field(default, Flag((option,), resume, group, limits))


def switch(
    default: T,
    resume: Resume,
    *,
    on: str | Mapping[str, str] = "",
    off: str | Mapping[str, str] = "",
    group: str = "",
) -> T:
    """A flag without a value on the command line; by default True, False, or None for what other flags say.

    Args:
        on, off: help text of the option that sets it (--NAME), and of the one that unsets it (--no-NAME), each if
            there is one; or names, with their help texts.
        resume, group: see `Flag`.
    """
    options = []
    for action, name, help in (("store_true", "--{}", on), ("store_false", "--no-{}", off)):
        texts = help if isinstance(help, Mapping) else {name: help} if help else {}
        options += [Option((name,), {"help": text, "action": action}) for name, text in texts.items()]
    return _field(default, Flag(tuple(options), resume, group))


def _field(default: Any, declared: Flag) -> Any:
    metadata = {"flag": declared}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(table: type) -> dict[str, Flag]:
    """What the fields of a table declare, by name, without those that it withholds (`Args.withheld`)."""
    withheld = getattr(table, "withheld", {})
    return {name: row for name, row in _rows(table).items() if name not in withheld}


def _rows(table: type) -> dict[str, Flag]:
    return {entry.name: entry.metadata["flag"] for entry in fields(table) if "flag" in entry.metadata}


def dashed(name: str) -> str:
    return name.replace("_", "-")


def underscored(name: str) -> str:
    return name.replace("-", "_")


def spellings(name: str) -> list[str]:
    """A long name as it is, with dashes, and with underscores; a short one as it is."""
    stem = name.removeprefix("--")
    both = ["--" + dashed(stem), "--" + underscored(stem)] if name.startswith("--") else []
    return list(dict.fromkeys([name, *both]))


# ------------------------------------------------------------------------------------------------------------
# The parser


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, with the nearest flags."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        hint = did_you_mean(unknown[0].partition("=")[0], self.long_names()) if unknown else ""
        end = "" if message.endswith("?") else "."  # of a choice, which has its hint
        raise UserError(f"{message}{end}{hint} --help lists every flag")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own check of `choices`, with the nearest ones."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean(str(value), [str(choice) for choice in action.choices or ()])
            raise argparse.ArgumentError(action, error.message + (f".{hint}" if hint else "")) from None

    def long_names(self) -> dict[str, argparse.Action]:
        """What stands behind every name with two dashes."""
        return {name: action for name, action in self._option_string_actions.items() if name.startswith("--")}

    def add_table(
        self, table: type, only: Collection[str] | None = None, **other: Any
    ) -> dict[str, argparse._ArgumentGroup]:
        """Add the flags of a table. The first one must open a group.

        Args:
            only: the names of those that are added; None are all.
            other: defaults that are not the table's.
        Returns: the groups, by title.
        """
        groups: dict[str, argparse._ArgumentGroup] = {}
        types, defaults = get_type_hints(table), vars(table()) | other
        title, wanted = "", declared(table)
        for name, row in _rows(table).items():
            title = row.group or title
            if name not in wanted or (only is not None and name not in only):
                continue
            group = groups.get(title) or self.add_argument_group(title)
            groups[title] = group
            for option in row.options:
                names = [spelling for each in option.names for spelling in spellings(each.format(dashed(name)))]
                keywords = {**_type_of(types[name]), **option.keywords}
                group.add_argument(*names, dest=name, default=defaults[name], **keywords)
        return groups

    def given(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """What a command line says, without defaults.

        Raises:
            UserError: an unknown flag, or a value that it cannot have.
        """
        nothing = argparse.Namespace(**{action.dest: None for action in self.long_names().values()})
        return {name: value for name, value in vars(self.parse_args(argv, nothing)).items() if value is not None}


def _type_of(annotation: Any) -> dict[str, Any]:
    """argparse's words for `float`, and for a `float | None` or `list[float] | None` that is given."""
    inner = [part for part in get_args(annotation) if part is not NoneType]
    if inner:
        return _type_of(inner[0])
    return {} if annotation is bool else {"type": annotation, "metavar": METAVARS[annotation]}


class KeyValues(argparse.Action):
    """KEY=VALUE pairs, added to those given before. A value is a Python literal, or else text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})
        for word in values:
            key, equals, text = word.partition("=")
            if not equals:
                raise argparse.ArgumentError(self, f"{word!r} is not KEY=VALUE")
            pairs[key] = _literal(text)
        setattr(namespace, self.dest, pairs)


class Size(argparse.Action):
    """One number of pixels, or two: height and width. Equal ones are kept as one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, self.of(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error

    @staticmethod
    def of(values: Sequence[int]) -> int | list[int]:
        """Raises: ValueError: neither one number nor two."""
        if len(values) not in (1, 2):
            raise ValueError(
                f"it takes one number of pixels, or height and width, not {len(values)} (channels are --in-chans)"
            )
        return values[0] if values[0] == values[-1] else list(values)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # whatever is no literal
        return text


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each name, and defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=112)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = isinstance(action.const, bool) or action.default in (None, "", [], {})
        return action.help if says_nothing else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        every = list(action.option_strings)
        action.option_strings = [s for i, s in enumerate(every) if dashed(s) not in map(dashed, every[:i])]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = every
