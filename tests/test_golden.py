"""Every measure, two whole steps and a twelve-step trajectory against numbers computed by the reference.

The files lie in tests/golden, or in the folder that the environment variable GOLDEN_DIR names; shapes, seeds and
coefficients are read from them. All in float64 at rtol 1e-9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor

from engine import Precision, Updater, train_one_epoch
from losses import LabelLoss
from mixup import Mix, Mixup
from models import DiverseViT
from regularizers import Diversity, attention, measures, parse_spec, patch, total, weight

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
RTOL = 1e-9
PATCH_SIZE = 16  # of every model in the golden files; their images are 224 pixels wide
RECIPE = (0.5, 0.5, 1e-4, 5e-4)  # patch cosine, patch contrastive, attention cosine, weight CNO; mixing is on


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(actual: Tensor, expected: np.ndarray, what: str) -> None:
    """Equal to rtol 1e-9; numbers that cancel to nearly zero, to 1e-12 of the largest."""
    atol = 1e-12 * float(np.abs(expected).max())
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=RTOL, atol=atol, err_msg=what)


def give_probes(monkeypatch: pytest.MonkeyPatch, first: Tensor, second: Tensor) -> None:
    """Let CNO start from recorded vectors [..., n, 1] instead of drawing them."""
    monkeypatch.setattr(measures, "draw_probes", lambda x, distribution: (first, second))


# ------------------------------------------------------------------------------------------------------------
# Measures


def without_prefix(x: Tensor) -> Tensor:
    return x[:, 1:]


def as_it_is(x: Tensor) -> Tensor:
    return x


def heads(x: Tensor) -> Tensor:
    return x.flatten(2)


def level_measure(level: Any, name: str, **options: Any) -> Callable[..., Tensor]:
    """A measure with its level's defaults, as the objective uses it."""
    return partial(measures.MEASURES[name].function, **{**level.DEFAULT_ARGUMENTS.get(name, {}), **options})


PAIRS = {
    "cosine_signed": ("cosine", {}),
    "cosine_abs": ("cosine", {"absolute": True}),
    "cosine_cross_signed": ("cosine_cross", {}),
    "cosine_cross_abs": ("cosine_cross", {"absolute": True}),
    "contrastive_cross": ("contrastive", {}),
}
SETS = {"mhs": ("mhs", {}), "mgd": ("mgd", {}), "so": ("so", {}), "cno": ("cno", {})}

CASES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    **{f"patch_{f}": (level_measure(patch, n, **o), without_prefix) for f, (n, o) in PAIRS.items()},
    **{f"patch_{f}": (level_measure(patch, n, **o), as_it_is) for f, (n, o) in SETS.items()},
    **{f"attn_{f}": (level_measure(attention, n, **o), heads) for f, (n, o) in {**PAIRS, **SETS}.items()},
    **{f"weight_{f}": (level_measure(weight, n, **o), as_it_is) for f, (n, o) in SETS.items()},
    "weight_cno_inverse": (level_measure(weight, "cno", inverse=True), as_it_is),
    "grad_diversity": (measures.gradient_diversity, as_it_is),
}


@pytest.mark.parametrize("name", CASES)
def test_measure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, items = CASES[name]
    with np.load(GOLDEN / f"{name}.npz") as golden:
        cases = sorted({key.partition("/")[0] for key in golden.files})
        assert cases
        for case in cases:
            keys = [key for key in (f"{case}/in0", f"{case}/in1") if key in golden.files]
            inputs = [torch.tensor(golden[key], requires_grad=True) for key in keys]
            if f"{case}/probe0" in golden.files:
                give_probes(monkeypatch, *(torch.tensor(golden[f"{case}/probe{i}"]) for i in (0, 1)))
            value = function(*(items(x) for x in inputs))
            assert_close(value, golden[f"{case}/out"], f"{name} {case}")
            grads = torch.autograd.grad(value, inputs)
            for i, grad in enumerate(grads):
                if f"{case}/grad{i}" in golden.files:
                    assert_close(grad, golden[f"{case}/grad{i}"], f"{name} {case} gradient {i}")


