"""Every measure, whole steps, a trajectory and every remedy against numbers computed by the originals.

The files lie in tests/golden, or in the folder that the environment variable GOLDEN_DIR names; shapes, seeds and
coefficients are read from them. All in float64 at rtol 1e-9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import golden_peers as peers
import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor

from engine import Precision, Updater, evaluate, joint_prediction, train_one_epoch
from losses import Objective
from mixing.mixup import Mix, Mixup
from mixing.patch_grid import Labels as GridLabels
from mixing.patch_grid import PatchGrid, Rectangle
from models import DiverseViT, Needs
from models.heads import RegionHead
from models.remedies import install_remedies
from regularizers import Diversity, measures, parse_spec
from regularizers.levels import LEVELS

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
RTOL = 1e-9
RECIPE = (0.5, 0.5, 1e-4, 5e-4)  # patch cosine, patch contrastive, attention cosine, weight CNO; mixing is on
TERMS = {  # name -> key in the files of whole steps; the trajectory's columns are in this order
    "ce": "ce",
    "patch.mixing": "mixing_sum",
    "patch.cosine@last": "patch_cosine",
    "patch.contrastive@first:last": "patch_contrastive",
    "attn.cosine@0": "attn_cosine",
    "weight.cno@all": "weight_cno",
}


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


def level_measure(level: str, name: str, **options: Any) -> Callable[..., Tensor]:
    """A measure with its level's defaults, as the objective uses it."""
    return partial(measures.MEASURES[name].function, **{**LEVELS[level].default_arguments.get(name, {}), **options})


PAIRS = {
    "cosine_signed": ("cosine", {}),
    "cosine_abs": ("cosine", {"absolute": True}),
    "cosine_cross_signed": ("cosine_cross", {}),
    "cosine_cross_abs": ("cosine_cross", {"absolute": True}),
    "contrastive_cross": ("contrastive", {}),
}
SETS = {"mhs": ("mhs", {}), "mgd": ("mgd", {}), "so": ("so", {}), "cno": ("cno", {})}

CASES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    **{f"patch_{f}": (level_measure("patch", n, **o), without_prefix) for f, (n, o) in PAIRS.items()},
    **{f"patch_{f}": (level_measure("patch", n, **o), as_it_is) for f, (n, o) in SETS.items()},
    **{f"attn_{f}": (level_measure("attn", n, **o), heads) for f, (n, o) in {**PAIRS, **SETS}.items()},
    **{f"weight_{f}": (level_measure("weight", n, **o), as_it_is) for f, (n, o) in SETS.items()},
    "weight_cno_inverse": (level_measure("weight", "cno", inverse=True), as_it_is),
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
# What whole steps and the trajectory share


