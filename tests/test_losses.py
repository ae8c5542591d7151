"""The label loss against timm's and torch's losses, dense labels, and DeiT's distillation formulas."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from errors import UserError
from losses import LabelLoss, Objective, cross_entropy, distillation
from losses import Teacher as OwnImages
from mixing.mixup import Labels, Mixup
from models import Captured
from regularizers import Diversity, parse_spec, primitives, total
from regularizers.measures import mixing

BATCH, PATCHES, CLASSES = 4, 6, 5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def make_labels(smoothing: float = 0.1, mixed: bool = True, patches: int = PATCHES, batch: int = BATCH) -> Labels:
    """Any weights: of images and patches alike, 0 and 1 among them."""
    generator = torch.Generator().manual_seed(9)
    own = torch.randint(CLASSES, (batch,), generator=generator)
    weight = torch.rand(batch, generator=generator, dtype=torch.float64)
    patch_weight = torch.rand(batch, patches, generator=generator, dtype=torch.float64)
    patch_weight[0, 0], patch_weight[-1, -1] = 0, 1
    if not mixed:
        weight, patch_weight = torch.ones_like(weight), torch.ones_like(patch_weight)
    return Labels(own, own.flip(0), weight, patch_weight, smoothing, mixed)


def captured(
    logits: Tensor | None = None, patch_logits: Tensor | None = None, dist_logits: Tensor | None = None
) -> Captured:
    return Captured(draw(BATCH, CLASSES) if logits is None else logits, dist_logits, patch_logits, {}, {}, {})


def dense_patch_losses(patch_logits: Tensor, labels: Labels) -> list[Tensor]:
    """CE_p of every patch, with dense labels [B, P, K]."""
    return reference.patch_cross_entropies(
        patch_logits, labels.own.tolist(), labels.partner.tolist(), labels.patch_weight.tolist(), labels.smoothing
    )


def dense_image_loss(logits: Tensor, labels: Labels) -> Tensor:
    rows = zip(labels.own.tolist(), labels.partner.tolist(), labels.weight.tolist(), strict=True)
    return reference.soft_cross_entropy(
        logits, [reference.soft_label(*row, labels.smoothing, CLASSES) for row in rows]
    )


# ------------------------------------------------------------------------------------------------------------
# Cross-entropy of the images


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images_have_soft_targets(smoothing: float) -> None:
    """With or without smoothing."""
    logits, labels = draw(BATCH, CLASSES), make_labels(smoothing)
    soft = mixup_target(labels.own, CLASSES, labels.weight[:, None], smoothing)
    value = cross_entropy(logits, labels)
    torch.testing.assert_close(value, SoftTargetCrossEntropy()(logits, soft), rtol=1e-6, atol=0)
    torch.testing.assert_close(value, dense_image_loss(logits, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.5])
def test_unmixed_images_have_smoothed_targets(smoothing: float) -> None:
    logits, labels = draw(BATCH, CLASSES), make_labels(smoothing, mixed=False)
    value = cross_entropy(logits, labels)
    torch.testing.assert_close(value, LabelSmoothingCrossEntropy(smoothing)(logits, labels.own), rtol=1e-12, atol=0)
    torch.testing.assert_close(value, F.cross_entropy(logits, labels.own, label_smoothing=smoothing))
    torch.testing.assert_close(value, dense_image_loss(logits, labels), rtol=1e-12, atol=0)


def test_without_smoothing_it_is_plain() -> None:
    logits, labels = draw(BATCH, CLASSES), make_labels(0.0, mixed=False)
    assert torch.equal(cross_entropy(logits, labels), nn.CrossEntropyLoss()(logits, labels.own))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("smoothing", "mixed"), [(0.1, True), (0.1, False), (0.0, False)])
def test_precision_of_cross_entropy(dtype: torch.dtype, smoothing: float, mixed: bool) -> None:
    """Half precision is computed in float32; float64 stays."""
    logits, labels = draw(BATCH, CLASSES, dtype=dtype), make_labels(smoothing, mixed)
    value = cross_entropy(logits, labels)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), dense_image_loss(logits.double(), labels), rtol=2e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------
# The mixing loss


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([2, 4]),
    patches=st.integers(1, 5),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    mixed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_mixing_is_the_dense_loss(batch: int, patches: int, smoothing: float, mixed: bool, seed: int) -> None:
    """Value and gradient of the mean over patches of CE_p with dense labels."""
    labels = make_labels(smoothing, mixed, patches, batch)
    patch_logits = draw(batch, patches, CLASSES, seed=seed)
    value, expected = mixing(patch_logits, labels), sum(dense_patch_losses(patch_logits, labels)) / patches
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    (mine,), (theirs,) = (torch.autograd.grad(loss, patch_logits) for loss in (value, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


def test_mixing_of_a_mixed_batch() -> None:
    """From pixels to loss: the labels that Mixup hands out, against counted pixels and dense labels."""
    images = draw(4, 3, 12, 9).detach()
    mixup = Mixup(mode="elem", mixup_alpha=0.0, patch_size=(4, 4), seed=3)
    twin = Mixup(mode="elem", mixup_alpha=0.0, seed=3)
    targets = torch.tensor([0, 3, 1, 2])
    _, labels = mixup(images, targets)
    patch_logits = draw(4, 6, CLASSES)
    weights = [reference.patch_weights(12, 9, (4, 4), *mix) for mix in twin.draw(4, 12, 9)]
    expected = reference.patch_cross_entropies(patch_logits, targets.tolist(), targets.tolist()[::-1], weights, 0.1)
    assert mixing(patch_logits, labels).item() == pytest.approx(sum(e.item() for e in expected) / 6, rel=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 24, 100])
def test_mixing_in_chunks_twice_differentiable(monkeypatch, rows: int) -> None:
    """Of 24 patches some at a time; gradient diversity differentiates this term twice."""
    monkeypatch.setattr(primitives, "MAX_ELEMENTS", rows * CLASSES)
    labels, patch_logits = make_labels(), draw(BATCH, PATCHES, CLASSES)
    expected = sum(dense_patch_losses(patch_logits, labels)) / PATCHES
    torch.testing.assert_close(mixing(patch_logits, labels), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(partial(mixing, labels=labels), patch_logits)
    assert torch.autograd.gradgradcheck(partial(mixing, labels=labels), patch_logits)


def test_mixing_keeps_the_logits_alone() -> None:
    kept: list[Tensor] = []
    patch_logits = draw(64, PATCHES, 50, dtype=torch.float32)
    labels = make_labels(batch=64)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = mixing(patch_logits, labels)
    large = {x.untyped_storage().data_ptr() for x in kept if x.numel() >= patch_logits.numel() / 2}
    assert large == {patch_logits.untyped_storage().data_ptr()} and value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixing_in_half_precision(dtype: torch.dtype) -> None:
    patch_logits, labels = draw(BATCH, PATCHES, CLASSES, dtype=dtype), make_labels()
    labels = labels._replace(patch_weight=labels.patch_weight.float())
    value = mixing(patch_logits, labels)
    assert value.dtype == torch.float32
    expected = sum(loss.item() for loss in dense_patch_losses(patch_logits.double(), labels)) / PATCHES
    assert value.item() == pytest.approx(expected, rel=2e-6)
    assert torch.autograd.grad(value, patch_logits)[0].dtype == dtype


def test_mixing_with_large_logits_is_finite() -> None:
    patch_logits = 1e4 * draw(BATCH, PATCHES, CLASSES, dtype=torch.float32)
    value = mixing(patch_logits, make_labels())
    assert value.isfinite() and torch.autograd.grad(value, patch_logits)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# The objective's label terms


def objective(c: float, label_loss: LabelLoss | None = None) -> Objective:
    """With the mixing loss at coefficient c."""
    return Objective(label_loss, Diversity([parse_spec(f"patch.mixing={c}")], depth=2))


@pytest.mark.parametrize("c", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("mixed", [True, False])
def test_label_loss(c: float, mixed: bool) -> None:
    """(CE_cls + c sum_p CE_p) / (1 + c P): plain cross-entropy at c = 0, the reference's mean at c = 1."""
    labels = make_labels(mixed=mixed)
    logits, patch_logits = draw(BATCH, CLASSES), draw(BATCH, PATCHES, CLASSES, seed=1)
    terms = objective(c)(captured(logits, patch_logits), labels)
    image = dense_image_loss(logits, labels)
    each = dense_patch_losses(patch_logits, labels)
    torch.testing.assert_close(terms["ce"].value, image)  # terms are logged undivided
    expected = image
    for patch_loss in each:
        expected = expected + c * patch_loss
    expected = expected / (1 + c * PATCHES)
    torch.testing.assert_close(total(terms), expected, rtol=1e-12, atol=0)
    if c == 0:
        assert list(terms) == ["ce"] and terms["ce"].coef == 1
        torch.testing.assert_close(total(terms), cross_entropy(logits, labels), rtol=0, atol=0)
    else:
        assert list(terms) == ["ce", "patch.mixing"]
        inputs = [logits, patch_logits]
        pairs = zip(torch.autograd.grad(total(terms), inputs), torch.autograd.grad(expected, inputs), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    if c == 1:
        mean = (image.item() + sum(patch_loss.item() for patch_loss in each)) / (PATCHES + 1)
        assert total(terms).item() == pytest.approx(mean, rel=1e-12)


def test_shares_of_the_label_loss_sum_to_one() -> None:
    """One unit of loss, however it is divided: a uniform prediction always costs log K."""
    labels, zeros = make_labels(), torch.zeros(BATCH, PATCHES, CLASSES, dtype=torch.float64)
    for c in (0.0, 0.5, 1.0):
        value = total(objective(c)(captured(zeros[:, 0], zeros), labels))
        assert value.item() == pytest.approx(math.log(CLASSES), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Distillation


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft_distillation(tau: float) -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1), draw(BATCH, CLASSES, seed=2)
    value = distillation(student, teacher, "soft", tau)
    assert value.item() == pytest.approx(reference.soft_distillation(student, teacher, tau), rel=1e-10)
    mean = F.kl_div((student / tau).log_softmax(1), (teacher / tau).softmax(1), reduction="batchmean")
    torch.testing.assert_close(value, tau**2 * mean / CLASSES)
    assert distillation(teacher, teacher, "soft", tau).item() == pytest.approx(0, abs=1e-15)


def test_hard_distillation() -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1), draw(BATCH, CLASSES, seed=2)
    value = distillation(student, teacher, "hard", 3.0)
    assert value.item() == pytest.approx(reference.hard_distillation(student, teacher), rel=1e-12)
    assert torch.equal(value, distillation(student, 9 * teacher + 4, "hard", 1.0))  # only which class wins counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_in_half_precision(kind: Literal["soft", "hard"], dtype: torch.dtype) -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1, dtype=dtype), draw(BATCH, CLASSES, seed=2, dtype=dtype)
    value = distillation(student, teacher, kind, 2.0)
    assert value.dtype == torch.float32
    wide = student.double(), teacher.double()
    soft, hard = reference.soft_distillation(*wide, 2.0), reference.hard_distillation(*wide)
    assert value.item() == pytest.approx(soft if kind == "soft" else hard, rel=1e-5)


