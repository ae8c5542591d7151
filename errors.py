"""What a user is told when something cannot work.

Nothing is imported here that takes time, so that a mistyped flag is answered before torch is there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """Something the user gave cannot work. The message says what, and what to do about it."""


class LocalError(UserError):
    """A UserError that perhaps only this process meets: every process prints its own."""


# What libraries raise for an argument that they cannot use.
BAD_ARGUMENT = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    OSError,
)


class TrainingDiverged(Exception):
    """The loss is no longer finite. The message names the first term that broke."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it did so after saving."""


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """' Did you mean a, b or c?' for the nearest known words, or '' if none is near."""
    near = difflib.get_close_matches(word, list(known), n=count)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    return shown(" ".join(str(error).split()), 1000) or type(error).__name__


def escaped(text: str) -> str:
    """A text in which all that a terminal would obey, or could not show, is an escape; the ends of lines stay.

    Names of files, of classes and of a checkpoint's parts may hold anything: colours, a carriage return, marks that
    turn the direction of writing, bytes that are no text.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shown(text: str, limit: int = 200) -> str:
    r"""A text of others for a message: in one line, escaped, and without its middle where it is long.

    shown("cat\x1b[31m") == r"cat\x1b[31m"
    shown("a" * 1000, 9) == "aa ... aa"
    """
    short = escaped(_shortened(text, limit)).replace("\n", r"\n")
    return _shortened(short, limit)  # an escape is longer than what it stands for


def _shortened(text: str, limit: int) -> str:
    half = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def is_first_on_machine(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first process of its machine; known before any process group is."""
    return env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) == "0"
