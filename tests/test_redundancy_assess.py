"""`assess` on a tiny ViT: the same numbers however its images are split, and the model left as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, random_batch
from naive_metrics import NAIVE, Seen, as_seen, of_images, summarised
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from errors import UserError
from models import DiverseViT, Needs
from redundancy import assess
from redundancy.finding import Finding
from redundancy.metrics.registry import METRICS, Metric
from redundancy.metrics.shown import Place, Shown
from regularizers import Diversity, measures, parse_spec

IMAGES, DEPTH = 75, 3
KINDS = ("q", "k", "v", "proj", "fc1", "fc2")


def vit(dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """With larger weights than timm's, so that attention is not uniform."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **arguments}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


@torch.no_grad()
def shown_by(model: Any, images: Tensor, labels: Tensor) -> Shown:
    """What the model shows, by hooks of its own."""
    tokens: dict[int, Tensor] = {}
    maps: dict[int, Tensor] = {}
    for index, block in enumerate(model.blocks):
        block.attn.fused_attn = False

        def after(module: nn.Module, args: tuple[Tensor], output: Tensor, index: int = index) -> None:
            tokens.setdefault(-1, args[0][:, 1:]) if index == 0 else None
            tokens[index] = output[:, 1:]

        def at_map(module: nn.Module, args: tuple[Tensor], index: int = index) -> None:
            maps[index] = args[0][:, None]

        block.register_forward_hook(after)
        block.attn.attn_drop.register_forward_pre_hook(at_map)
    final = model.forward_features(images)
    features, logits = model.forward_head(final, pre_logits=True), model.forward_head(final)
    places = {index: Place(1, (32, 32), (4, 4)) for index in maps}
    return Shown((32, 32), tokens, maps, places, logits, features, model.head(final[:, 1:]), labels)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    images, labels = random_batch(IMAGES)
    return images.double(), labels


@pytest.fixture(scope="module")
def seen(batch) -> Seen:
    return as_seen(shown_by(vit(torch.float64), *batch))


# ------------------------------------------------------------------------------------------------------------
# Streaming


SPLITS = {"75": [75], "1, 1, ...": [1] * 75, "7, 13, ...": [7, 13, 1, 31, 2, 21], "32, 32, 11": [32, 32, 11]}


@pytest.fixture(scope="module", params=SPLITS)
def findings(request, batch) -> dict[str, Finding]:
    """All metrics of the images, split in one way or another."""
    loader = zip(*(part.split(SPLITS[request.param]) for part in batch), strict=True)
    (assessed,) = assess(vit(torch.float64), loader).models
    assert not assessed.gaps
    return assessed.findings


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_streaming_equals_all_at_once(metric: Metric, findings: dict[str, Finding], seen: Seen) -> None:
    found = findings[metric.name]
    if metric.takes == "weight":
        of_the_weights(metric, found)
    elif metric.takes == "set" and metric.name != "output.knn":
        expected = NAIVE[metric.name](seen)
        mean, error = expected if isinstance(expected, tuple) else (expected, np.full_like(expected, np.nan))
        close(found.mean, mean)
        close(found.error, error)
        close(found.summary, mean if metric.summary == "value" else summarised(metric.summary, mean))
        assert found.count == IMAGES
    else:
        of_the_images(metric, found, seen)


def of_the_images(metric: Metric, found: Finding, seen: Seen) -> None:
    """Mean and standard error over images."""
    values = NAIVE[metric.name](seen) if metric.takes == "set" else of_images(metric.name, metric.takes, seen)
    close(found.mean, values.mean(axis=0))
    close(found.error, values.std(axis=0, ddof=1) / math.sqrt(IMAGES))
    assert [axis.name for axis in found.axes] == ["layer"] * (values.ndim - 1)
    assert all(axis.labels in (("input", "0", "1", "2"), ("0", "1", "2")) for axis in found.axes)
    per_image = values if metric.summary == "value" else [summarised(metric.summary, each) for each in values]
    close(found.per_image, per_image)
    close(found.summary, np.mean(per_image))
    close(found.summary_error, np.std(per_image, ddof=1) / math.sqrt(IMAGES))
    assert found.count == IMAGES