class Teacher(nn.Module):
    """Remembers whether it was asked for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES).double()
        self.calls: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.head(images.mean(dim=(2, 3)))


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("a", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_label_loss_with_a_teacher(kind: str, a: float, c: float) -> None:
    """(1 - a) L_label + a L_distillation, of the distillation token; the teacher learns nothing."""
    teacher, labels = Teacher(), make_labels()
    loss = objective(c, LabelLoss(teacher, kind, alpha=a, tau=2.0))
    student = [draw(BATCH, CLASSES, seed=1), draw(BATCH, CLASSES, seed=2)]
    patch_logits = draw(BATCH, PATCHES, CLASSES, seed=3) if c else None
    seen = captured(student[0], patch_logits, student[1])

    answer = loss.ask_teacher(draw(BATCH, 3, 4, 4, seed=4).detach())
    assert answer is not None and not answer.requires_grad and teacher.calls == [False]
    terms = loss(seen, labels, answer)
    label = total(objective(c)(seen, labels)).item()
    formula = {
        "soft": reference.soft_distillation(student[1], answer, 2.0),
        "hard": reference.hard_distillation(student[1], answer),
    }
    assert terms["distillation"].value.item() == pytest.approx(formula[kind], rel=1e-10)
    assert total(terms).item() == pytest.approx((1 - a) * label + a * formula[kind], rel=1e-10)
    assert list(terms) == ["ce", *(["patch.mixing"] if c else []), "distillation"]

    total(terms).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student[1].grad is not None
    assert bool(student[1].grad.count_nonzero()) == (a > 0)


class Passing(nn.Module):
    """Returns what it is shown, as its logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_a_teachers_own_normalisation() -> None:
    """Back to pixels, then normalised anew, one number after the other; nothing changes where they agree."""
    ours, theirs = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]), ([0.5, 0.1, 0.0], [0.5, 1.0, 2.0])
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = OwnImages(Passing(), 4, [ours, theirs])(images).view_as(images)
    for b, c, y, x in itertools.product(range(2), range(3), range(4), range(4)):
        pixel = images[b, c, y, x].item() * ours[1][c] + ours[0][c]
        assert seen[b, c, y, x].item() == pytest.approx((pixel - theirs[0][c]) / theirs[1][c], abs=1e-6)
    assert torch.equal(OwnImages(Passing(), 4, [ours, ours])(images).view_as(images), images)
    assert not OwnImages(Passing(), 4, [ours, theirs]).state_dict()


