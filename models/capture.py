"""The wrapper that owns the hooks, and lets a forward pass show what the regularizers want to see.

Legend: B images, P patches, T prefix tokens, N = P + T tokens, D width, H heads, L blocks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errors import BAD_ARGUMENT, UserError, reason
from layers import EMBED
from models.adapters import MapTap
from models.attentions import Attentions, Blocks
from models.captured import NOTHING, Captured, Needs, PatchLoss
from models.checks import check_captured
from models.heads import Linear, OwnHead, PatchHead, in_mode
from models.layout import INPUT, Layout, find_layout
from models.shortcuts import Sizes, forming_maps, try_products


class DiverseViT(nn.Module):
    """An unmodified timm model with hooks on exactly what is needed; without needs, any timm model as it is.

    Hooks are registered once, here, before compile, DDP, sharding and the EMA's copy. They store nothing unless a
    forward pass that asks for it is under way, so no tensor outlives its step and gradient checkpointing's
    recomputation stores nothing. Blocks whose map is wanted leave the fused attention kernel, which never
    materialises it: for good where training wants it, for that pass alone where only a measurement does.
    `find_shortcuts` lets blocks do without the map where inner products of heads are all that is wanted.

    Args:
        backbone: a timm model.
        needs: what every training pass captures.
        measured: what other passes may ask for besides.
        head: classifies the patches (models/heads.py), where that is needed.
        patch_loss: of the patches' features, their linear classifier and the labels (regularizers/of_features.py);
            it takes the place of the patches' logits where `find_shortcuts` finds that the head is one.
    Raises:
        UserError: the backbone does not have what is needed.
    """

    backbone: Any  # an nn.Module; timm's parts of it have no common type

    def __init__(
        self,
        backbone: nn.Module,
        needs: Needs = NOTHING,
        measured: Needs = NOTHING,
        head: type[PatchHead] = OwnHead,
        patch_loss: Callable[[Linear, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.needs = needs
        hooked = needs | measured
        self.layout = find_layout(backbone) if hooked else None
        self._head: PatchHead | None = None
        self._patch_loss = patch_loss
        self._taps: dict[int, list[MapTap]] = {}
        self._handles: list[RemovableHandle] = []
        self._compared: frozenset[int] = frozenset()  # blocks whose heads' maps are multiplied
        self._attentions = Attentions({})  # those of them that do without the map
        self._sizes: dict[int, Sizes] = {}  # of their maps
        self._fused: list[tuple[Any, bool]] = []  # attentions that left the fused kernel, and whether they had it
        self._wanted = NOTHING
        self._sink: dict[tuple[str, int, int], Tensor] = {}
        if self.layout:
            for block, matrix in sorted(hooked.weights):
                self.layout.weights(block, [matrix])  # raises now, not in the first step
            self._head = head(self.layout) if hooked.patch_logits else None
            self._install_hooks(self.layout, hooked)

    def weights(
        self, block: int, matrices: Sequence[str], whole: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """A block's weight matrices of some kinds ('q', 'k', 'v', 'proj', 'fc1', 'fc2') as views.

        Args:
            whole: makes a whole tensor of a parameter that is kept in shards.
        Returns: tensors [m, n, d] of matrices that follow each other.
        """
        assert self.layout is not None
        return self.layout.weights(block, matrices, whole)

    # ------------------------------------------------------------------------------------------------------
    # Hooks

    def _install_hooks(self, layout: Layout, hooked: Needs) -> None:
        self._taps = {index: layout.map_taps(index) for index in sorted(hooked.attending)}  # raises before any hook
        for index in sorted(hooked.tokens - {layout.depth}):  # the final features are what forward_features returns
            if index == EMBED:
                handle = layout.embedding.register_forward_hook(self._after_embedding)
            elif index == INPUT:
                handle = layout.blocks[0].register_forward_pre_hook(self._before_blocks)
            else:
                handle = layout.blocks[index].register_forward_hook(partial(self._after_block, index))
            self._handles.append(handle)
        for index, taps in self._taps.items():
            for number, tap in enumerate(taps):
                at_map = partial(self._at_map, index, number)
                self._handles.append(tap.hooked.register_forward_pre_hook(at_map))
        self._compared = frozenset(block for blocks in hooked.heads for block in blocks)
        self._leave_fused()

    def _leave_fused(self) -> None:
        """Let the blocks whose map every training pass wants leave the fused kernel, and no others."""
        self._return_fused()
        for index in self._trained.attention:
            for tap in self._taps[index]:
                self._fused.append((tap.attention, getattr(tap.attention, "fused_attn", False)))
                tap.attention.fused_attn = False

    def _return_fused(self) -> None:
        for attention, was in self._fused:
            attention.fused_attn = was
        self._fused = []

    @property
    def _trained(self) -> Needs:
        """What every training pass captures: maps where there are no inner products."""
        return self.needs.without(self._attentions.serve)

    @property
    def mapped(self) -> list[int]:
        """The blocks whose attention map every training pass forms."""
        return sorted(self._trained.attention)

    def _can_serve(self, blocks: Blocks) -> bool:
        """Whether inner products of these blocks can be had now: training may have them out of the fused kernel."""
        return self._attentions.serve(blocks) and self._trained.attention.isdisjoint(blocks)

    def find_shortcuts(self, image_shape: tuple[int, int, int]) -> None:
        """From now on, do without attention maps and the patches' logits wherever that is possible.

        Inner products are taken from queries and keys in blocks whose attentions call scaled_dot_product_attention
        once each, if they are those of the map. The patches' loss is taken from features if a linear layer comes
        last in the head. Both are tried on a random image. Call it before anything is compiled or copied.

        Args:
            image_shape: C, H and W of the images.
        """
        parameter = next(self.parameters())
        if parameter.device.type in ("meta", "mps"):  # no numbers to try; no float64, which mgd takes
            return
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, *image_shape, generator=generator).to(parameter)
        self._use_maps()
        with torch.no_grad(), in_mode(self, training=False):
            if self._compared:
                self._find_products(image)
            if self._head is not None and self._patch_loss is not None and self.needs.patch_logits:
                self._head.find_linear(self.backbone.forward_features(image))

    @property
    def alike(self) -> list[Blocks]:
        """The blocks of whose heads something is wanted, those with maps of one size together.

        Empty before `find_shortcuts`, which looks.
        """
        groups: dict[Sizes, list[int]] = {}
        for block, sizes in self._sizes.items():
            groups.setdefault(sizes, []).append(block)
        return [tuple(blocks) for blocks in groups.values()]

    def _find_products(self, image: Tensor) -> None:
        self._return_fused()
        taps = {block: self._taps[block] for block in sorted(self._compared)}
        self._attentions, self._sizes = try_products(self.backbone, taps, image)
        self._leave_fused()

    def _use_maps(self) -> None:
        """From now on, form every map of which something is wanted."""
        self._attentions.keep({})
        self._leave_fused()

    def avoid_shortcuts(self, of_heads: bool = True, of_patches: bool = True) -> None:
        """From now on, form every map and all patches' logits of which something is wanted, as before
        `find_shortcuts`."""
        if of_heads:
            self._use_maps()
        if of_patches:
            self._patch_loss = None

    def unhook(self) -> None:
        """Leave the backbone as it was before."""
        for handle in self._handles:
            handle.remove()
        self._attentions.keep({})
        self._return_fused()
        self._handles = []

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if EMBED not in self._wanted.tokens:
            return None
        assert self.layout is not None
        self._sink["tokens", EMBED, 0], instead = self.layout.expose_tokens(0, output)
        return instead

    def _before_blocks(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if INPUT not in self._wanted.tokens:
            return None
        assert self.layout is not None
        self._sink["tokens", INPUT, 0], instead = self.layout.expose_tokens(0, args)
        return instead

    def _after_block(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if index not in self._wanted.tokens:
            return None
        assert self.layout is not None
        self._sink["tokens", index, 0], instead = self.layout.expose_tokens(index, output)
        return instead

    def _at_map(self, index: int, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if index in self._wanted.attention:
            self._sink["attention", index, number] = self._taps[index][number].heads_first(args[0])

    @contextmanager
    def _watching(self, needs: Needs) -> Iterator[None]:
        """Let the hooks store what is needed, and forget it afterwards."""
        heads = self._attentions.watching(sorted(needs.heads), needs.wide) if needs.heads else nullcontext()
        mapped = needs.attention - self._trained.attention
        self._wanted = needs
        try:
            with forming_maps(tap.attention for block in mapped for tap in self._taps[block]), heads:
                yield
        finally:
            self.forget()

    def _caught(self, kind: str, index: int) -> Tensor:
        """What the hooks stored at a layer; attentions side by side have their heads one after the other."""
        places = len(self._taps[index]) if kind == "attention" else 1
        parts = [self._sink.get((kind, index, number)) for number in range(places)]
        found = [part for part in parts if part is not None]
        self._check_arrival(kind, index, found, places)
        return found[0] if places == 1 else torch.cat(found, dim=-3)

    def _check_arrival(self, kind: str, index: int, found: Sequence[Tensor], places: int) -> None:
        assert self.layout is not None
        where = f"the {kind} of {self.layout.name} at layer {self.layout.layer_name(index)}"
        if len(found) < places:
            raise UserError(f"{where} never arrived: the hook there did not fire, so no term can use it")
        if torch.is_grad_enabled() and not all(part.requires_grad for part in found):
            raise UserError(
                f"{where} arrived without gradient, so its terms would train nothing: unfreeze the layers before "
                "it, and use gradient checkpointing only with use_reentrant=False (timm's default)"
            )

    def _products(self, needs: Needs) -> dict[Blocks, Tensor]:
        """The inner products that were found while the model ran."""
        found = {}
        for blocks in sorted(needs.heads):
            parts = [self._attentions.found[blocks]] if blocks in self._attentions.found else []
            self._check_arrival("attention", blocks[-1], parts, 1)
            found[blocks] = parts[0]
        return found

    # ------------------------------------------------------------------------------------------------------
    # Forward

    def forward(self, images: Tensor, needs: Needs | None = None, labels: Any = None) -> Captured:
        """Classify images, and show what is needed.

        Args:
            images: [B, C, H, W].
            needs: what to capture; None is what training captures, `Needs()` nothing but the logits.
            labels: of the images, for the patches' head.
        Raises:
            UserError: something needed did not arrive, or arrived without gradient while gradients are on.
        """
        needs = self._trained if needs is None else needs.without(self._can_serve)
        if not needs:
            return Captured(*_split(self.backbone(images)), None, {}, {}, {})
        assert self.layout is not None
        final = self.layout.depth in needs.tokens
        with self._watching(needs):
            if not (needs.patch_logits or final):
                return self._captured(self.backbone(images), None, needs)
            features = self.backbone.forward_features(images)  # [B, N, D]
            outputs, patch_logits, patch_loss = self.backbone.forward_head(features), None, None
            if needs.patch_logits:
                assert self._head is not None
                of_features = self._patch_loss if labels is not None else None
                linear = self._head.linear(features) if of_features is not None else None
                if linear is not None and of_features is not None:
                    patch_loss = PatchLoss(of_features(linear, labels), linear.features.shape[1])
                else:
                    patch_logits = self._head(features, labels)
            if final:
                self._sink["tokens", self.layout.depth, 0] = self.layout.final_tokens(features)
            return self._captured(outputs, patch_logits, needs)._replace(patch_loss=patch_loss)

    @property
    def predicts_jointly(self) -> bool:
        """Whether the patches' head classifies whole images too, so that both heads can predict together."""
        return self._head is not None and self._head.joint

    def _captured(self, outputs: Any, patch_logits: Tensor | None, needs: Needs) -> Captured:
        """What the hooks stored, with what the model returned."""
        assert self.layout is not None
        tokens = {index: self._caught("tokens", index) for index in sorted(needs.tokens)}
        attention = {index: self._caught("attention", index) for index in sorted(needs.attention)}
        prefix_tokens = {index: self.layout.prefix_tokens(index) for index in tokens}
        products = self._products(needs)
        return Captured(*_split(outputs), patch_logits, tokens, attention, prefix_tokens, products)

    def around(self, call: Callable[[Tensor], Any], images: Tensor, needs: Needs) -> Captured:
        """What the backbone shows while something around it is called, e.g. a model with a head of its own.

        Args:
            call: makes logits of images; it calls the backbone.
            needs: what to capture; patch logits and final features are not among it.
        """
        needs = needs.without(self._can_serve)
        with self._watching(needs):
            return self._captured(call(images), None, needs)

    def watch(self) -> None:
        """Let the hooks store what training needs while others call the backbone, until `take`."""
        self._wanted = self._trained

    def take(self, outputs: Any) -> Captured:
        """What the hooks stored since `watch`; they forget it.

        Args:
            outputs: what the backbone returned, or the model around it.
        Raises:
            UserError: something needed did not arrive, or arrived without gradient while gradients are on.
        """
        try:
            return self._captured(outputs, None, self._trained)
        finally:
            self.forget()

    def forget(self) -> None:
        """Store nothing, and keep nothing."""
        self._wanted, self._sink = NOTHING, {}

    @torch.no_grad()
    def tried(self, images: Tensor, needs: Needs) -> Captured:
        """What some images show in evaluation mode; each module is then in the mode that it was in."""
        with in_mode(self, training=False):
            return self(images, needs=needs)

    def check(
        self, image_shape: tuple[int, int, int], num_classes: int, needs: Needs, shortcuts: bool = False
    ) -> Captured:
        """Try two blank images, so that what cannot work is refused before training.

        Args:
            image_shape: C, H and W of the images.
            num_classes: K, of the data.
            needs: what is to be captured.
            shortcuts: whether to `find_shortcuts` first.
        Returns: what they show, for `Diversity.check`.
        Raises:
            UserError: the model does not take such images or returns other logits, or what is captured is not
                what the terms take it for: a grid of P patches after T prefix tokens, softmax maps of all heads.
        """
        name = type(self.backbone).__name__
        if self.layout is not None and self.predicts_jointly:
            needs |= Needs(tokens=frozenset({self.layout.depth}))  # to count what the regions are made of
        blank = torch.zeros(2, *image_shape, device=next(self.parameters()).device)
        try:
            if shortcuts:
                self.find_shortcuts(image_shape)
            captured = self.tried(blank, needs)
        except BAD_ARGUMENT as error:
            raise UserError(
                f"{name} cannot take images of {' x '.join(map(str, image_shape))} pixels: {reason(error)}. "
                "Check --input-size, --in-chans and --model-kwargs"
            ) from error
        if captured.logits.shape != (2, num_classes):
            raise UserError(
                f"{name} returns {list(captured.logits.shape[1:])} numbers an image, the data has {num_classes} "
                "classes: leave num_classes and the head out of --model-kwargs"
            )
        if self.layout is not None:
            check_captured(captured, self.layout, image_shape[1:], self.predicts_jointly)
        return captured


def _split(outputs: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(logits, None), or the distilled pair (logits, dist_logits)."""
    return outputs if isinstance(outputs, tuple) else (outputs, None)
