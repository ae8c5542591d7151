"""Where a model calls scaled_dot_product_attention: the inner products of its heads' maps, without the maps.

One place serves all families that call it, whatever they do to queries and keys before (rotary embeddings, norms,
windows, reduced keys) and whatever mask or bias they pass. shortcuts.py tries which blocks do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from models.adapters import MapTap
from models.products import Attended, attend, inner_products

Blocks = tuple[int, ...]  # whose heads are compared: those of one block, or of two


class _Calls(TorchFunctionMode):
    """While it is active, calls of scaled_dot_product_attention go to `attentions`."""

    def __init__(self, attentions: Attentions) -> None:
        super().__init__()
        self._attentions = attentions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attentions.call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Attentions:
    """Hooks on attentions, and the inner products of their heads while a forward pass asks for them.

    Args:
        taps: block -> its attentions.
        recomputes: whether blocks are computed again in the backward pass. Their fused kernel then stays in place,
            since the second time nobody watches, and both times must do the same.
    Attributes:
        found: what a pass found: blocks -> G of `models.products`, [..., H, H] of one block, [..., 2 H, 2 H] of
            two.
    """

    def __init__(self, taps: Mapping[int, Sequence[MapTap]], recomputes: bool = False) -> None:
        self.found: dict[Blocks, Tensor] = {}
        self._recomputes = recomputes
        self._count = {block: len(each) for block, each in taps.items()}  # attentions side by side
        self._handles: dict[int, list[RemovableHandle]] = {}
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._wanted: tuple[Blocks, ...] = ()
        self._wide = False
        self._place: tuple[int, int] | None = None  # of the attention that is running: block, number
        self._calls: dict[tuple[int, int], Attended | None] = {}
        for block, each in taps.items():
            enter = [
                tap.attention.register_forward_pre_hook(partial(self._enter, (block, number)))
                for number, tap in enumerate(each)
            ]
            self._handles[block] = enter + [tap.attention.register_forward_hook(self._leave) for tap in each]

    def serve(self, blocks: Blocks) -> bool:
        """Whether inner products of these blocks' heads can be had: of all blocks, and their maps have one size."""
        sizes = {self._sizes.get(block) for block in blocks}
        return len(sizes) == 1 and None not in sizes

    def keep(self, sizes: Mapping[int, tuple[int, ...]]) -> None:
        """Serve these blocks, with these sizes of their maps; leave all others as they were before."""
        self._sizes = dict(sizes)
        for block in self._handles.keys() - sizes.keys():
            for handle in self._handles.pop(block):
                handle.remove()

    def _enter(self, place: tuple[int, int], module: nn.Module, args: tuple[Any, ...]) -> None:
        self._place = place if self._wanted else None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._place = None

    @contextmanager
    def watching(self, wanted: Sequence[Blocks], wide: bool = False) -> Iterator[None]:
        """Find the inner products of these blocks while the model runs.

        Args:
            wide: see `models.products.inner_products`.
        """
        self._wanted, self._wide = tuple(wanted), wide
        try:
            with _Calls(self):
                yield
        finally:
            self._wanted, self._place = (), None
            self._calls, self.found = {}, {}

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        """scaled_dot_product_attention, as torch.nn.functional has it."""
        place = self._place
        fused = partial(
            F.scaled_dot_product_attention,
            *(query, key, value),
            **{"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, **others},
        )
        if place is None or not any(place[0] in blocks for blocks in self._wanted):
            return fused()
        flat = query.ndim == 4 or attn_mask is None
        if place in self._calls or is_causal or others.get("enable_gqa") or query.ndim < 4 or not flat:
            self._calls[place] = None  # not what inner products know
            self.found.pop((place[0],), None)
            return fused()
        q, k, v, mask = (_narrowed(each) for each in (query, key, value, attn_mask))
        assert q is not None and k is not None and v is not None
        s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        call = Attended(q.flatten(0, -4), k.flatten(0, -4), s, mask)
        self._calls[place] = call
        alone = (place[0],)
        if alone in self._wanted and self._count[place[0]] == 1 and self._joins(query, dropout_p):
            attended, found = attend(call, v.flatten(0, -4), self._wide)
            self.found[alone] = found.view(*q.shape[:-3], *found.shape[1:])
            self._multiply(place[0], q.shape[:-3])
            return attended.view(*q.shape[:-1], v.shape[-1])
        with self._kept():
            self._multiply(place[0], q.shape[:-3])
        return fused()

    def _joins(self, query: Tensor, dropout_p: float) -> bool:
        """Whether the attention itself is computed from the tiles that its inner products take.

        On a CPU that is nearly free, since tiles are as fast as the fused kernel; elsewhere the kernel is faster.
        """
        return query.device.type == "cpu" and dropout_p == 0 and not self._recomputes

    def _kept(self) -> AbstractContextManager[object]:
        """What is saved now is kept as it is, also in a block that is otherwise computed again."""
        if torch.compiler.is_compiling() or not self._recomputes:
            return nullcontext()
        return saved_tensors_hooks(_itself, _itself)

    def _multiply(self, block: int, lead: Sequence[int]) -> None:
        """The inner products that have all they need now that this block was called."""
        for blocks in self._wanted:
            places = [(each, number) for each in blocks for number in range(self._count[each])]
            calls = [self._calls.get(place) for place in places]
            known = [call for call in calls if call is not None]
            if block in blocks and blocks not in self.found and len(known) == len(calls):
                found = inner_products(known, self._wide)
                self.found[blocks] = found.view(*lead, *found.shape[1:])


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _narrowed(tensor: Tensor | None) -> Tensor | None:
    """As autocast gives it to the attention; a mask of booleans stays one."""
    if tensor is None or not tensor.is_floating_point() or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