def starting_with(golden: Any, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


def normalise(images: np.ndarray) -> Tensor:
    return torch.tensor((images / 255.0 - 0.5) / 0.25)


class RecordedMixup(Mixup):
    """Mixes as recorded, one a step."""

    def __init__(self, mixes: Iterable[Mix], patch_size: tuple[int, int]) -> None:
        super().__init__(patch_size=patch_size, smoothing=0.1)
        self.mixes = iter(mixes)

    def draw(self, batch: int, height: int, width: int) -> list[Mix]:
        return [next(self.mixes)]


class Run:
    """The reference's small ViT under timm's names, the recipe's objective, and how to train them.

    Args:
        cfg: width, depth, heads, classes.
        parameters: the backbone's, by timm's names; they tell the patch size.
        image_size: height and width in pixels.
        coefs: as RECIPE.
    """

    def __init__(
        self, cfg: np.ndarray, parameters: dict[str, np.ndarray], image_size: tuple[int, int], coefs: Any
    ) -> None:
        width, self.depth, num_heads, self.classes = (int(number) for number in cfg)
        self.patch_size = patch_size_of(parameters)
        self.backbone = VisionTransformer(
            img_size=image_size,
            patch_size=self.patch_size,
            embed_dim=width,
            depth=self.depth,
            num_heads=num_heads,
            num_classes=self.classes,
        )
        self.backbone.load_state_dict({k: torch.tensor(value) for k, value in parameters.items()}, strict=True)
        cosine, contrastive, heads_cosine, cno = (float(coef) for coef in coefs)
        specs = (
            "patch.mixing=1",
            f"patch.cosine@last={cosine!r}",
            f"patch.contrastive@first:last={contrastive!r}",
            f"attn.cosine@0={heads_cosine!r}",
            f"weight.cno@all={cno!r}",
        )
        self.diversity = Diversity([parse_spec(spec) for spec in specs], self.depth)
        self.model = DiverseViT(self.backbone, Needs(**self.diversity.needs))

    @property
    def patches(self) -> int:
        return self.backbone.patch_embed.num_patches

    def train(self, batches: list[tuple[Tensor, Tensor]], updater: Updater, mixup: Mixup) -> dict[str, float]:
        """Through the real loop; the reference sums the mixing loss over patches, so that is what returns here."""
        means = train_one_epoch(self.model, Objective(diversity=self.diversity), batches, updater, mixup)
        return means | {"patch.mixing": means["patch.mixing"] * self.patches}


def patch_size_of(parameters: dict[str, np.ndarray]) -> tuple[int, int]:
    height, width = parameters["patch_embed.proj.weight"].shape[2:]
    return height, width


# ------------------------------------------------------------------------------------------------------------
# Whole steps

STEPS = ("step_cutmix", "step_mixup")


def whole_step(golden: Any) -> tuple[Run, tuple[Tensor, Tensor], Mixup]:
    """What the recorded step starts from: model and objective, the batch, and how it is mixed."""
    run = Run(golden["cfg"], starting_with(golden, "param/"), golden["images_u8"].shape[2:], RECIPE)
    box = None
    if "bbox_yl_yh_xl_xh" in golden.files:
        top, bottom, left, right = (int(edge) for edge in golden["bbox_yl_yh_xl_xh"])
        box = top, bottom, left, right
    mixup = RecordedMixup([Mix(float(golden["lam"]), box)], run.patch_size)
    return run, (normalise(golden["images_u8"]), torch.tensor(golden["labels"])), mixup


@pytest.mark.parametrize("name", STEPS)
def test_whole_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every term, the total and every gradient, as the training loop leaves them."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        run, batch, mixup = whole_step(golden)
        probes = [torch.tensor(golden[f"probe{i}"]) for i in range(6 * run.depth)]
        give_probes(monkeypatch, torch.stack(probes[0::2]), torch.stack(probes[1::2]))
        stays = torch.optim.SGD(run.model.parameters(), lr=0.0)
        means = run.train([batch], Updater(stays, Precision(torch.device("cpu"))), mixup)

        assert set(means) == {"loss", "lr", "dropped", *TERMS}
        for term, key in {"loss": "total", **TERMS}.items():
            assert_close(torch.tensor(means[term]), golden[key], term)
        grads = starting_with(golden, "grad/")
        parameters = dict(run.backbone.named_parameters())
        assert set(grads) == set(parameters)
        for parameter, grad in grads.items():
            assert_close(parameters[parameter].grad, grad, f"gradient of {parameter}")


@pytest.mark.parametrize("name", STEPS)
def test_whole_step_forward(name: str) -> None:
    """What the step's terms are computed from: labels, logits, tokens and attention."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        run, batch, mixup = whole_step(golden)
        images, labels = mixup(*batch)
        captured = run.model(images)

        assert int(golden["mixing_tokens"]) == run.patches + 1
        assert_close(labels.patch_weight[0], golden["patch_lam"], "patch weights")
        assert_close(labels.dense(run.classes, torch.float64), golden["targets"], "image labels")
        assert_close(captured.logits, golden["logits"][:, 0], "logits")
        assert_close(captured.patch_logits, golden["logits"][:, 1:], "patch logits")
        for mine, theirs in (
            (captured.tokens[-1], "h_first"),
            (captured.tokens[run.depth - 1], "h_last"),
            (captured.attention[0][:1], "attn_first"),
        ):  # these three are stored in float32
            np.testing.assert_allclose(mine.detach().numpy(), golden[theirs], rtol=1e-5, atol=1e-6, err_msg=theirs)


# ------------------------------------------------------------------------------------------------------------
# The trajectory


class Trajectory(Run):
    """The golden run, ready to train: besides model and objective, the updater with its EMA and the batches.

    The images are stored at one pixel a patch.
    """

    def __init__(self, golden: Any) -> None:
        parameters = starting_with(golden, "init/")
        height, width = patch_size_of(parameters)
        enlarged = golden["images_u8_14"].repeat(height, axis=3).repeat(width, axis=4)  # [S, B, 3, H, W]
        super().__init__(golden["cfg"], parameters, enlarged.shape[3:], golden["coefs"])
        optimizer = create_optimizer_v2(
            self.backbone, opt="adamw", lr=float(golden["lr"]), weight_decay=0.05, eps=1e-8
        )
        self.ema = ModelEmaV3(self.model, decay=float(golden["ema_decay"]))
        self.updater = Updater(optimizer, Precision(torch.device("cpu")), ema=self.ema)
        self.batches = [
            (normalise(images), torch.tensor(labels))
            for images, labels in zip(enlarged, golden["labels"], strict=True)
        ]

    def check_end(self, golden: Any) -> None:
        for parameter, value in starting_with(golden, "final/").items():
            assert_close(self.backbone.get_parameter(parameter), value, f"final {parameter}")
        for parameter, value in starting_with(golden, "ema/").items():
            assert_close(self.ema.module.backbone.get_parameter(parameter), value, f"EMA {parameter}")


def recorded(row: np.ndarray) -> Mix:
    """A Mix of a row (1 = CutMix, lam, yl, yh, xl, xh)."""
    cutmix, weight, *box = row
    top, bottom, left, right = (int(edge) for edge in box)
    return Mix(float(weight), (top, bottom, left, right) if cutmix else None)


def test_trajectory_step_by_step() -> None:
    """Each step's losses through train_one_epoch with one batch, mixed as recorded."""
    with np.load(GOLDEN / "trajectory.npz") as golden:
        run = Trajectory(golden)
        mixup = RecordedMixup(map(recorded, golden["mixes"]), run.patch_size)
        torch.manual_seed(int(golden["train_seed"]))
        for step, batch in enumerate(run.batches):
            means = run.train([batch], run.updater, mixup)
            np.testing.assert_allclose(means["loss"], golden["losses"][step], rtol=RTOL, err_msg=f"step {step}")
            values = [means[name] for name in TERMS]
            np.testing.assert_allclose(values, golden["terms"][step], rtol=RTOL, err_msg=f"terms of step {step}")
        run.check_end(golden)


def test_trajectory_in_one_epoch_drawing_its_own_mixes() -> None:
    """All steps in one call; Mixup and CutMix draw from the seed alone, in the reference's order."""
    with np.load(GOLDEN / "trajectory.npz") as golden:
        run, seed = Trajectory(golden), int(golden["train_seed"])
        torch.manual_seed(seed)
        means = run.train(run.batches, run.updater, Mixup(patch_size=run.patch_size, smoothing=0.1, seed=seed))
        np.testing.assert_allclose(means["loss"], golden["losses"].mean(), rtol=RTOL)
        run.check_end(golden)


# ------------------------------------------------------------------------------------------------------------
# Remedies, with the fused kernel and with the explicit map


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", ["attnscale", "gfsa"])
def test_peer_in_the_map(method: str, fused: bool) -> None:
    for case in peers.cases(method):
        backbone = peers.stock(case)
        install_remedies(backbone, [method])
        attention = backbone.blocks[0].attn
        attention.fused_attn = fused
        peers.check(method, case, attention, attention)


@pytest.mark.parametrize("fused", [True, False])
def test_peer_featscale(fused: bool) -> None:
    for case in peers.cases("featscale"):
        backbone = peers.stock(case)
        install_remedies(backbone, ["featscale"])
        block = backbone.blocks[0]
        block.attn.fused_attn, block.norm1.eps, block.norm2.eps = fused, 1e-5, 1e-5
        peers.check("featscale", case, block, block)


@pytest.mark.parametrize("fused", [True, False])
def test_peer_neutreno(fused: bool) -> None:
    for case in peers.cases("neutreno"):
        backbone = peers.stock(case, blocks=2)
        install_remedies(backbone, ["neutreno"])
        attentions = torch.nn.ModuleList([block.attn for block in backbone.blocks])
        for attention in attentions:
            attention.fused_attn = fused
        first, second = attentions
        peers.check("neutreno", case, attentions, lambda x, first=first, second=second: second(x + first(x)))


def test_peer_reattention() -> None:
    """It has no form without the map. Its batch norm keeps statistics, which evaluation takes."""
    for case in peers.cases("reattention"):
        backbone = peers.stock(case)
        install_remedies(backbone, ["reattention"])
        attention = backbone.blocks[0].attn.train()
        assert not attention.fused_attn
        peers.check("reattention", case, attention, attention)
        norm = attention.remedies.reattention.var_norm
        peers.assert_close(norm.running_mean, case.values["running_mean"], "running mean")
        peers.assert_close(norm.running_var, case.values["running_var"], "running variance")
        peers.assert_close(attention.eval()(torch.tensor(case.values["x"])), case.values["y_eval"], "evaluation")


def test_peer_contranorm() -> None:
    for case in peers.cases("contranorm"):
        words = [word for word in ("dual", "learnable", "positive", "identity") if case.option(word)]
        numbers = [f"scale={case.option('scale')!r}", f"tau={case.option('temperature')!r}"]
        backbone = peers.stock(case)
        install_remedies(backbone, [f"contranorm:{','.join([*numbers, *words])}"])
        norm = backbone.blocks[0].norm1
        peers.check("contranorm", case, norm, norm)


def test_every_peer_is_tested() -> None:
    assert {path.stem for path in GOLDEN.glob("peer_*.npz")} == {f"peer_{method}" for method in peers.OWN}


# ------------------------------------------------------------------------------------------------------------
# Patch Diversification's own step

DIVERSIFICATION = {  # name -> key in the file
    "ce": "ce",
    "patch.region_mixing": "region_mixing",
    "patch.context@embed:norm": "context_contrast",
}


def here(name: str) -> str:
    """The recorded name of a parameter, as it is called here."""
    return name.replace("attn.proj_p", "attn.remedies.talking_heads.proj_p")


class RecordedGrid(PatchGrid):
    """Mixes as recorded, without Mixup and CutMix."""

    def __init__(self, golden: Any) -> None:
        super().__init__(patch_size=(16, 16), mixup_alpha=0.0, cutmix_alpha=0.0, smoothing=0.1)
        rows, columns = (np.flatnonzero(golden["mask"].any(axis=axis)) for axis in (1, 0))
        edges = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        self.recorded = Rectangle(*map(int, edges)), [int(place) for place in golden["perm"]]

    def draw(self, batch: int, rows: int, columns: int) -> tuple[Rectangle, list[int]]:
        return self.recorded


class Diversified:
    """The recorded model, its objective and the batch, from the file alone."""

    def __init__(self, golden: Any) -> None:
        width, depth, heads, self.classes, side = (int(number) for number in golden["cfg"])
        sizes = {"img_size": 16 * side, "patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads}
        self.backbone: Any = VisionTransformer(**sizes, num_classes=self.classes)
        install_remedies(self.backbone, ["talking_heads"])
        specs = [parse_spec("patch.region_mixing=1"), parse_spec("patch.context=1")]
        self.diversity = Diversity(specs, depth, grid=(side, side))
        self.model = DiverseViT(self.backbone, Needs(**self.diversity.needs), head=RegionHead)
        weights = {here(name): torch.tensor(value) for name, value in starting_with(golden, "param/").items()}
        self.backbone.load_state_dict(weights, strict=True)
        self.mixing = RecordedGrid(golden)
        images = golden["images_u8"].repeat(16, axis=2).repeat(16, axis=3)
        self.batch = normalise(images), torch.tensor(golden["labels"])


def test_golden_patch_diversification_step() -> None:
    """Every term, the total and every gradient, as the training loop leaves them."""
    with np.load(GOLDEN / "patch_diversification_step.npz") as golden:
        run = Diversified(golden)
        stays = torch.optim.SGD(run.model.parameters(), lr=0.0)
        updater = Updater(stays, Precision(torch.device("cpu")))
        means = train_one_epoch(run.model, Objective(diversity=run.diversity), [run.batch], updater, run.mixing)

        assert set(means) == {"loss", "lr", "dropped", *DIVERSIFICATION}
        for term, key in {"loss": "total", **DIVERSIFICATION}.items():
            assert_close(torch.tensor(means[term]), golden[key], term)
        grads = {here(name): grad for name, grad in starting_with(golden, "grad/").items()}
        parameters = dict(run.backbone.named_parameters())
        assert set(grads) == set(parameters)
        for parameter, grad in grads.items():
            assert_close(parameters[parameter].grad, grad, f"gradient of {parameter}")


def test_golden_patch_diversification_labels_and_logits() -> None:
    """What the step's terms are computed from."""
    with np.load(GOLDEN / "patch_diversification_step.npz") as golden:
        run = Diversified(golden)
        images, labels = run.mixing(*run.batch)
        assert isinstance(labels, GridLabels)
        own = labels.of_regions(run.classes, torch.float64)
        assert_close(own[:, 0], golden["targets"], "labels of an image's own")
        assert_close(own[:, 1], golden["targets"][golden["perm"]], "labels of its partner")
        assert_close(labels.dense(run.classes, torch.float64), golden["mixed_targets"], "mixed labels")
        assert_close(labels.shares, np.array([golden["rate"], 1 - golden["rate"]]), "shares")
        assert_close(labels.regions[0], golden["mask"].ravel(), "the mask")
        assert_close(run.model(images, labels=labels).logits, golden["logits"], "logits")


def test_golden_patch_diversification_evaluation() -> None:
    """Both predictions for the mixed images in evaluation mode, and that an evaluation counts what they say."""
    with np.load(GOLDEN / "patch_diversification_step.npz") as golden:
        run = Diversified(golden)
        images, targets = run.mixing(*run.batch)[0], run.batch[1]
        assert run.model.predicts_jointly
        with torch.no_grad():
            shown = run.model.eval()(images, needs=Needs(patch_logits=True))
        assert shown.patch_logits is not None
        assert_close(shown.logits.log_softmax(dim=1), golden["eval_log_probs"], "log probabilities")
        assert_close(joint_prediction(shown.logits, shown.patch_logits), golden["eval_joint"], "joint prediction")
        found = evaluate(run.model, [(images, targets)], Precision(torch.device("cpu")))
        for key, scores in (("acc1", "eval_log_probs"), ("joint_acc1", "eval_joint")):
            assert found[key] == 100 * (golden[scores].argmax(axis=1) == targets.numpy()).mean(), key
