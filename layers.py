"""Which layers of a model are meant: 'first', 'last', 'all', a number, a range 'a-b', or several with commas.

Blocks are counted from 0. Of patches there are layers besides: the embeddings before positions are added ('embed'),
the input of block 0, and the final features ('norm').
"""

from __future__ import annotations

import re

from errors import UserError

EMBED = -2  # the patch embeddings before positions are added; the final features are L, the number of blocks
ENDS = ("embed", "norm")
_ONE = re.compile(r"first|last|all|embed|norm|\d+|\d+-\d+")


def is_selector(text: str) -> bool:
    """Whether a text is well-formed; whether a model has these blocks is another question."""
    return all(_ONE.fullmatch(part) for part in text.split(","))


def canonical(selector: str) -> str:
    """The selector with each number in one spelling: 03 is 3."""
    return re.sub(r"\d+", lambda number: str(int(number[0])), selector)


def layer_name(layer: int, depth: int) -> str:
    """What a layer of tokens is called: 'embed', '-1' (the input of block 0), '0', ..., 'norm'."""
    return {EMBED: "embed", depth: "norm"}.get(layer, str(layer))


def resolve_layers(selector: str, depth: int, first: int, spec: str) -> list[int]:
    """Indices that a selector names in a model of `depth` blocks; 'embed' is -2, and 'norm' is `depth`.

    Args:
        first: what 'first' is: -1 for patches, whose first layer is the input of block 0.
        spec: what the selector belongs to, for the message.
    Raises:
        UserError: a block that the model does not have, or an empty range.
    """
    layers: list[int] = []
    for part in selector.split(","):
        named = {"first": first, "last": depth - 1, "embed": EMBED, "norm": depth}
        if part in named:
            layers.append(named[part])
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
