"""What remedies of the attention map have in common: where they sit in a timm attention module, and when they act.

An attention module computes o = A v, A = softmax(scores), either with the map A in hand or in one fused kernel that
never forms it. A remedy changes A, or adds to o. So it says both: what becomes of the map (`on_map`, ...), and what
the changed map makes of any values, told what the map before it makes of them (`attend`). The second form keeps the
fused kernel. Neither form knows the module's class: the map is changed where `models.adapters` sees it, and calls
of `scaled_dot_product_attention`, of softmax and of the product with the values are seen as they are made.

Legend: B images (and windows), H heads, n queries, m keys, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from errors import UserError
from models.adapters import MapTap, inverse, permuted, remedies_of
from models.layout import Layout

Attend = Callable[[Tensor], Tensor]  # values [..., H, m, d] -> what a map makes of them, [..., H, n, d]

SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
PRODUCT = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Passing:
    """A tensor on its way from one place of a forward pass to another. A copy of the model starts without it.

    Attributes:
        tensor: None while no pass is under way.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Passing:
        return Passing()

    def __reduce__(self) -> Any:
        return Passing, ()


class MapRemedy(nn.Module):
    """A remedy of one attention module. Subclasses change what differs.

    Attributes:
        name: what `--remedy` calls it.
        needs_map: whether it has no form without the map, so that the module leaves the fused kernel.
        keeps_rows: whether the rows of the changed map still sum to 1.

    Args:
        heads: H.
    """

    name: ClassVar[str]
    needs_map: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self._order: tuple[int, ...] = ()
        self.dropped = Passing()  # the map after dropout and all remedies, which the values are multiplied by

    @classmethod
    def install(cls, layout: Layout, blocks: Sequence[int], **options: Any) -> None:
        """Put one into each attention of these blocks.

        Raises:
            UserError: it is not defined there.
        """
        for block in blocks:
            for tap in taps_of(layout, block, cls.name):
                cls(heads_of(tap.attention), **options).attach(tap)

    def attach(self, tap: MapTap) -> None:
        """Take a place in the attention module that the tap is of."""
        attention, self._order = tap.attention, tap.order
        if any(not isinstance(getattr(hook, "__self__", None), MapRemedy) for hook in hooks_before(tap.hooked)):
            raise UserError(
                f"--remedy {self.name} changes a map that something looks at already: build remedies in before "
                "diversity terms are attached to the model"
            )
        others = [remedy for remedy in remedies_of(attention) if isinstance(remedy, MapRemedy)]
        settle(attention, self.name, self)
        if others:
            self.dropped = others[0].dropped
        if not isinstance(attention, Attends):
            kind: Any = type(attention)
            attention.__class__ = _attends(kind)
        if type(self).on_map is not MapRemedy.on_map:
            tap.hooked.register_forward_pre_hook(self._before_dropout)
        if type(self).on_dropped is not MapRemedy.on_dropped or type(self).on_output is not MapRemedy.on_output:
            attention.attn_drop.register_forward_hook(self._after_dropout)
        if self.needs_map or attention.attn_drop.p > 0:  # dropped entries of the map have no form without it
            attention.fused_attn = False

    def on_scores(self, scores: Tensor) -> Tensor:
        """What the softmax is taken of.  [..., H, n, m] -> the same; for those that need the map."""
        return scores

    def on_map(self, attention: Tensor) -> Tensor:
        """The changed map, before attention dropout.  [..., H, n, m] -> the same"""
        return attention

    def on_dropped(self, attention: Tensor) -> Tensor:
        """The changed map, after attention dropout.  [..., H, n, m] -> the same; for those that need the map."""
        return attention

    def attend(self, before: Attend, v: Tensor) -> Tensor:
        """What the map of `on_map` makes of values, without the map.

        Args:
            before: what the unchanged map makes of values.
            v: [..., H, m, d].
        Returns: [..., H, n, d].
        """
        return before(v)

    def on_output(self, output: Tensor, v: Tensor) -> Tensor:
        """What is added to the output o [..., H, n, d], with and without the map; v [..., H, m, d]."""
        return output

    def _before_dropout(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = self.on_map(permuted(args[0], self._order))
        return permuted(changed, inverse(self._order)), *args[1:]

    def _after_dropout(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.dropped.tensor = self.on_dropped(output)
        return self.dropped.tensor


class Attending(TorchFunctionMode):
    """One call of an attention module, seen by its remedies.

    Args:
        remedies: in the order in which they were given.
    """

    def __init__(self, remedies: Sequence[MapRemedy]) -> None:
        super().__init__()
        self.remedies = remedies

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func in SOFTMAX:
            scores = args[0]
            for remedy in self.remedies:
                scores = remedy.on_scores(scores)
            return func(scores, *args[1:], **kwargs)
        if func in PRODUCT:
            return self._product(func(*args, **kwargs), *args)
        return func(*args, **kwargs)

    def _fused(self, kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        def plain(values: Tensor) -> Tensor:
            return kernel(q, k, values, **kwargs)

        attend: Attend = plain
        for remedy in self.remedies:
            attend = partial(remedy.attend, attend)
        output = attend(v)
        for remedy in self.remedies:
            output = remedy.on_output(output, v)
        return output

    def _product(self, output: Tensor, a: Tensor, v: Tensor) -> Tensor:
        """A product in the attention: that of the map and the values, or another one."""
        dropped = self.remedies[0].dropped
        if a is dropped.tensor:
            dropped.tensor = None
            for remedy in self.remedies:
                output = remedy.on_output(output, v)
        return output


class Attends:
    """Marks attention modules whose remedies see each call.

    Attributes:
        stock_class: timm's.
    """

    stock_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """So that a copy, and a pickle, find the class again, which has no name of its own."""
        how: Any = super().__reduce_ex__(protocol)
        return _made, (self.stock_class,), *how[2:]


def _made(kind: Any) -> Any:
    """An attention module that sees its remedies, without anything in it."""
    own = _attends(kind)
    return own.__new__(own)


@cache
def _attends(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of attention modules that has the name and the place of another one, and remedies."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        remedies = [remedy for remedy in self.remedies.values() if isinstance(remedy, MapRemedy)]
        with Attending(remedies):
            return kind.forward(self, *args, **kwargs)

    own = {"forward": forward, "__module__": kind.__module__, "stock_class": kind}
    return type(kind.__name__, (kind, Attends), own)


# ------------------------------------------------------------------------------------------------------------
# Where a remedy can be


def settle(owner: Any, name: str, remedy: nn.Module) -> None:
    """Let a module own a remedy: `owner.remedies.NAME`. The owner's own parameters keep their names.

    Raises:
        UserError: it has this remedy.
    """
    if not hasattr(owner, "remedies"):
        owner.remedies = nn.ModuleDict()
    if name in owner.remedies:
        raise UserError(f"the model has the remedy {name} already, at {type(owner).__name__}: give it once")
    owner.remedies[name] = remedy


def hooks_before(module: nn.Module) -> list[Any]:
    """What is called with a module's input before the module."""
    return list(module._forward_pre_hooks.values())


def taps_of(layout: Layout, block: int, name: str) -> list[MapTap]:
    """Where a block's map can be changed.

    Raises:
        UserError: it has no map between tokens.
    """
    attention, *_ = layout.attentions(block)
    kind = type(attention).__name__
    if hasattr(attention, "lambda_init"):
        refuse(layout, block, name, f"{kind} has two maps, whose difference it takes")
    if hasattr(attention, "unfold"):
        refuse(layout, block, name, f"{kind} makes its map without queries and keys")
    try:
        taps = layout.map_taps(block)
    except UserError:
        refuse(layout, block, name, f"{kind} passes its map to no module, so it cannot be changed there")
    if any(tap.between == "channels" for tap in taps):
        refuse(layout, block, name, f"the map of {kind} is between channels, not tokens")
    return taps


def heads_of(attention: Any) -> int:
    """H of an attention module."""
    return int(attention.num_heads if hasattr(attention, "num_heads") else attention.heads)


def per_head(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter [H] beside x [..., H, n, d], in x's precision, so that autocast's stays.  [H, 1, 1]"""
    return parameter.to(x.dtype)[:, None, None]


def refuse(layout: Layout, block: int, name: str, why: str) -> Any:
    """Raise a UserError: a remedy is not defined at a block.

    Args:
        why: a sentence that begins with what stands in the way.
    """
    raise UserError(
        f"--remedy {name} is not defined at block {block} of {layout.name}: {why}. Choose other blocks "
        f"({name}@LAYERS), another remedy or another --model"
    )
