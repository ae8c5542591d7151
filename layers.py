"""Which blocks of a model are meant: 'first', 'last', 'all', a number, a range 'a-b', or several with commas."""

from __future__ import annotations

import re

from errors import UserError

_ONE = re.compile(r"first|last|all|\d+|\d+-\d+")


def is_selector(text: str) -> bool:
    """Whether a text is well-formed; whether a model has these blocks is another question."""
    return all(_ONE.fullmatch(part) for part in text.split(","))


def canonical(selector: str) -> str:
    """The selector with each number in one spelling: 03 is 3."""
    return re.sub(r"\d+", lambda number: str(int(number[0])), selector)


def resolve_layers(selector: str, depth: int, first: int, spec: str) -> list[int]:
    """Block indices that a selector names in a model of `depth` blocks.

    Args:
        first: what 'first' is: -1 for patches, whose first layer is the input of block 0.
        spec: what the selector belongs to, for the message.
    Raises:
        UserError: a block that the model does not have, or an empty range.
    """
    layers: list[int] = []
    for part in selector.split(","):
        if part in ("first", "last"):
            layers.append(first if part == "first" else depth - 1)
        elif part == "all":
            layers += range(depth)
        else:
            low, _, high = part.partition("-")
            start, end = int(low), int(high or low)
            if end < start:
                raise UserError(f"{spec!r}: the range {part} is empty")
            if end >= depth:
                outside = max(start, depth)
                raise UserError(f"{spec!r}: layer {outside} is out of range, the model has blocks 0 to {depth - 1}")
            layers += range(start, end + 1)
    return list(dict.fromkeys(layers))
