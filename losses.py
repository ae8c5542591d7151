"""The objective: what the labels and a teacher ask of a prediction, and the diversity terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from errors import UserError
from models.captured import Needs
from regularizers.diversity import Diversity, Term, total
from regularizers.primitives import full_precision

if TYPE_CHECKING:
    from mixing import Labels
    from models.captured import Captured, Weights


def cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of the images, as DeiT chooses it.

    Soft targets while images are mixed, else label smoothing if there is any, else plain; in at least float32. With
    a floor f, soft targets t give -1/B sum_bk t_bk log(f + q_bk), where q is the softmax.

    Args: logits [B, K].  Returns: scalar, mean over images.
    """
    logits = full_precision(logits)
    if labels.mixed:
        targets = labels.dense(logits.shape[1], logits.dtype)
        if labels.floor > 0:
            return -(targets * (logits.softmax(dim=1) + labels.floor).log()).sum(dim=1).mean()
        return SoftTargetCrossEntropy()(logits, targets)
    if labels.smoothing > 0:
        return LabelSmoothingCrossEntropy(labels.smoothing)(logits, labels.own)
    return F.cross_entropy(logits, labels.own)


def binary_cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    r"""Binary cross-entropy of every class: each class of a mixed image is its own, whatever its share.

        -1/(B K) sum_bk [t_bk log s(z_bk) + (1 - t_bk) log(1 - s(z_bk))],   t_bk = 1 if y_bk > 0 else 0

    s is the logistic function. Labels must not be smoothed, or every t were 1.

    Args: logits z [B, K].  Returns: scalar, mean over images and classes.
    Source: Touvron et al., DeiT III, 2022, `--bce-loss` of its code.
    """
    logits = full_precision(logits)
    targets = labels.dense(logits.shape[1], logits.dtype).gt(0).to(logits.dtype)  # [B, K]
    return F.binary_cross_entropy_with_logits(logits, targets)


def soft_binary_cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """Binary cross-entropy of every class against its share of the label.  [B, K] -> scalar"""
    logits = full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.dense(logits.shape[1], logits.dtype))


