"""Diversity terms in a training loop of others (torch.hub's entry point `diversity`).

The model stays what it is: its class, its methods, its parameters' names, its state dict. Hooks on it let each call
return the terms beside its own output, so that whatever wraps the model later (DDP, torch.compile, an EMA's copy)
sees them come out of a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from errors import BAD_ARGUMENT, UserError, reason, shown
from models.capture import DiverseViT
from models.captured import Needs
from models.checks import check_captured
from models.layout import find_layout
from regularizers.diversity import Diversity, total
from regularizers.specs import parse_spec


class Diverse(NamedTuple):
    """What a call of the model returns.

    Attributes:
        output: what the model itself returns, e.g. the logits.
        diversity: sum of coefficient * term, to be added to the loss; 0 while gradients are off.
        terms: the value of each term by its name, without coefficient and gradient; empty while gradients are off.
    """

    output: Any
    diversity: Tensor
    terms: dict[str, Tensor]


def attach(model: nn.Module, specs: Sequence[str], img_size: int | Sequence[int] | None = None) -> nn.Module:
    """Let a model return diversity terms beside its output, from now on.

    Args:
        model: a timm model, or one with a timm model inside, e.g. that of transformers. It is changed in place.
        specs: the terms, in the language of `--reg`.
        img_size: of the images, in pixels, or their height and width; by default the model's own.
    Returns: the same model. Its new attribute `diversity` can `remove()` the terms.
    Raises:
        UserError: a term that is malformed, that this model cannot show, or that needs what only our loop has.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"diversity takes a model first, then its terms: {shown(repr(model))} is no torch.nn.Module"
        )
    if isinstance(model, (DistributedDataParallel, DataParallel)) or hasattr(model, "_orig_mod"):  # of compile
        raise UserError(
            f"give diversity the model before {type(model).__name__} wraps it, and wrap what it returns"
        )
    if any(isinstance(getattr(part, "diversity", None), Attached) for part in model.modules()):
        raise UserError(
            "this model has diversity terms already: give all of them in one call, or call model.diversity.remove()"
        )
    backbone = timm_model_in(model)
    layout = find_layout(backbone)
    diversity = Diversity([parse_spec(spec) for spec in specs], layout.depth, patches_reach_label=True)
    for term in diversity.terms:
        if term.takes in ("labels", "gradient"):
            what = "patch labels of the mixed images" if term.takes == "labels" else "gradient of the label loss"
            raise UserError(
                f"{term.spec.name} takes the {what}, which only this project's own loop has: leave it out, or "
                "train with main.py"
            )
    needs = Needs(**diversity.needs)
    if layout.depth in needs.tokens:
        raise UserError(
            "the layer norm is what forward_features returns, which a call of the model does not show: choose "
            "last, the output of the last block, or train with main.py"
        )
    student = DiverseViT(backbone, needs)
    try:
        _try_blank_images(student, diversity, img_size)
    except UserError:
        student.unhook()
        raise
    model.diversity = Attached(model, student, diversity)  # type: ignore[assignment]
    return model


class Attached:
    """Diversity terms on a model; use `attach`.

    Args:
        model: what is called with images.
        student: the timm model in it, with hooks on what the terms need.
        diversity: the terms.
    """

    def __init__(self, model: nn.Module, student: DiverseViT, diversity: Diversity) -> None:
        self._model, self._student, self._diversity = model, student, diversity
        self._hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def names(self) -> list[str]:
        """The names of the terms."""
        return self._diversity.names

    def remove(self) -> None:
        """Make the model return its own output again."""
        for hook in self._hooks:
            hook.remove()
        self._student.unhook()
        del self._model.diversity

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is not self._model:
            raise UserError(
                "nn.DataParallel runs copies of the model, which diversity terms do not see: use one process per "
                "GPU (torchrun, DistributedDataParallel)"
            )
        if torch.is_grad_enabled():
            self._student.watch()

    @torch.compiler.disable  # the forward pass between the two is compiled
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Diverse | None:
        if output is None:  # the forward pass raised
            self._student.forget()
            return None
        parameter = next(self._model.parameters())
        if not (torch.is_grad_enabled() and self._diversity.terms):
            return Diverse(output, torch.zeros((), device=parameter.device), {})
        captured = self._student.take(output)
        with torch.autocast(parameter.device.type, enabled=False):
            terms = self._diversity(captured, self._student.weights)
            return Diverse(output, total(terms), {name: term.value.detach() for name, term in terms.items()})


def timm_model_in(model: nn.Module) -> nn.Module:
    """The timm model that a model is, or has inside."""
    found: list[nn.Module] = []
    for module in model.modules():
        inside = any(part is module for one in found for part in one.modules())
        if hasattr(module, "forward_features") and not inside:
            found.append(module)
    if len(found) > 1:
        raise UserError(f"{type(model).__name__} has {len(found)} timm models inside: give one of them")
    return found[0] if found else model


def _try_blank_images(student: DiverseViT, diversity: Diversity, img_size: int | Sequence[int] | None) -> None:
    """Refuse terms that cannot be computed from what the model shows of blank images."""
    backbone, parameter = student.backbone, next(student.parameters())
    height, width = size = _sides(img_size) if img_size is not None else _image_size(backbone)
    channels = next((part.in_channels for part in backbone.modules() if isinstance(part, nn.Conv2d)), 3)
    blank = torch.zeros(2, channels, *size, device=parameter.device, dtype=parameter.dtype)
    try:
        captured = student.tried(blank, student.needs)
    except BAD_ARGUMENT as error:
        raise UserError(
            f"{type(backbone).__name__} cannot take images of {channels} x {height} x {width} pixels: "
            f"{reason(error)}. Give diversity the size of your images, img_size=..."
        ) from error
    if student.layout is not None:
        check_captured(captured, student.layout, size)
    diversity.check(captured)


def _image_size(backbone: Any) -> tuple[int, int]:
    """Height and width of the images that a timm model is made for."""
    own = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if own is None:
        own = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]
    return _sides(own)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
