"""Where a metric is undefined: a stated gap, never a warning, and no NaN in the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, random_batch
from shown_batch import a_batch, accumulated, normal, some_images, value
from torch import Tensor, nn

from redundancy import Report, assess
from redundancy.metrics.registry import METRICS
from redundancy.metrics.shown import Shown
from redundancy.metrics.values import values_of
from redundancy.metrics.weights import Weight

of_weights = [each for each in METRICS.values() if each.takes == "weight"]


# ------------------------------------------------------------------------------------------------------------
# Single metrics


def undefined(shown: Shown) -> set[str]:
    """The metrics that have no number at all; none of the others may have one that is not finite."""
    found = set()
    for each in METRICS.values():
        if each.takes == "weight":
            continue
        mean = accumulated(each, shown).finding().mean if each.takes == "set" else values_of(each, shown)
        numbers = np.asarray(mean)
        assert not np.isinf(numbers).any(), each.name
        if np.isnan(numbers).all():
            found.add(each.name)
    return found


def test_what_is_undefined() -> None:
    """As the docstrings say; warnings are errors."""
    shown = replace(a_batch(), patches={layer: x for layer, x in a_batch().patches.items() if layer < 1})
    assert undefined(shown) == set()
    one_patch = {layer: x[:, :1] for layer, x in shown.patches.items()}
    assert undefined(replace(shown, patches=one_patch)) == {"patch.cosine_abs", "patch.cosine"}
    zeros = {layer: torch.zeros_like(x) for layer, x in shown.patches.items()}
    of_patches = {name for name in METRICS if name.startswith("patch.")}
    assert undefined(replace(shown, patches=zeros)) == of_patches
    one_head = {block: a[:, :, :1] for block, a in shown.maps.items()}
    assert undefined(replace(shown, maps=one_head)) == {"attn.cosine_abs"}
    assert undefined(some_images(shown, range(1))) == {"patch.cka", "output.knn"}
    no_keys = {block: a[..., :1] / a[..., :1] for block, a in shown.maps.items()}
    assert undefined(replace(shown, maps=no_keys)) == {"attn.distance"}


def test_numbers_that_are_not_finite_are_gaps() -> None:
    shown = a_batch()
    assert shown.features is not None and shown.patch_logits is not None
    broken = {
        "logits": {"output.top1", "output.top5", "output.calibration"},
        "features": {"output.knn"},
        "patch_logits": {"output.patch_accuracy"},
    }
    for name, expected in broken.items():
        assert undefined(replace(shown, **{name: getattr(shown, name) * math.nan})) == expected
    for number in (math.nan, math.inf):
        patches = {layer: x.clone() for layer, x in shown.patches.items()}
        for x in patches.values():
            x[:, 0, 0] = number
        found = undefined(replace(shown, patches=patches))
        assert found == {name for name in METRICS if name.startswith("patch.")}
        weight = Weight(torch.full((3, 4), number))
        for each in of_weights:
            assert np.isnan(each.function(weight)).all(), each.name


def test_weights_of_zero_or_of_one_row() -> None:
    zeros, row, column = Weight(torch.zeros(4, 6)), Weight(normal(1, 6)), Weight(normal(6, 1))
    for each in of_weights:
        assert np.isnan(each.function(zeros)).all(), each.name
        assert not np.isinf(each.function(column)).any(), each.name
    gaps = {each.name for each in of_weights if np.isnan(each.function(row)).all()}
    centred = {"weight.reconstruction", "weight.rank_90", "weight.rank_95", "weight.rank_99"}
    assert gaps == {"weight.cosine_abs"} | centred
    assert value("weight.condition", row) == pytest.approx([1])
    assert value("weight.cosine_abs", column) == pytest.approx([1])


# ------------------------------------------------------------------------------------------------------------
# Whole reports


def vit(change: Callable[[Any], None] = lambda model: None, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **arguments})
    with torch.no_grad():
        change(model)
    return model


def without_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def with_position_alone(model: Any) -> None:
    without_weights(model)
    model.pos_embed.normal_()


def filled_with(number: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.fill_(number)

    return change


def with_a_broken_head(model: Any) -> None:
    model.head.weight.fill_(math.nan)


def reject(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def gaps_of(model: nn.Module, *batch: Tensor) -> dict[str, str]:
    """The metrics without any number, and why; the report is as strict JSON as others'."""
    report = assess(model, [batch])
    (assessed,) = json.loads(report.to_json(), parse_constant=reject)["models"]
    assert assessed["gaps"].keys() | assessed["findings"].keys() == METRICS.keys()
    for name, finding in assessed["findings"].items():
        assert (name in assessed["gaps"]) == (not numbers_in(finding["mean"])), name
        no_pairs = METRICS[name].summary == "pairs" and len(finding["mean"]) == 1
        without_summary = name in assessed["gaps"] or no_pairs or METRICS[name].summary == "none"
        assert (finding["summary"] is None) == without_summary, name
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert all(reason and "\n" not in reason for reason in assessed["gaps"].values())
    return assessed["gaps"]


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for each in value for number in numbers_in(each)]
    return [] if value is None else [value]


