"""A model that is being measured: hooks on all that it shows, and the reasons for what it does not show."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from elsewhere import timm_model_in
from errors import BAD_ARGUMENT, UserError, reason
from models import Captured, DiverseViT, Layout, Needs, find_layout
from models.checks import check_captured
from models.heads import OwnHead
from models.layout import INPUT
from redundancy.metrics.shown import Place, Shown, grid_of
from regularizers.primitives import full_precision

OF_MODELS = ("tokens", "attention", "patch logits")  # what a forward pass may show besides logits


class Heads(NamedTuple):
    """What is wanted of attention where inner products of heads are enough.

    Attributes:
        across: also those between blocks with maps of one size.
        wide: added up in float64.
    """

    across: bool
    wide: bool = False


def shown_by(
    captured: Captured,
    layout: Layout | None,
    size: tuple[int, int],
    features: Tensor | None = None,
    labels: Tensor | None = None,
) -> Shown:
    """What a forward pass captured, in the form that metrics take it, in at least float32.

    Args:
        layout: of the model; None if nothing but logits was captured.
        size: height and width of the images in pixels.
        features, labels: see `Shown`.
    """
    batch = len(captured.logits)
    patches = {
        layer: full_precision(tokens[:, captured.prefix_tokens[layer] :])
        for layer, tokens in captured.tokens.items()
    }
    maps = {
        block: full_precision(attention).reshape(batch, -1, *attention.shape[-3:])
        for block, attention in captured.attention.items()
    }
    size = covered(layout, size)
    proportions = _proportions(layout, size)
    grids = {layer: grid_of(x.shape[1], proportions) for layer, x in patches.items()}
    places = {block: _place_of(layout, block, grids.get(block), size) for block in maps if layout is not None}
    heads = {
        blocks: full_precision(products).reshape(batch, -1, *products.shape[-2:])
        for blocks, products in captured.products.items()
    }
    logits = full_precision(captured.logits)
    patch_logits = None if captured.patch_logits is None else full_precision(captured.patch_logits)
    return Shown(size, patches, maps, places, logits, features, patch_logits, labels, grids, heads)


def covered(layout: Layout | None, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of what whole patches cover of images of this size, as they are first embedded."""
    embedding = layout.part("patch_embed") if layout is not None else None
    convolution = getattr(embedding, "proj", None)
    if not isinstance(convolution, nn.Conv2d) or convolution.stride != convolution.kernel_size:
        return size  # patches overlap, or the model does not say
    if getattr(embedding, "dynamic_img_pad", False):
        return size  # it fills the rest up
    height, width = (side // step * step for side, step in zip(size, convolution.stride, strict=True))
    return height or size[0], width or size[1]


def _proportions(layout: Layout | None, size: tuple[int, int]) -> tuple[float, float]:
    """Height and width of the images in patches, which need not be square."""
    if layout is None:
        return size
    try:
        height, width = layout.patch_size
    except UserError:  # the model does not say
        return size
    return size[0] / height, size[1] / width


def _place_of(layout: Layout, block: int, grid: tuple[int, int] | None, size: tuple[int, int]) -> Place:
    """Where the tokens of a block's maps lie; channels lie nowhere."""
    taps = layout.map_taps(block)
    between_tokens = all(tap.between == "tokens" for tap in taps)
    window = getattr(taps[0].attention, "window_size", None)  # of the Swins
    return Place(
        layout.prefix_tokens(block),
        size,
        grid if between_tokens else None,
        tuple(window) if isinstance(window, (tuple, list)) else None,
    )


class Watched:
    """A timm model, or any other, in evaluation mode, with hooks that go when it is left (`with Watched(...)`).

    Args:
        model: a timm model, or one around it: a DiverseViT, DDP, a compiled one, or one with a head of its own.
        wanted: what metrics need, of `registry.Needs`.
        besides: what else may be looked at (`look(..., everything=True)`).
        heads: the inner products that take the place of attention maps; None if the maps are wanted.
        images: [B, C, H, W], a few to try it with.
    Attributes:
        layout: the model's layout; None if it is no vision transformer that is known.
        lacks: of what it does not show, the reason.
    Raises:
        UserError: it does not take such images.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Collection[str],
        images: Tensor,
        besides: Collection[str] = (),
        heads: Heads | None = None,
    ) -> None:
        self.backbone: Any = timm_model_in(model)
        self._outer: Any = _unwrapped(model)
        self.size = (images.shape[2], images.shape[3])
        self.layout: Layout | None = None
        self.lacks: dict[str, str] = {}
        self._features: Tensor | None = None
        with ExitStack() as undo:  # also if it does not take such images
            undo.callback(_restore, [(module, module.training) for module in self._outer.modules()])
            undo.enter_context(_eager(self._outer))
            self._outer.eval()
            self._watch_features(undo)
            possible = self._possible({*wanted, *besides}, heads)
            every = Needs()
            for needs in possible.values():
                every = every | needs
            self.model = DiverseViT(self.backbone, measured=every)
            undo.callback(self.model.unhook)
            self._try(images, Needs())
            if heads is not None and "attention" in possible:
                possible["attention"] = self._without_maps(images, possible["attention"], heads)
            shown = self._shown_of(images, possible)
            self.needs, self._everything = Needs(), Needs()
            for name, needs in shown.items():
                self._everything |= needs
                self.needs |= needs if name in wanted else Needs()
            self._undo = undo.pop_all()

    def _shown_of(self, images: Tensor, possible: Mapping[str, Needs]) -> dict[str, Needs]:
        """What the images show of the possible."""
        shown: dict[str, Needs] = {}
        for name, needs in possible.items():
            try:
                captured = self._try(images, needs)
                assert self.layout is not None
                check_captured(captured, self.layout, self.size)
            except UserError as error:
                self.lacks[name] = without_advice(error)
            else:
                shown[name] = needs
        return shown

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was before."""
        self._undo.close()

    def _without_maps(self, images: Tensor, needs: Needs, heads: Heads) -> Needs:
        """The same, with inner products between blocks whose maps have one size, if these are wanted."""
        channels, height, width = images.shape[1:]
        self.model.find_shortcuts((channels, height, width))
        return replace(needs, heads=frozenset(self.model.alike) or needs.heads) if heads.across else needs

    def _possible(self, wanted: Collection[str], heads: Heads | None) -> dict[str, Needs]:
        """What of the wanted the model's parts promise to show; of attention maps, or inner products of heads."""
        try:
            self.layout = find_layout(self.backbone)
        except UserError as error:
            self.lacks |= dict.fromkeys((*OF_MODELS, "weights"), without_advice(error))
            return {}
        depth, found = self.layout.depth, {}
        if "tokens" in wanted:
            found["tokens"] = Needs(tokens=frozenset(range(INPUT, depth)))
        if "attention" in wanted:
            blocks = frozenset(block for block in range(depth) if self._has_map(block))
            if blocks:
                self.lacks.pop("attention", None)
                each = frozenset((block,) for block in blocks)
                found["attention"] = (
                    Needs(attention=blocks) if heads is None else Needs(heads=each, wide=heads.wide)
                )
        if self._outer is not self.backbone:
            self.lacks["patch logits"] = f"{type(self._outer).__name__} has a head of its own around the timm model"
        elif "patch logits" in wanted:
            try:
                OwnHead(self.layout)
                found["patch logits"] = Needs(patch_logits=True)
            except UserError as error:
                self.lacks["patch logits"] = without_advice(error)
        return found

    def _has_map(self, block: int) -> bool:
        assert self.layout is not None
        try:
            self.layout.map_taps(block)
        except UserError as error:
            self.lacks["attention"] = without_advice(error)
            return False
        return True

    def _watch_features(self, undo: ExitStack) -> None:
        """Note what the classifier reads, until it is undone."""
        find = getattr(self.backbone, "get_classifier", None)
        classifier = find() if find is not None else None
        if isinstance(classifier, nn.Identity) and self._outer is self.backbone:
            self.lacks["classes"] = "the model has no classifier"
        classifier = classifier[0] if isinstance(classifier, tuple) else classifier  # of a distilled student
        if isinstance(classifier, nn.Module):
            undo.callback(classifier.register_forward_pre_hook(self._before_classifier).remove)

    def _before_classifier(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._features is None and args:  # later ones are those of single patches
            self._features = args[0].detach()

    def _try(self, images: Tensor, needs: Needs) -> Captured:
        try:
            captured = self._call(images, needs)
        except BAD_ARGUMENT as error:
            shape = " x ".join(map(str, images.shape[1:]))
            name = type(self._outer).__name__
            raise UserError(f"{name} cannot take images of {shape} pixels: {reason(error)}") from error
        if not isinstance(captured.logits, Tensor) or captured.logits.ndim != 2:
            returned = list(captured.logits.shape) if isinstance(captured.logits, Tensor) else type(captured.logits)
            raise UserError(
                f"{type(self._outer).__name__} returns {returned} for {len(images)} images, not logits [B, K]: "
                "measure a classifier, or one whose head is nn.Identity()"
            )
        if self._features is None or self._features.ndim != 2:
            self.lacks["features"] = "the model has no classifier that reads one vector an image"
        return captured

    @torch.no_grad()
    def _call(self, images: Tensor, needs: Needs) -> Captured:
        self._features = None
        if self._outer is self.backbone:
            return self.model(images, needs=needs)
        return self.model.around(lambda images: _logits(self._outer(images)), images, needs)

    def look(self, images: Tensor, labels: Tensor | None, everything: bool = False) -> Shown:
        """What a batch of images [B, C, H, W] shows of what is wanted, or of everything."""
        captured = self._call(images, self._everything if everything else self.needs)
        return shown_by(captured, self.layout, self.size, self._features, labels)


def without_advice(error: UserError) -> str:
    """Why something cannot be seen, without what to do about it while training."""
    what, _, _ = str(error).rpartition("; ")
    return what or str(error)


def _unwrapped(model: Any) -> Any:
    """The model without what changes nothing of what it computes: DDP, torch.compile, a DiverseViT."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, DiverseViT):
            model = model.backbone
        else:
            return model


def _logits(output: Any) -> Any:
    """Of a model's output; those of transformers have them as an attribute."""
    return getattr(output, "logits", output)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Without what `module.compile()` made, which would not see new hooks."""
    compiled = [
        (part, part._compiled_call_impl) for part in model.modules() if part._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def _restore(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put modules into the mode that they were in."""
    for module, mode in modes:
        module.training = mode
