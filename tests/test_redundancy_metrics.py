"""Every metric of redundancy/ against tests/naive_metrics.py, and against what its docstring promises."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from naive_metrics import NAIVE, as_seen, of_images, summarised
from shown_batch import IMAGES, a_batch, accumulated, normal, value
from torch import Tensor

import redundancy.assessment  # noqa: F401  (registers all metrics)
from redundancy.metrics.patches import hsic, ratio_of_means
from redundancy.metrics.registry import LEVELS, METRICS, SECTIONS, Metric, metric
from redundancy.metrics.shown import Place, Shown
from redundancy.metrics.values import values_of
from redundancy.metrics.weights import Weight

of_images_alone = [each for each in METRICS.values() if each.takes not in ("weight", "set")]
of_weights = [each for each in METRICS.values() if each.takes == "weight"]
of_sets = [each for each in METRICS.values() if each.takes == "set"]


def by_name(metrics: list[Metric]):
    return pytest.mark.parametrize("metric", metrics, ids=[each.name for each in metrics])


def every_dtype():
    return pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# ------------------------------------------------------------------------------------------------------------
# Equations


def test_every_metric_has_an_independent_computation() -> None:
    assert NAIVE.keys() == METRICS.keys()
    assert {each.level for each in METRICS.values()} == LEVELS.keys()


@every_dtype()
@by_name(of_images_alone)
def test_numbers_of_images(metric: Metric, dtype: torch.dtype) -> None:
    shown = a_batch(dtype)
    found = values_of(metric, shown)
    expected = of_images(metric.name, metric.takes, as_seen(shown))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert expected.shape == tuple(found.shape)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert np.nanstd(expected) > 0, "the example does not put the metric to the test"


@every_dtype()
@by_name(of_sets)
def test_numbers_of_all_images(metric: Metric, dtype: torch.dtype) -> None:
    shown = a_batch(dtype)
    finding = accumulated(metric, shown).finding()
    expected = NAIVE[metric.name](as_seen(shown))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    if metric.name == "output.knn":
        assert finding.per_image is not None
        assert 0 < expected.mean() < 100
        assert finding.per_image.tolist() == expected.tolist()
        expected = expected.mean(), expected.std(ddof=1) / math.sqrt(IMAGES)
    mean, error = expected if isinstance(expected, tuple) else (expected, np.full_like(expected, np.nan))
    np.testing.assert_allclose(finding.mean, mean, rtol=tolerance, atol=tolerance)
    assert finding.error is not None
    np.testing.assert_allclose(finding.error, error, rtol=1e-4, atol=1e-7)
    assert finding.count == IMAGES


@every_dtype()
@pytest.mark.parametrize("shape", [(7, 12, 12), (12, 7, 7), (10, 8, 3)], ids=["wide", "tall", "rank 3"])
@by_name(of_weights)
def test_numbers_of_weights(metric: Metric, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, d, rank = shape
    matrix = normal(n, d, dtype=dtype) if rank == min(n, d) else normal(n, rank) @ normal(rank, d, seed=1)
    found = metric.function(Weight(matrix.to(dtype)))
    np.testing.assert_allclose(found, NAIVE[metric.name](matrix.to(dtype).double().numpy()), rtol=1e-6, atol=1e-6)


@by_name([each for each in METRICS.values() if each.summary not in ("value", "none")])
def test_the_number_that_stands_for_all(metric: Metric) -> None:
    axes = 2 if metric.takes == "weight" or metric.summary == "pairs" else 1
    values = normal(*[3] * axes).numpy()
    values[..., 0] = np.nan  # the input of another shape, a block without such a matrix
    assert metric.summarised(values) == pytest.approx(summarised(metric.summary, values))
    assert np.isnan(metric.summarised(np.full_like(values, np.nan)))


def test_a_metric_says_how_its_number_is_made() -> None:
    for each in METRICS.values():
        assert each.text.title and each.text.equation and each.label, each.name
        assert list(each.text.sections) == list(SECTIONS), each.name
    for docstring in (None, "A title.", "A title.\n\n    M = 1\n\nWhere: here.\nRange: [0, 1]."):
        function = lambda x: x  # noqa: E731
        function.__doc__ = docstring
        with pytest.raises(ValueError, match="lacks"):
            metric("patch.new", takes="patches", label="", summary="last")(function)
    with pytest.raises(ValueError, match="taken"):
        metric("patch.cosine", takes="patches", label="", summary="last")(METRICS["patch.cosine"].function)
    assert "patch.new" not in METRICS


# ------------------------------------------------------------------------------------------------------------
# Closed forms: patches


@every_dtype()
def test_identical_patches(dtype: torch.dtype) -> None:
    x = normal(2, 1, 5, dtype=dtype).expand(2, 9, 5)
    for name in ("cosine_abs", "cosine", "mean_energy", "effective_rank", "norm_ratio"):
        assert value(f"patch.{name}", x) == pytest.approx([1, 1], abs=1e-5), name
    assert value("patch.norm_outliers", x) == [0, 0]


def test_opposite_halves() -> None:
    """Only the signed cosine tells them from identical patches."""
    one = normal(1, 1, 5)
    x = torch.cat([one.expand(1, 4, 5), -one.expand(1, 4, 5)], dim=1)
    assert value("patch.cosine_abs", x) == pytest.approx([1])
    assert value("patch.cosine", x) == pytest.approx([-1 / 7])
    assert value("patch.mean_energy", x) == pytest.approx([0], abs=1e-12)
    assert value("patch.effective_rank", x) == pytest.approx([1])


def test_orthogonal_patches() -> None:
    x = 3 * torch.linalg.qr(normal(6, 6)).Q[None]
    assert value("patch.cosine_abs", x) == pytest.approx([0], abs=1e-12)
    assert value("patch.cosine", x) == pytest.approx([0], abs=1e-12)
    assert value("patch.mean_energy", x) == pytest.approx([1 / 6])
    assert value("patch.effective_rank", x) == pytest.approx([6])


def test_signed_cosine_is_what_training_minimises() -> None:
    from regularizers.measures import cosine

    x = normal(1, 9, 5)
    (found,) = value("patch.cosine", x)
    assert float(cosine(x)) == pytest.approx((8 * found + 1) / 9)


def test_a_long_patch_stands_out() -> None:
    lengths = torch.tensor([1, 1, 1, 3.0, 3.01, 1, 1, 1], dtype=torch.float64)
    x = torch.diag(lengths)[None]
    assert value("patch.norm_outliers", x) == [1 / 8]  # 3 is not more than 3
    assert value("patch.norm_ratio", x) == pytest.approx([3.01])


def test_patches_like_the_input() -> None:
    x = normal(2, 6, 5)
    assert value("patch.to_input", 2 * x, x) == pytest.approx([1, 1])
    assert value("patch.to_input", -x, x) == pytest.approx([-1, -1])
    found = METRICS["patch.by_patch"].function([x, 3 * x, -x])
    expected = torch.tensor([[1, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected.expand(2, 3, 3))
    zeros = torch.zeros_like(x)
    assert np.isnan(value("patch.to_input", x, zeros)).all() and np.isnan(value("patch.to_input", zeros, x)).all()
    found = METRICS["patch.by_patch"].function([zeros, x])
    assert found.isnan().tolist() == [[[True, True], [True, False]]] * 2


def test_rankme_of_orthogonal_and_of_equal_representations() -> None:
    orthogonal = torch.linalg.qr(normal(6, 6)).Q[:, None]  # [N, 1, D]
    shown = Shown((8, 8), {-1: orthogonal, 0: orthogonal[:1].expand(6, 1, 6)}, {}, {}, torch.zeros(6, 2))
    found = accumulated(METRICS["patch.rankme"], shown).finding().mean
    np.testing.assert_allclose(found, [6, 1], rtol=1e-4)  # 1e-7 is added to every share


def test_rankme_does_not_keep_all_rows() -> None:
    rows = normal(1, 100, 5)
    shown = Shown((8, 8), {0: rows.mT.reshape(100, 1, 5)}, {}, {}, torch.zeros(100, 2))
    accumulator = accumulated(METRICS["patch.rankme"], *[some_layers(shown, i) for i in range(100)])
    assert len(accumulator.layers[0].rows) <= 15  # type: ignore[attr-defined]
    whole = accumulated(METRICS["patch.rankme"], shown).finding().mean
    np.testing.assert_allclose(accumulator.finding().mean, whole, rtol=1e-10)


def some_layers(shown: Shown, image: int) -> Shown:
    patches = {layer: x[image : image + 1] for layer, x in shown.patches.items()}
    return replace(shown, patches=patches, logits=shown.logits[:1])


# ------------------------------------------------------------------------------------------------------------
# Closed forms: CKA


def cka(*layers: Tensor) -> np.ndarray:
    return ratio_of_means([hsic(layers)], [len(layers[0])], len(layers))[0]


def test_hsic_is_the_mean_over_all_choices_of_four_images() -> None:
    x, y = normal(6, 4), normal(6, 3, seed=1) + 1
    k, m = x @ x.T, y @ y.T
    choices = list(permutations(range(6), 4))
    terms = [k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q] for i, j, q, r in choices]
    assert hsic([x, y])[0, 1] == pytest.approx(float(sum(terms)) / len(choices))


@every_dtype()
@pytest.mark.parametrize("images", [4, 5, 32])
def test_cka_does_not_see_rotation_scale_and_shift(images: int, dtype: torch.dtype) -> None:
    x = normal(images, 24, dtype=dtype)
    rotated = x @ torch.linalg.qr(normal(24, 24)).Q.to(dtype)
    found = cka(x, x.clone(), 7 * rotated, x + 2, torch.cat([x, torch.zeros_like(x)], dim=1))
    np.testing.assert_allclose(found, 1, atol=1e-5)


@pytest.mark.parametrize("images", [4, 5, 6, 8])
def test_cka_of_independent_representations_is_zero_on_average(images: int) -> None:
    drawn = np.array([cka(normal(images, 50, seed=2 * i), normal(images, 50, seed=2 * i + 1)) for i in range(400)])
    assert not np.isnan(drawn).any()
    values = drawn[:, 0, 1]
    assert abs(values.mean()) < 4 * values.std(ddof=1) / math.sqrt(len(values))
    assert 0.02 < values.std() / math.sqrt(len(values)) * 4 < 0.3  # so that a biased estimate would fail:
    biased = []
    for i in range(20):
        x, y = (a - a.mean(dim=0) for a in (normal(images, 50, seed=2 * i), normal(images, 50, seed=2 * i + 1)))
        k, m = x @ x.T, y @ y.T
        biased.append(float((k * m).sum() / (k.norm() * m.norm())))
    assert np.mean(biased) > 0.5


@every_dtype()
@pytest.mark.parametrize("images", range(4, 36))
def test_cka_of_equal_images_is_undefined(images: int, dtype: torch.dtype) -> None:
    """Though the mean of equal numbers is not always that number."""
    equal = normal(1, 300, dtype=dtype).expand(images, 300)
    other = normal(images, 300, seed=1, dtype=dtype)
    found = cka(equal, other)
    assert found[1, 1] == pytest.approx(1)
    assert np.isnan(found[[0, 0, 1], [0, 1, 0]]).all()


# ------------------------------------------------------------------------------------------------------------
# Closed forms: attention


def test_heads_at_right_angles_and_alike() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    shifted = torch.stack([eye.roll(by, dims=1) for by in range(3)])[None, None]  # [1, 1, 3, 4, 4]
    alike = eye.expand(1, 1, 3, 4, 4)
    assert value("attn.cosine_abs", shifted) == [0]
    assert value("attn.cosine_abs", alike) == pytest.approx([1])
    found = METRICS["attn.across"].function([shifted, alike, shifted])[0]
    third = 1 / 3  # the first of the three heads
    expected = [[0, third, third], [third, 1, third], [third, third, 0]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_uniform_attention() -> None:
    a = torch.full((1, 2, 3, 4, 5), 1 / 5, dtype=torch.float64)
    assert value("attn.entropy", a) == pytest.approx([math.log(5)])
    assert value("attn.std", a) == pytest.approx([0])
    assert value("attn.to_uniform", a) == pytest.approx([0])


def test_attention_to_one_key() -> None:
    a = torch.eye(4, dtype=torch.float64).expand(1, 1, 2, 4, 4)
    place = Place(0, (8, 24), (2, 2))
    assert value("attn.entropy", a) == [0]
    assert value("attn.to_uniform", a) == pytest.approx([3 / 4])
    assert value("attn.std", a) == pytest.approx([math.sqrt(3) / 4])
    assert value("attn.distance", a, place) == [0]
    across = torch.eye(4, dtype=torch.float64).roll(1, dims=1)  # 0 looks at 1, 1 at 2, 2 at 3, 3 at 0
    assert value("attn.distance", across.expand(1, 1, 2, 4, 4), place) == pytest.approx(
        [(12 + math.hypot(4, 12) + 12 + math.hypot(4, 12)) / 4]
    )


FROM_A_CORNER = 4 + 12 + math.hypot(4, 12)  # to the others of 2 x 2 patches of 4 x 12 pixels, together


def test_mean_distance_by_hand() -> None:
    uniform = torch.full((1, 1, 1, 4, 4), 1 / 4, dtype=torch.float64)
    assert value("attn.distance", uniform, Place(0, (8, 24), (2, 2))) == pytest.approx([FROM_A_CORNER / 4])
    prefixed = torch.full((1, 1, 1, 6, 6), 1 / 6, dtype=torch.float64)
    prefixed[..., :2] = 1 / 3  # what prefix tokens get does not count, nor does where they look
    assert value("attn.distance", prefixed, Place(2, (8, 24), (2, 2))) == pytest.approx([FROM_A_CORNER / 4])
    windows = torch.full((1, 6, 1, 4, 4), 1 / 4, dtype=torch.float64)  # in 4 x 6 patches of 4 x 12 pixels
    assert value("attn.distance", windows, Place(0, (16, 72), (4, 6))) == pytest.approx([FROM_A_CORNER / 4])
    reduced = torch.ones(1, 1, 1, 4, 1, dtype=torch.float64)  # the one key in the middle
    found = value("attn.distance", reduced, Place(0, (8, 24), (2, 2)))
    assert found == pytest.approx([math.hypot(2, 6)])


def test_distances_that_do_not_exist() -> None:
    uniform = torch.full((2, 1, 1, 4, 4), 1 / 4, dtype=torch.float64)
    for place in (Place(0, (8, 8), None), Place(0, (8, 8), (3, 3)), Place(1, (8, 8), (2, 2))):
        assert np.isnan(value("attn.distance", uniform, place)).all()
    uniform[1, 0, 0, 0] = torch.tensor([-0.5, 0.5, 0.5, 0.5])  # of this image alone
    found = value("attn.distance", uniform, Place(0, (8, 8), (2, 2)))
    assert np.isnan(found).tolist() == [False, True]
    assert np.isnan(value("attn.entropy", uniform)).tolist() == [False, True]


# ------------------------------------------------------------------------------------------------------------
# Closed forms: weights and output


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_weights_of_low_rank(rank: int) -> None:
    matrix = normal(12, rank) @ normal(rank, 9, seed=1)
    errors = value("weight.reconstruction", Weight(matrix))
    assert errors[0] == 1 and errors[rank] == pytest.approx(0, abs=1e-7)
    assert min(errors[:rank]) > 1e-3
    assert value("weight.rank_99", Weight(matrix))[0] <= rank
    assert value("weight.rank_90", Weight(matrix)) <= value("weight.rank_95", Weight(matrix))
    assert np.isnan(value("weight.condition", Weight(matrix))).all()


def test_weights_that_are_orthogonal() -> None:
    eye = Weight(3 * torch.eye(7))
    assert value("weight.cosine_abs", eye) == [0]
    assert value("weight.condition", eye) == pytest.approx([1])
    assert value("weight.stable_rank", eye) == pytest.approx([7])
    assert value("weight.spectrum", eye) == pytest.approx([1] * 7)
    assert value("weight.rank_99", eye) == [6]  # centred: the last direction is that of the mean
    expected = [math.sqrt(1 - k / 6) for k in range(7)] + [0]
    assert value("weight.reconstruction", eye) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("rows", [2, 3, 5, 6, 7, 11])
def test_equal_rows(rows: int) -> None:
    """Though the mean of equal numbers is not always that number."""
    equal = Weight(normal(1, 7).expand(rows, 7))
    assert value("weight.cosine_abs", equal) == pytest.approx([1])
    assert value("weight.stable_rank", equal) == pytest.approx([1])
    for name in ("reconstruction", "rank_90", "rank_95", "rank_99", "condition"):
        assert np.isnan(value(f"weight.{name}", equal)).all(), name


def test_a_confident_model_is_calibrated_where_it_is_right() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    sure = 100 * torch.nn.functional.one_hot(labels, 3).double()
    for right, expected in ((4, 0.0), (3, 0.25), (0, 1.0)):
        answers = torch.where(torch.arange(4) < right, labels, (labels + 1) % 3)
        shown = Shown((8, 8), {}, {}, {}, sure, labels=answers)
        assert accumulated(METRICS["output.calibration"], shown).finding().mean == pytest.approx(expected)
    even = Shown((8, 8), {}, {}, {}, torch.zeros(4, 2).double(), labels=torch.tensor([0, 1, 1, 1]))
    assert accumulated(METRICS["output.calibration"], even).finding().mean == pytest.approx(0.25)


def test_calibration_of_a_confidence_between_two_bins() -> None:
    """1/3 = 5/15 belongs to the lower one; in one bin with 0.34, right and wrong would make up for each other."""
    logits = torch.tensor([[0.0, 0, 0], [0.03, 0, 0]], dtype=torch.float64)
    shown = Shown((8, 8), {}, {}, {}, logits, labels=torch.tensor([0, 1]))
    confidence = float(logits[1].softmax(dim=0).max())
    expected = (2 / 3 + confidence) / 2
    assert accumulated(METRICS["output.calibration"], shown).finding().mean == pytest.approx(expected)


def test_no_image_is_its_own_neighbour() -> None:
    features = torch.tensor([[1.0, 0], [-1, 0.1], [-1, -0.1]])
    shown = Shown((8, 8), {}, {}, {}, normal(3, 2), features, labels=torch.tensor([0, 1, 1]))
    assert accumulated(METRICS["output.knn"], shown).finding().per_image.tolist() == [0, 100, 100]


def test_neighbours_of_many_images() -> None:
    labels = torch.arange(1100) % 2
    features = torch.nn.functional.one_hot(labels) + 0.01 * normal(1100, 2)
    shown = Shown((8, 8), {}, {}, {}, normal(1100, 2), features, labels=labels)
    finding = accumulated(METRICS["output.knn"], shown).finding()
    assert finding.per_image.tolist() == [100] * 1100 and finding.count == 1100


def test_top5_of_three_classes() -> None:
    shown = Shown((8, 8), {}, {}, {}, normal(4, 3), labels=torch.tensor([0, 1, 2, 0]))
    assert value("output.top5", shown) == [100] * 4