def of_the_weights(metric: Metric, found: Finding) -> None:
    """Every matrix by itself; shorter spectra have gaps behind their end."""
    assert [axis.name for axis in found.axes][:2] == ["layer", "matrix"]
    assert (found.axes[0].labels, found.axes[1].labels) == (("0", "1", "2"), KINDS)
    assert found.error is None and found.count == 0
    every = []
    for layer, block in enumerate(vit(torch.float64).blocks):
        q, k, v = block.attn.qkv.weight.chunk(3)
        matrices = [q, k, v, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]
        for kind, matrix in enumerate(matrices):
            expected = np.atleast_1d(NAIVE[metric.name](matrix.detach().numpy()))
            values = np.atleast_1d(found.mean[layer, kind])
            close(values[: len(expected)], expected)
            assert np.isnan(values[len(expected) :]).all()
            every.append(expected)
    if metric.summary == "none":
        assert math.isnan(found.summary)
    else:
        close(found.summary, summarised(metric.summary, np.array(every)))


# ------------------------------------------------------------------------------------------------------------
# The model


def state_of(model: nn.Module) -> list[Any]:
    """All that measuring might change."""
    modes = [module.training for module in model.modules()]
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    parameters = [
        (parameter.requires_grad, parameter.grad, parameter.sum().item()) for parameter in model.parameters()
    ]
    return [modes, fused, hooks, parameters, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_the_model_is_left_as_it_was() -> None:
    images, labels = random_batch(5)
    model = vit(drop_path_rate=0.5).train()
    model.blocks[1].eval()
    model.blocks[2].attn.fused_attn = False
    model.head.bias.requires_grad_(False)
    before = state_of(model)
    assess(model, [(images, labels)], measures=["patch.cno@all", "weight.cno"])
    assert state_of(model) == before
    assert any(before[0]) and not all(before[0]) and True in before[1] and False in before[1]


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([torch.zeros(3, 1, 32, 32)], "cannot take images of 1 x 32 x 32 pixels"),
        ([torch.zeros(3, 3, 32, 32), torch.zeros(3, 3, 16, 16)], "images of one size"),
    ],
)
def test_also_where_it_is_refused(batches: list[Tensor], said: str) -> None:
    model = vit().train()
    before = state_of(model)
    assert said in refusal(model, batches)
    assert state_of(model) == before


def test_it_is_measured_in_evaluation_mode() -> None:
    images, labels = random_batch(8)
    found = [assess(vit(proj_drop_rate=0.5).train(mode), [(images, labels)]).to_json() for mode in (True, False)]
    assert found[0] == found[1]


def test_a_model_with_hooks_for_training() -> None:
    images, labels = random_batch(8)
    diversity = Diversity([parse_spec("attn.cosine@0=1"), parse_spec("patch.cosine@last=1")], DEPTH)
    model = DiverseViT(vit(), Needs(**diversity.needs))
    before = state_of(model)
    found = assess(model, [(images, labels)]).to_json()
    assert state_of(model) == before
    assert model(images).attention.keys() == {0}
    assert found == assess(vit(), [(images, labels)]).to_json()


def test_a_model_without_a_head() -> None:
    """What it returns are its features."""
    images, labels = random_batch(8)
    model = vit()
    (plain,) = assess(model, [(images, labels)], metrics=["output.knn", "patch"]).models
    model.reset_classifier(0)
    (headless,) = assess(model, [(images, labels)], metrics=["output.knn", "patch"]).models
    assert headless.gaps == plain.gaps == {}
    for name, finding in plain.findings.items():
        np.testing.assert_array_equal(headless.findings[name].mean, finding.mean)


# ------------------------------------------------------------------------------------------------------------
# Loaders, and what is asked for