def test_every_golden_measure_is_tested() -> None:
    files = {path.stem for path in GOLDEN.glob("*.npz")}
    assert set(CASES) <= files
    assert (
        not {f for f in files if f.startswith(("patch_", "attn_", "weight_"))}
        - set(CASES)
        - {"patch_diversification_step"}
    )


# ------------------------------------------------------------------------------------------------------------
# Whole steps


def build(cfg: np.ndarray, parameters: dict[str, np.ndarray], coefs: Any) -> tuple[DiverseViT, Diversity]:
    """The reference's small ViT under timm's names, and the recipe's objective."""
    width, depth, num_heads, classes = (int(number) for number in cfg)
    backbone = VisionTransformer(
        img_size=224, patch_size=PATCH_SIZE, embed_dim=width, depth=depth, num_heads=num_heads, num_classes=classes
    )
    backbone.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()}, strict=True)
    cosine, contrastive, heads_cosine, cno = (float(coef) for coef in coefs)
    specs = (
        "patch.mixing=1",
        f"patch.cosine@last={cosine!r}",
        f"patch.contrastive@first:last={contrastive!r}",
        f"attn.cosine@0={heads_cosine!r}",
        f"weight.cno@all={cno!r}",
    )
    diversity = Diversity([parse_spec(spec) for spec in specs], depth)
    return DiverseViT(backbone, diversity.needs), diversity


