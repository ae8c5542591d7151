"""NeuTRENO: each block's attention is drawn back to the values of the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from errors import UserError
from models.layout import Layout
from models.remedies.attending import MapRemedy, Passing, heads_of, refuse, taps_of


class NeuTRENO(MapRemedy):
    r"""Add the difference of the first block's values to the block's own ones.

        o'_l = o_l + c (v_0 - v_l),   l > 0

    The map is as it was. There are no parameters.

    Args:
        heads: H, which does not matter.
        weight: c.
    Source: Nguyen et al., Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals, 2023
        (arXiv 2312.00751), which calls c lambda~; 0.6 is its value for DeiT.
    """

    name = "neutreno"
    not_recomputed = "hands values from block to block, which a block that runs later would miss"

    def __init__(self, heads: int, *, weight: float = 0.6) -> None:
        super().__init__(heads)
        self.weight = weight
        self.first = Passing()
        self.is_first = self.is_last = False

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], **options: Any) -> None:
        """Put one into each of these blocks; the first of them gives its values.

        Raises:
            UserError: a single block, or blocks whose values cannot be compared: windows, stages, several
                attentions side by side.
        """
        if len(blocks) < 2:
            raise UserError("--remedy neutreno compares a block with the first one: give at least two blocks")
        taps = [(block, taps_of(layout, block, cls.name)) for block in blocks]
        first, shape = Passing(), None
        for block, (tap, *others) in taps:
            if others:
                refuse(layout, block, cls.name, "several attentions stand side by side in it")
            if hasattr(layout.blocks[block], "shift_size"):
                refuse(layout, block, cls.name, "its windows are not those of the first block")
            own = heads_of(tap.attention), layout.weights(block, ["v"])[0].shape[-2:]
            shape = own if shape is None else shape
            if own != shape:
                refuse(layout, block, cls.name, f"its values are of another width than those of block {blocks[0]}")
        for block, (tap, *_) in taps:
            remedy = cls(heads_of(tap.attention), **options)
            remedy.first, remedy.is_first, remedy.is_last = first, block == blocks[0], block == blocks[-1]
            remedy.attach(tap)

    def on_output(self, output: Tensor, v: Tensor) -> Tensor:
        """o' of o [..., H, n, d] and v [..., H, m, d].

        Raises:
            UserError: the first block's values have another shape.
        """
        if self.is_first:
            self.first.tensor = v
            return output
        first = self.first.tensor
        if self.is_last:
            self.first.tensor = None
        if first is None or first.shape != v.shape or output.shape != v.shape:
            raise UserError(
                "--remedy neutreno compares the values of all blocks, but here they have different shapes: choose "
                "blocks of one scale whose keys are not reduced (neutreno@LAYERS), or another --model"
            )
        return output + self.weight * (first - v)