def refusal(model: nn.Module, loader: Any, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        assess(model, loader, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loaders_of_all_kinds() -> None:
    images, labels = random_batch(9)
    expected = assess(vit(torch.float64), [(images.double(), labels)])
    data = TensorDataset(images.double(), labels)

    def one_by_one() -> Iterator[list[Tensor]]:
        yield [images[:0].double(), labels[:0]]  # empty batches play no part
        for place in range(9):
            yield [images[place : place + 1].double(), labels[place : place + 1], torch.zeros(1)]

    for loader in (DataLoader(data, batch_size=4), DataLoader(data, batch_size=2, num_workers=1), one_by_one()):
        (found,) = assess(vit(torch.float64), loader).models
        for name, finding in expected.models[0].findings.items():
            close(found.findings[name].mean, finding.mean)
    (alone,) = assess(vit(torch.float64), DataLoader(images.double(), batch_size=4)).models  # type: ignore[arg-type]
    for name, finding in alone.findings.items():
        close(finding.mean, expected.models[0].findings[name].mean)
    assert alone.findings.keys() | alone.gaps.keys() == METRICS.keys()


def test_batches_that_cannot_be_measured() -> None:
    images, labels = random_batch(4)
    form = "a loader must yield images [B, C, H, W], or (images, labels)"
    for batch in (None, 3, "images", {"images": images}, [], images[0], (labels, images), (None, labels)):
        assert refusal(vit(), [batch]) == form
    for wrong in (labels[:3], labels[:, None], labels.double(), labels.tolist(), "labels", torch.eye(4).long()):
        assert "a tensor [B] of integers" in refusal(vit(), [(images, wrong)])
    assert "from 0" in refusal(vit(), [(images, labels - 5)])
    assert assess(vit(), [(images, labels.byte())], metrics=["output"]).models[0].findings
    assert assess(vit(), [images], metrics="patch.cosine").models[0].findings.keys() == {"patch.cosine"}
    assert refusal(vit(), [(images, labels + 5)]).startswith(
        f"label {int(labels.max()) + 5} is none of the model's 5"
    )
    assert "must be normalised numbers as the model takes them, not torch.uint8" in refusal(vit(), [images.byte()])
    for batches in ([(images, labels), images], [images, (images, labels)], [images, images[..., :16]]):
        assert "of one size, and labels with all of them or with none" in refusal(vit(), batches)
    for nothing in ([], [images[:0]], iter(())):
        assert refusal(vit(), nothing) == "there are no images to measure"


def test_images_take_the_precision_of_the_model() -> None:
    images, labels = random_batch(6)
    (wide,) = assess(vit(), [(images.double(), labels)], metrics=["patch.cosine"]).models
    (half,) = assess(vit().bfloat16(), [(images, labels)], metrics=["patch.cosine"]).models
    expected = wide.findings["patch.cosine"].mean
    np.testing.assert_allclose(half.findings["patch.cosine"].mean, expected, atol=0.02)


def test_models_inside_of_others() -> None:
    """The timm model inside is measured, with its class token."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vit()

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    around, (images, labels) = Around(), random_batch(6)
    (plain,) = assess(around.inner, [(images, labels)]).models
    compiled = vit()
    compiled.load_state_dict(around.inner.state_dict())
    compiled.compile(backend="eager")
    with torch.no_grad():
        compiled(images)
    for model in (around, nn.DataParallel(around), torch.compile(around, backend="eager"), compiled):
        (same,) = assess(model, [(images, labels)]).models
        assert same.gaps.keys() == (set() if model is compiled else {"output.patch_accuracy"})
        for name, finding in same.findings.items():
            finding, expected = plain.findings[name], finding
            np.testing.assert_array_equal(expected.mean, finding.mean, err_msg=name)
    assert compiled._compiled_call_impl is not None


def test_a_head_around_a_model_is_the_one_that_is_measured() -> None:
    """With what else is around it; a bare model without a classifier has no accuracy."""
    images, labels = random_batch(12)
    inner = vit(num_classes=0).eval()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Linear(24, 5)

        def forward(self, images: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.inner((images - 5) / 0.1)))  # as transformers return them

    model = Around().eval()
    (around,) = assess(model, [(images, labels)]).models
    (bare,) = assess(inner, [((images - 5) / 0.1, labels)]).models
    with torch.no_grad():
        hits = model(images).logits.argmax(dim=1) == labels
    assert around.findings["output.top1"].summary == pytest.approx(100 * float(hits.float().mean()))
    assert around.findings["patch.cosine"].summary == pytest.approx(bare.findings["patch.cosine"].summary, rel=1e-6)
    assert bare.gaps.keys() == {"output.top1", "output.top5", "output.calibration", "output.patch_accuracy"}


def test_rectangular_windows() -> None:
    """By hand: uniform attention in windows of 2 x 8 positions, 4 pixels apart."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "patch_size": 4}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(16, 64), window_size=(2, 8), num_classes=5, **sizes
    )
    with torch.no_grad():
        for block in model.layers[0].blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            block.attn.relative_position_bias_table.zero_()
    (found,) = assess(model, [torch.randn(3, 3, 16, 64)], metrics=["attn.distance"]).models
    places = [(4 * row, 4 * column) for row in range(2) for column in range(8)]
    expected = np.mean([math.dist(one, other) for one in places for other in places])
    assert found.findings["attn.distance"].mean[0] == pytest.approx(expected, rel=1e-5)


def test_sizes_that_are_no_multiple_of_the_patch() -> None:
    """30 pixels hold 3 patches of 8, which are 8 apart."""
    model = vit(img_size=30)
    (found,) = assess(model, [random_batch(3, pixels=30)]).models
    farthest = math.dist((0, 0), (16, 16))
    assert 0 < found.findings["attn.distance"].summary < farthest * 8 / 9
    assert found.examples[0].image.shape == (24, 24, 3) and found.examples[0].grid == (3, 3)


def test_patches_that_overlap_cover_the_whole_image() -> None:
    """PVT's first ones are 7 pixels wide and 4 apart, with padding around."""
    model = timm.create_model("pvt_v2_b0", num_classes=5).eval()
    (found,) = assess(model, [torch.randn(3, 3, 48, 48)], metrics=["attn.distance"]).models
    assert found.examples[0].image.shape == (48, 48, 3) and found.examples[0].grid == (2, 2)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e18, 1e30])