def mutual(logits: Tensor) -> Tensor:
    r"""How far two submodels' predictions of the same images are from each other's.

        1/2 [BCE(z_1, s(z_2)) + BCE(z_2, s(z_1))]

    No gradient flows through the targets s(z).

    Args: logits [2 B, K], those of the first submodel before those of the second.  Returns: scalar.
    Source: Touvron et al., Co-training 2^L Submodels for Visual Recognition, 2023, `--cosub` of its code.
    """
    logits = full_precision(logits)
    others = logits.detach().roll(len(logits) // 2, dims=0).sigmoid()  # [2 B, K]
    return F.binary_cross_entropy_with_logits(logits, others)


def distillation(student: Tensor, teacher: Tensor, kind: Literal["soft", "hard"], tau: float) -> Tensor:
    r"""Distance of the distillation token's prediction from the teacher's.

        soft:  tau^2 / (B K) sum_bk p_bk (log p_bk - log q_bk),   p = softmax(teacher / tau), q of the student
        hard:  cross-entropy against the teacher's most probable class

    The soft form is divided by B K, as DeiT's code does, not by B.

    Args: student, teacher [B, K].  Returns: scalar.
    Source: Touvron et al., DeiT, 2021, and its code.
    """
    student, teacher = full_precision(student), full_precision(teacher)
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    log_q = F.log_softmax(student / tau, dim=1)
    log_p = F.log_softmax(teacher / tau, dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * tau**2 / student.numel()


class Teacher(nn.Module):
    r"""A teacher that takes its images otherwise than the student: in another size, or normalised otherwise.

        x' = (r(x) std + mean - mean') / std',   r: bicubic, with antialiasing

    Args:
        backbone: a model [B, C, H', W'] -> [B, K].
        size: H' and W', in pixels.
        colours: (mean, std) of the student's images, then (mean', std') of the teacher's.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, backbone: nn.Module, size: tuple[int, int], colours: Sequence[tuple[Sequence[float], Sequence[float]]]
    ) -> None:
        super().__init__()
        self.backbone, self.size = backbone, size
        (mean, std), (own_mean, own_std) = torch.tensor(colours, dtype=torch.float64)[..., None, None]  # [C, 1, 1]
        self.is_same = bool((mean == own_mean).all() and (std == own_std).all())
        self.register_buffer("scale", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The logits [B, K] of images as the student takes them, [B, C, H, W]."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        if not self.is_same:
            images = images * self.scale + self.shift
        logits: Tensor = self.backbone(images)
        return logits


class LabelLoss:
    r"""What the image's label, and a teacher, ask of a prediction, as named terms.

        L_label = (1 - a) CE + a L_distillation        or, with two submodels, 1/2 BCE + 1/2 L_mutual

    a = 0 without a teacher.

    Args:
        teacher: a model [B, C, H, W] -> [B, K] in evaluation mode, or None.
        distillation_type: 'none', 'soft' or 'hard'.
        alpha: a, the distillation loss's share.
        tau: temperature of soft distillation.
        binary: `binary_cross_entropy` in place of CE.
        cosub: train two submodels, which `mutual` compares; the batch holds each image twice.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        distillation_type: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
        binary: bool = False,
        cosub: bool = False,
    ) -> None:
        self.binary, self.cosub = binary, cosub
        self.teacher = teacher if distillation_type != "none" else None
        self.kind: Literal["soft", "hard"] = "hard" if distillation_type == "hard" else "soft"
        self.alpha = alpha if self.teacher is not None else 0.0
        self.tau = tau

    def __call__(self, captured: Captured, labels: Labels, teacher_logits: Tensor | None = None) -> dict[str, Term]:
        """The term 'ce', or 'bce', and that of a teacher, 'distillation', or of the submodels, 'mutual'."""
        if self.cosub:
            own = binary_cross_entropy if self.binary else soft_binary_cross_entropy
            return {
                "bce": Term(own(captured.logits, labels), 0.5),
                "mutual": Term(mutual(captured.logits), 0.5),
            }
        own = binary_cross_entropy if self.binary else cross_entropy
        terms = {"bce" if self.binary else "ce": Term(own(captured.logits, labels), 1 - self.alpha)}
        if teacher_logits is not None:
            assert captured.dist_logits is not None
            value = distillation(captured.dist_logits, teacher_logits, self.kind, self.tau)
            terms["distillation"] = Term(value, self.alpha)
        return terms


class Objective:
    r"""All that a step minimises, as named terms.

        L = (1 - a) (CE + sum_t c_t sum_i R_ti) / (1 + sum_t c_t n_t) + a L_distillation + sum_k c_k R_k

    t runs over the terms that take labels and whose n_t items are averaged with the image itself (patch.mixing, the
    reference's mixing loss at c = 1), k over all others. Without terms this is DeiT's loss. With --bce-loss BCE
    takes the place of CE; with --cosub a is 1/2, and L_mutual takes the place of L_distillation.

    Args:
        label_loss: cross-entropy and distillation.
        diversity: the regularizers.
    """

    def __init__(self, label_loss: LabelLoss | None = None, diversity: Diversity | None = None) -> None:
        self.label_loss = label_loss or LabelLoss()
        self.diversity = diversity or Diversity([], depth=0)
        self._label_terms: Callable[..., dict[str, Term]] = self._of_labels

    @property
    def submodels(self) -> int:
        """How often a batch holds each image, once for each submodel."""
        return 2 if self.label_loss.cosub else 1

    @property
    def needs(self) -> Needs:
        """What a forward pass has to capture."""
        return Needs(**self.diversity.needs)

    def compile(self, backend: str) -> None:
        """Compile in place, each as a graph: label terms, terms of a batch, terms of the weights, and the teacher.

        Raises:
            UserError: a term that differentiates twice.
        """
        if self.diversity.differentiates_twice:
            raise UserError(
                "patch.gradient_diversity differentiates twice, which compiled models cannot: drop --torchcompile"
            )
        self._label_terms = torch.compile(self._of_labels, backend=backend, fullgraph=True)
        self.diversity.compile(backend)
        if self.label_loss.teacher is not None:
            self.label_loss.teacher.compile(backend=backend)

    @torch.no_grad()
    def ask_teacher(self, images: Tensor) -> Tensor | None:
        """The teacher's logits [B, K], or None without a teacher. Call it under autocast."""
        teacher = self.label_loss.teacher
        return teacher(images) if teacher is not None else None

    def __call__(self, captured: Captured, labels: Labels, teacher_logits: Tensor | None = None) -> dict[str, Term]:
        """The terms of a batch, in at least float32: those of the labels, then patches and heads.

        The label terms are computed last. Autograd goes backwards, and frees the logits of all patches before the
        gradients of the other terms, which wait for their layers, are there.

        Raises:
            UserError: distillation with a student that has no distillation token.
        """
        if teacher_logits is not None and captured.dist_logits is None:
            raise UserError(
                "distillation needs a student with a distillation token: choose a distilled model, "
                "e.g. --model deit_small_distilled_patch16_224"
            )
        if self.diversity.differentiates_twice:
            terms = self._label_terms(captured, labels, teacher_logits)
            return terms | self.diversity.of_batch(captured, total(terms))
        others = self.diversity.of_batch(captured)
        return self._label_terms(captured, labels, teacher_logits) | others

    def of_weights(self, weights: Weights) -> dict[str, Term]:
        """The terms of the weights, which do not depend on a batch."""
        return self.diversity.of_weights(weights)

    def _of_labels(self, captured: Captured, labels: Labels, teacher_logits: Tensor | None) -> dict[str, Term]:
        (label_name, label), *distilled = self.label_loss(captured, labels, teacher_logits).items()
        others = self.diversity.of_labels(captured, labels)
        averaged = [name for name in others if name in self.diversity.averaged]
        norm = 1 + sum(others[name].coef for name in averaged)
        for name in averaged:
            others[name] = Term(others[name].value, label.coef * others[name].coef / norm)
        return {label_name: Term(label.value, label.coef / norm), **others, **dict(distilled)}