def of_level(*levels: str) -> set[str]:
    return {name for name in METRICS if name.partition(".")[0] in levels}


LABELLED = {"output.top1", "output.top5", "output.calibration", "output.knn", "output.patch_accuracy"}
CASES: dict[str, tuple[Any, int, set[str]]] = {
    "a usual model": (vit, 5, set()),
    "one image": (vit, 1, {"patch.cka", "output.knn"}),
    "three images": (vit, 3, {"patch.cka"}),
    "one patch": (lambda: vit(img_size=8), 5, {"patch.cosine_abs", "patch.cosine"}),
    "one head": (lambda: vit(num_heads=1), 5, {"attn.cosine_abs"}),
    "one block": (lambda: vit(depth=1), 5, set()),
    "no weights": (lambda: vit(without_weights), 5, {"output.knn", *of_level("patch", "weight")}),
    "all images alike": (lambda: vit(with_position_alone), 5, {"patch.cka", "output.knn", *of_level("weight")}),
    "not a number": (lambda: vit(filled_with(math.nan)), 5, set(METRICS)),
    "a broken head": (lambda: vit(with_a_broken_head), 5, LABELLED - {"output.knn"}),
}


@pytest.mark.parametrize("case", CASES)
def test_gaps_of_a_report(case: str) -> None:
    make, images, expected = CASES[case]
    model = make()
    pixels = model.patch_embed.img_size[0]
    assert gaps_of(model, *random_batch(images, pixels=pixels)).keys() == expected


@pytest.mark.parametrize("images", [4, 5, 7, 13])
def test_equal_images_have_no_cka(images: int) -> None:
    one, labels = random_batch(1)
    assert gaps_of(vit(), one.expand(images, -1, -1, -1), labels.expand(images)).keys() == {"patch.cka"}


def test_images_without_labels() -> None:
    images, _ = random_batch(5)
    gaps = gaps_of(vit(), images)
    assert gaps == dict.fromkeys(LABELLED, "the images come without labels")


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet18", num_classes=5),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5)),
    ],
    ids=["resnet18", "nn.Sequential"],
)
def test_models_that_are_no_vision_transformers(make: Callable[[], nn.Module]) -> None:
    model = make()
    gaps = gaps_of(model, *random_batch(5))
    without_patches = {"output.patch_accuracy"}
    unseen = set() if hasattr(model, "get_classifier") else {"output.knn"}
    assert gaps.keys() == of_level("patch", "attn", "weight") | without_patches | unseen
    name = type(model).__name__
    assert {gaps[each].partition(":")[0] for each in gaps.keys() - unseen} == {
        f"{name} is not a vision transformer that diversity terms know"
    }


def test_classes_that_are_not_the_datas() -> None:
    report = assess(vit(), [random_batch(5)], classes="the model has 5 classes, the data 3")
    (assessed,) = report.models
    assert assessed.gaps == dict.fromkeys(LABELLED - {"output.knn"}, "the model has 5 classes, the data 3")