def test_lengths_out_of_the_range_of_squares(scale: float) -> None:
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    for name in (
        "patch.cosine_abs",
        "patch.cosine",
        "patch.mean_energy",
        "patch.norm_ratio",
        "patch.norm_outliers",
    ):
        function = METRICS[name].function
        torch.testing.assert_close(function(scale * x), function(x), rtol=1e-5, atol=1e-6)


def test_autocast_around_it() -> None:
    batch = random_batch(6)
    (plain,) = assess(vit(), [batch]).models
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = assess(vit(), [batch]).models
    assert mixed.findings.keys() == plain.findings.keys() and not mixed.gaps and mixed.examples


def test_models_that_return_no_logits() -> None:
    images, _ = random_batch(4)
    said = refusal(nn.Conv2d(3, 5, 1), [images])
    assert said.startswith("Conv2d returns [2, 5, 32, 32] for 2 images, not logits [B, K]: measure a classifier")


def test_metrics_that_are_asked_for() -> None:
    batch = random_batch(6)
    (some,) = assess(vit(), [batch], metrics=["attn", "patch.cka"]).models
    assert list(some.findings) == ["patch.cka", *(name for name in METRICS if name.startswith("attn."))]
    (whole,) = assess(vit(), [batch]).models
    for name, finding in some.findings.items():
        np.testing.assert_array_equal(finding.mean, whole.findings[name].mean)
    (weights,) = assess(vit(), [batch], metrics=["weight.spectrum", "weight.spectrum"]).models
    assert list(weights.findings) == ["weight.spectrum"]
    message = refusal(vit(), [batch], metrics=["patch.cosin"])
    assert message.startswith("--metrics patch.cosin: there is no such metric or level. Did you mean patch.cosine")


# ------------------------------------------------------------------------------------------------------------
# Regularizers as metrics


SPECS = ["patch.cosine@all", "patch.so@first,1", "patch.contrastive", "patch.cosine_cross:abs@0:1", "attn.so@0"]
SPECS += ["attn.mhs@all", "attn.cosine_cross@0:last", "weight.so", "weight.pairwise_cosine:fc1,fc2@0-1"]


@pytest.fixture(scope="module")
def measured(batch) -> dict[str, Finding]:
    loader = zip(*(part.split([7, 30, 38]) for part in batch), strict=True)
    (assessed,) = assess(vit(torch.float64), loader, metrics=["output"], measures=SPECS).models
    return assessed.findings


@pytest.mark.parametrize("spec", SPECS)
def test_layers_of_a_regularizer_add_up_to_its_term(spec: str, measured: dict[str, Finding], batch) -> None:
    """That of the whole batch, which is a mean over images."""
    model = vit(torch.float64)
    diversity = Diversity([parse_spec(f"{spec}=1")], DEPTH)
    wrapped = DiverseViT(model, Needs(**diversity.needs))
    with torch.no_grad():
        ((name, term),) = diversity(wrapped(batch[0]), wrapped.weights).items()
    close(measured[name].mean.sum(), float(term.value))
    close(measured[name].summary, measured[name].mean.mean())