@pytest.mark.parametrize("size", [2, 8])
def test_a_teachers_own_size(size: int) -> None:
    """A picture of one colour per channel stays so, whatever the size; Pillow resizes others in the same way."""
    same = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    teacher = OwnImages(Passing(), size, [same, same])
    plain = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(teacher(plain).view(2, 3, size, size), plain[..., :1, :1].expand(2, 3, size, size))
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for channel, resized in zip(images[0], teacher(images).view(3, size, size), strict=True):
        pillow = Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        torch.testing.assert_close(resized, torch.from_numpy(np.array(pillow)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"teacher": Teacher()}, {"distillation_type": "soft"}], ids=str)
def test_no_distillation_without_a_teacher_and_a_type(arguments: dict[str, Any]) -> None:
    """The whole weight stays with the labels."""
    loss, labels = Objective(LabelLoss(alpha=0.5, **arguments)), make_labels()
    assert loss.ask_teacher(torch.zeros(BATCH, 3, 4, 4, dtype=torch.float64)) is None
    terms = loss(captured(), labels, None)
    assert list(terms) == ["ce"] and terms["ce"].coef == 1


def test_a_student_without_distillation_token_is_refused() -> None:
    loss = Objective(LabelLoss(teacher=Teacher(), distillation_type="hard"))
    with pytest.raises(UserError, match=r"needs a student with a distillation token: .* --model deit_"):
        loss(captured(), make_labels(), draw(BATCH, CLASSES))
