"""The label loss: cross-entropy as DeiT chooses it, the per-patch mixing loss, and DeiT's distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from errors import UserError
from regularizers.diversity import Term
from regularizers.measures import full_precision
from regularizers.patch import mixing
from regularizers.specs import MIXING

if TYPE_CHECKING:
    from mixing.mixup import Labels
    from models.capture import Captured


def cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of the images, as DeiT chooses it.

    Soft targets while images are mixed, else label smoothing if there is any, else plain; in at least float32.

    Args: logits [B, K].  Returns: scalar, mean over images.
    """
    logits = full_precision(logits)
    if labels.mixed:
        return SoftTargetCrossEntropy()(logits, labels.dense(logits.shape[1], logits.dtype))
    if labels.smoothing > 0:
        return LabelSmoothingCrossEntropy(labels.smoothing)(logits, labels.own)
    return F.cross_entropy(logits, labels.own)


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


class LabelLoss:
    r"""What the labels (and a teacher) ask of a prediction, as named terms.

        L_label = (1 - a) (CE_cls + c sum_p CE_p) / (1 + c P) + a L_distillation

    c = 0 is plain cross-entropy, c = 1 the reference's mixing loss; a = 0 without a teacher.

    Args:
        mixing: c.
        teacher: a model [B, 3, S, S] -> [B, K] in evaluation mode, or None.
        distillation_type: 'none', 'soft' or 'hard'.
        alpha: a, the distillation loss's share.
        tau: temperature of soft distillation.
    """

    def __init__(
        self,
        mixing: float = 0.0,
        teacher: nn.Module | None = None,
        distillation_type: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        self.mixing = mixing
        self.teacher = teacher if distillation_type != "none" else None
        self.kind: Literal["soft", "hard"] = "hard" if distillation_type == "hard" else "soft"
        self.alpha = alpha if self.teacher is not None else 0.0
        self.tau = tau
        self._terms: Callable[..., dict[str, Term]] = self._compute

    def compile(self, backend: str) -> None:
        """Compile the terms, in one graph, and the teacher; in place."""
        self._terms = torch.compile(self._compute, backend=backend, fullgraph=True)
        if self.teacher is not None:
            self.teacher.compile(backend=backend)

    @torch.no_grad()
    def ask_teacher(self, images: Tensor) -> Tensor | None:
        """The teacher's logits [B, K], or None without a teacher. Call it under autocast."""
        return self.teacher(images) if self.teacher is not None else None

    def __call__(self, captured: Captured, labels: Labels, teacher_logits: Tensor | None = None) -> dict[str, Term]:
        """The terms 'ce', 'patch.mixing' (mean over patches) and 'distillation', those that are on.

        Raises:
            UserError: distillation with a student that has no distillation token.
        """
        if teacher_logits is not None and captured.dist_logits is None:
            raise UserError(
                "distillation needs a student with a distillation token: choose a distilled model, "
                "e.g. --model deit_small_distilled_patch16_224"
            )
        return self._terms(captured.logits, captured.patch_logits, captured.dist_logits, labels, teacher_logits)

    def _compute(
        self,
        logits: Tensor,
        patch_logits: Tensor | None,
        dist_logits: Tensor | None,
        labels: Labels,
        teacher_logits: Tensor | None,
    ) -> dict[str, Term]:
        share = 1 - self.alpha
        ce = cross_entropy(logits, labels)
        if self.mixing > 0:
            assert patch_logits is not None
            count = patch_logits.shape[1]  # P
            norm = 1 + self.mixing * count
            terms = {
                "ce": Term(ce, share / norm),
                MIXING: Term(mixing(patch_logits, labels), share * self.mixing * count / norm),
            }
        else:
            terms = {"ce": Term(ce, share)}
        if teacher_logits is not None:
            assert dist_logits is not None
            value = distillation(dist_logits, teacher_logits, self.kind, self.tau)
            terms["distillation"] = Term(value, self.alpha)
        return terms