def starting_with(golden: Any, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


def normalise(images: np.ndarray) -> Tensor:
    return torch.tensor((images / 255.0 - 0.5) / 0.25)


@pytest.mark.parametrize("name", ["step_cutmix", "step_mixup"])
def test_whole_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(GOLDEN / f"{name}.npz") as golden:
        model, diversity = build(golden["cfg"], starting_with(golden, "param/"), RECIPE)
        probes = [torch.tensor(golden[f"probe{i}"]) for i in range(6 * int(golden["cfg"][1]))]
        give_probes(monkeypatch, torch.stack(probes[0::2]), torch.stack(probes[1::2]))

        box = None
        if "bbox_yl_yh_xl_xh" in golden.files:
            box = tuple(int(edge) for edge in golden["bbox_yl_yh_xl_xh"])
        mixup = Mixup(patch_size=(PATCH_SIZE, PATCH_SIZE), smoothing=0.1)
        images, labels = mixup.mix(
            normalise(golden["images_u8"]), torch.tensor(golden["labels"]), [Mix(float(golden["lam"]), box)]
        )
        captured = model(images)
        terms = LabelLoss(diversity.mixing)(captured, labels)
        terms |= diversity(captured, model.projections)
        loss = total(terms)
        loss.backward()

        assert captured.patch_logits is not None
        patches = captured.patch_logits.shape[1]
        assert_close(labels.patch_weight[0], golden["patch_lam"], "patch weights")
        assert_close(labels.dense(int(golden["cfg"][3]), torch.float64), golden["targets"], "image labels")
        assert_close(captured.logits, golden["logits"][:, 0], "logits")
        assert_close(captured.patch_logits, golden["logits"][:, 1:], "patch logits")
        for mine, theirs in (
            (captured.tokens[-1], "h_first"),
            (captured.tokens[int(golden["cfg"][1]) - 1], "h_last"),
            (captured.attention[0][:1], "attn_first"),
        ):  # these three are stored in float32
            np.testing.assert_allclose(mine.detach().numpy(), golden[theirs], rtol=1e-5, atol=1e-6, err_msg=theirs)
        assert int(golden["mixing_tokens"]) == patches + 1
        assert_close(terms["ce"].value, golden["ce"], "ce")
        assert_close(terms["patch.mixing"].value * patches, golden["mixing_sum"], "mixing")
        assert_close(terms["patch.cosine@last"].value, golden["patch_cosine"], "patch cosine")
        assert_close(terms["patch.contrastive@first:last"].value, golden["patch_contrastive"], "contrastive")
        assert_close(terms["attn.cosine@0"].value, golden["attn_cosine"], "attention cosine")
        assert_close(terms["weight.cno@all"].value, golden["weight_cno"], "weight CNO")
        assert_close(loss, golden["total"], "total")
        for parameter, grad in starting_with(golden, "grad/").items():
            assert_close(model.backbone.get_parameter(parameter).grad, grad, f"gradient of {parameter}")


# ------------------------------------------------------------------------------------------------------------
# The trajectory


TERM_NAMES = (
    "ce",
    "patch.mixing",
    "patch.cosine@last",
    "patch.contrastive@first:last",
    "attn.cosine@0",
    "weight.cno@all",
)


class Trajectory:
    """The golden run, ready to train: model, objective, updater and batches."""

    def __init__(self, golden: Any, mixup: Mixup) -> None:
        self.model, self.diversity = build(golden["cfg"], starting_with(golden, "init/"), golden["coefs"])
        optimizer = create_optimizer_v2(
            self.model.backbone, opt="adamw", lr=float(golden["lr"]), weight_decay=0.05, eps=1e-8
        )
        self.ema = ModelEmaV3(self.model, decay=float(golden["ema_decay"]))
        self.updater = Updater(optimizer, Precision(torch.device("cpu")), ema=self.ema)
        enlarged = golden["images_u8_14"].repeat(16, axis=3).repeat(16, axis=4)  # [S, B, 3, 224, 224]
        self.batches = [
            (normalise(images), torch.tensor(labels))
            for images, labels in zip(enlarged, golden["labels"], strict=True)
        ]
        self.mixup = mixup

    def train(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        return train_one_epoch(
            self.model, LabelLoss(self.diversity.mixing), self.diversity, batches, self.updater, self.mixup
        )

    def check_end(self, golden: Any) -> None:
        for parameter, value in starting_with(golden, "final/").items():
            assert_close(self.model.backbone.get_parameter(parameter), value, f"final {parameter}")
        for parameter, value in starting_with(golden, "ema/").items():
            assert_close(self.ema.module.backbone.get_parameter(parameter), value, f"EMA {parameter}")


class RecordedMixup(Mixup):
    """Mixes as recorded: rows (1 = CutMix, lam, yl, yh, xl, xh), one a step."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(patch_size=(PATCH_SIZE, PATCH_SIZE), smoothing=0.1)
        self.rows = iter(rows)

    def draw(self, batch: int, height: int, width: int) -> list[Mix]:
        cutmix, lam, *box = next(self.rows)
        return [Mix(float(lam), tuple(int(edge) for edge in box) if cutmix else None)]  # type: ignore[arg-type]


def test_trajectory_step_by_step() -> None:
    """Each step's losses through train_one_epoch with one batch, mixed as recorded."""
    with np.load(GOLDEN / "trajectory.npz") as golden:
        run = Trajectory(golden, RecordedMixup(golden["mixes"]))
        torch.manual_seed(int(golden["train_seed"]))
        patches = (224 // PATCH_SIZE) ** 2
        for step, batch in enumerate(run.batches):
            means = run.train([batch])
            np.testing.assert_allclose(means["loss"], golden["losses"][step], rtol=RTOL, err_msg=f"step {step}")
            values = [means[name] * (patches if name == "patch.mixing" else 1) for name in TERM_NAMES]
            np.testing.assert_allclose(values, golden["terms"][step], rtol=RTOL, err_msg=f"terms of step {step}")
        run.check_end(golden)


def test_trajectory_in_one_epoch_drawing_its_own_mixes() -> None:
    """All steps in one call; Mixup and CutMix draw from the seed alone, in the reference's order."""
    with np.load(GOLDEN / "trajectory.npz") as golden:
        seed = int(golden["train_seed"])
        run = Trajectory(golden, Mixup(patch_size=(PATCH_SIZE, PATCH_SIZE), smoothing=0.1, seed=seed))
        torch.manual_seed(seed)
        means = run.train(run.batches)
        np.testing.assert_allclose(means["loss"], golden["losses"].mean(), rtol=RTOL)
        run.check_end(golden)
