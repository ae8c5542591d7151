"""What is said of a measure beside its function: where it applies, and which options a spec may give it.

Nothing heavy is imported here: `catalogue.py` reads these declarations without torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from regularizers.levels import LEVELS

if TYPE_CHECKING:
    from torch import Tensor

Takes = Literal["set", "pair", "gradient", "labels"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Option(NamedTuple):
    """What an option of a spec does.

    Attributes:
        argument: the keyword argument of the measure that it sets.
        meaning: in words, for `--list-regularizers` and docs/regularizers.md.
        value: what a word such as 'abs' sets it to; None for a number, written 'tau=0.1'.
        above: a number must be greater than this.
    """

    argument: str
    meaning: str
    value: bool | None = None
    above: float = -math.inf

    def written(self, name: str, number: object = "X") -> str:
        """How a spec gives it: 'abs', or 'tau=X'."""
        return name if self.value is not None else f"{name}={number}"


def levels_of(takes: str, only: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The levels at which a measure applies: those that have what it takes, or `only` these.

    Raises:
        ValueError: one of `only` does not exist or does not have what the measure takes, or no level has it.
    """
    able = tuple(name for name, level in LEVELS.items() if takes in level.default_layers)
    unable = [name for name in only or () if name not in able]
    if unable or not able:
        where = f", not at {', '.join(unable)}" if unable else ""
        raise ValueError(f"a measure that takes {takes!r} applies at {', '.join(able) or 'no level'}{where}")
    return able if only is None else only


def options_of(defaults: Mapping[str, Any], options: Mapping[str, Option]) -> tuple[str, ...]:
    """The options of a measure with these keyword arguments."""
    return tuple(name for name, option in options.items() if option.argument in defaults)


@dataclass(frozen=True)
class Measure:
    """A measure and what it is applied to.

    Attributes:
        function: takes one set of items, a pair of sets, the gradient at the items, or patch logits and labels.
        takes: 'set' (one layer), 'pair' (two layers), 'gradient' (of the label loss, at one layer) or 'labels'.
        levels: where it applies.
        averaged: whether its items are averaged with the image's own cross-entropy; of those that take labels.
        detached: whether the first of two layers is a target, through which no gradient flows; of those that take a
            pair.
        options: names from the table of options that `function` accepts.
        defaults: the function's keyword arguments and their defaults.
    """

    function: Callable[..., Tensor]
    takes: Takes
    levels: tuple[str, ...]
    averaged: bool
    detached: bool
    options: tuple[str, ...]
    defaults: Mapping[str, Any]


class Registry(dict[str, Measure]):
    """Measures by name, in the order in which they were registered.

    Args:
        options: every option that a measure may have, by name.
    """

    def __init__(self, options: Mapping[str, Option]) -> None:
        super().__init__()
        self._options = options

    def measure(
        self,
        *,
        takes: Takes = "set",
        levels: tuple[str, ...] | None = None,
        averaged: bool = False,
        detached: bool = False,
    ) -> Callable[[Function], Function]:
        """A decorator that registers a function under its own name; see `Measure`.

        Args:
            levels: where it applies; None is every level that has what it takes.
        """

        def register(function: Function) -> Function:
            parameters = inspect.signature(function).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            where, options = levels_of(takes, levels), options_of(defaults, self._options)
            self[function.__name__] = Measure(function, takes, where, averaged, detached, options, defaults)
            return function

        return register