def test_a_regularizer_is_its_function_of_each_layer(measured: dict[str, Finding], batch) -> None:
    shown = shown_by(vit(torch.float64), *batch)
    x, a = shown.patches, {block: maps[:, 0].flatten(2) for block, maps in shown.maps.items()}
    expected: dict[str, list[Tensor]] = {
        "patch.cosine@all": [measures.cosine(x[layer]) for layer in range(DEPTH)],
        "patch.so@first,1": [measures.so(x[layer], normalize=True) for layer in (-1, 1)],
        "patch.contrastive@first:last": [measures.contrastive(x[-1], x[2])],
        "patch.cosine_cross:abs@0:1": [measures.cosine_cross(x[0], x[1], absolute=True)],
        "attn.so@0": [measures.so(a[0])],
    }
    for name, values in expected.items():
        close(measured[name].mean, [float(value) for value in values])
    labels = {name: finding.axes[0].labels for name, finding in measured.items() if finding.axes}
    assert labels["patch.so@first,1"] == ("input", "1")
    assert labels["patch.contrastive@first:last"] == ("input:2",)


def test_random_probes_do_not_depend_on_the_batches(batch) -> None:
    """CNO's are drawn for each image by its place, and for each matrix by its block."""
    images = batch[0][:1].repeat(9, 1, 1, 1)
    found, vits = [], [vit(torch.float64), vit(torch.float64)]
    for seed, sizes in enumerate(([9], [2, 6, 1])):
        torch.manual_seed(seed)
        specs = ["patch.cno@all", "weight.cno"]
        (model,) = assess(vits[seed], images.split(sizes), metrics=["output"], measures=specs).models
        found.append(model.findings)
    assert len(set(found[0]["patch.cno@all"].per_image.tolist())) == 9  # of the same image
    for name in ("patch.cno@all", "weight.cno@all"):
        close(found[0][name].mean, found[1][name].mean)
    (late,) = assess(
        vit(torch.float64), [images[4:]], metrics=["output"], measures=["patch.cno@all"], first=4
    ).models
    assert late.findings["patch.cno@all"].per_image is not None
    close(late.findings["patch.cno@all"].per_image, found[0]["patch.cno@all"].per_image[4:])  # type: ignore[index]
    block = vit(torch.float64).blocks[1]
    torch.manual_seed(1)
    q = block.attn.qkv.weight.chunk(3)[0].detach()
    expected = measures.cno(q[None], distribution="uniform", eps=0.0)
    close(found[0]["weight.cno@all"].mean[1, 0], float(expected))


def test_regularizers_that_a_model_does_not_have() -> None:
    images, labels = random_batch(4)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=12, depths=(1, 1), num_heads=(2, 4), window_size=4
    )
    (assessed,) = assess(
        swin, [images], metrics=["patch.cosine"], measures=["patch.contrastive", "weight.so"]
    ).models
    assert "weight.so@all" in assessed.findings
    assert assessed.gaps["patch.contrastive@first:last"].startswith(
        "patch.contrastive@first:last: layers input and 1 cannot be compared"
    )
    specs = {"patch.cosine@7": "layer 7 is out of range", "patch.cosin": "Did you mean patch.cosine"}
    specs |= {"patch.cosine=1": "malformed", "patch.mixing": "depends on the training labels"}
    for spec, said in specs.items():
        assert said in refusal(vit(), [(images, labels)], measures=[spec])


def test_blocks_whose_map_cannot_be_seen() -> None:
    model = vit()
    model.blocks[1].attn.attn_drop = None
    images, labels = random_batch(4)
    (assessed,) = assess(model, [(images, labels)], measures=["attn.cosine@all", "attn.cosine@0"]).models
    assert assessed.findings["attn.entropy"].axes[0].labels == ("0", "2")
    assert assessed.findings["attn.cosine@0"].mean.shape == (1,)
    said = "attn.cosine@all: VisionTransformer shows no attention of layer 1"
    assert assessed.gaps == {"attn.cosine@all": said}


@pytest.mark.parametrize("patch_size", [(4, 16), (16, 8)])
def test_patches_that_are_not_square(patch_size: tuple[int, int]) -> None:
    images, labels = random_batch(4)
    grid = 32 // patch_size[0], 32 // patch_size[1]
    (assessed,) = assess(vit(torch.float64, patch_size=patch_size), [(images.double(), labels)]).models
    shown = shown_by(vit(torch.float64, patch_size=patch_size), images.double(), labels)
    seen = as_seen(replace(shown, places={block: Place(1, (32, 32), grid) for block in range(DEPTH)}))
    expected = of_images("attn.distance", "maps and place", seen)
    close(assessed.findings["attn.distance"].mean, expected.mean(axis=0))
    assert [example.grid for example in assessed.examples] == [grid] * 2
