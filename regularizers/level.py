"""What a level is. Nothing heavy is imported here, nor in the modules of the levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Level:
    """What the vectors are that a measure is applied to.

    Attributes:
        name: in specs: 'NAME.measure'.
        meaning: what the items are, in words.
        source: where they are: in what a forward pass shows ('tokens' or 'attention'), or 'weights'.
        items: takes one tensor of that source, and its number of prefix tokens.  -> [..., n, d]
        shape: what their number and their width are, in words.
        first: the block that '@first' means; -1 is the input of block 0.
        ends: whether its layers include what stands before and after all blocks, 'embed' and 'norm'.
        default_layers: what a measure may take here ('set', 'pair', 'gradient', 'labels') -> the layers of a spec
            that names none.
        own_layers: measure -> these layers, where they are not those of what it takes.
        default_arguments: measure -> keyword arguments that differ here from the function's own defaults.
        matrices: of weights, the matrices that a spec may choose among its options, and what they are.
        default_matrices: those of a spec that chooses none.
    Raises:
        ValueError: of weights, something else than sets may be taken.
    """

    name: str
    meaning: str
    source: str
    items: Callable[[Tensor, int], Tensor]
    shape: str
    default_layers: Mapping[str, str]
    first: int = 0
    ends: bool = False
    own_layers: Mapping[str, str] = field(default_factory=dict)
    default_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    matrices: Mapping[str, str] = field(default_factory=dict)
    default_matrices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.of_weights and set(self.default_layers) != {"set"}:
            raise ValueError(f"the level {self.name}: of weights a measure takes sets, and nothing else")

    def layers_without_choice(self, measure: str, takes: str) -> str:
        """The layers of a spec that names none."""
        return self.own_layers.get(measure, self.default_layers[takes])

    @property
    def of_weights(self) -> bool:
        """Whether its terms depend on the weights alone, and not on a batch."""
        return self.source == "weights"
