"""Summaries of a report, and their standard errors, against scipy's tests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from assessed import single
from scipy import stats

from redundancy.finding import Axis, Finding
from redundancy.presentation import compare

NAN = float("nan")
LAYERS = Axis("layer", ("input", "0", "1"))


def seeds(values):
    return [Finding((), np.array(value), summary=value, summary_error=0.5, count=9) for value in values]


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return rng.normal(1, 1, 20), rng.normal(1.5, 2, 20)


def test_models_on_the_same_images_are_compared_by_a_paired_t_test(numbers):
    a, b = numbers
    found = compare.difference([single(b)], [single(a)])
    test = stats.ttest_rel(b, a)
    assert found.basis == "images" and found.size == 20
    assert found.value / found.error == pytest.approx(test.statistic)
    assert found.value == pytest.approx(b.mean() - a.mean())


def test_images_without_a_number_in_either_are_left_out(numbers):
    a, b = (each.copy() for each in numbers)
    a[3], b[5], b[6] = NAN, NAN, NAN
    found = compare.difference([single(b)], [single(a)])
    test = stats.ttest_rel(b, a, nan_policy="omit")
    assert found.size == 17
    assert found.value / found.error == pytest.approx(test.statistic)


@pytest.mark.parametrize("other", ["no numbers of images", "another number of images"])
def test_models_on_other_images_are_compared_by_welchs_t_test(numbers, other):
    a, b = numbers
    b = b[:12] if other == "another number of images" else b
    found = compare.difference([single(b, paired=len(b) != len(a))], [single(a)])
    assert found.basis == "unpaired"
    assert found.value / found.error == pytest.approx(stats.ttest_ind(b, a, equal_var=False).statistic)


def test_seeds_are_compared_by_welchs_t_test():
    a, b = [0.1, 0.3, 0.2], [0.5, 0.4, 0.6, 0.7]
    found = compare.difference(seeds(b), seeds(a))
    assert found.basis == "seeds"
    assert found.value / found.error == pytest.approx(stats.ttest_ind(b, a, equal_var=False).statistic)
    assert compare.estimate(seeds(a)) == pytest.approx((0.2, stats.sem(a), 3, "seeds"))


def test_clear_is_more_than_two_standard_errors():
    found = {value: compare.Estimate(value, 1.0, 9, "images").clear for value in (1.9, 2.1, -1.9, -2.1, NAN)}
    assert list(found.values()) == [False, True, False, True, False]
    assert not compare.Estimate(5.0, NAN, 9, "").clear


def test_one_model_against_seeds_has_no_error(numbers):
    found = compare.difference([single(numbers[0])], seeds([0.1, 0.2]))
    assert found.value == pytest.approx(numbers[0].mean() - 0.15)
    assert math.isnan(found.error) and found.basis == "" and not found.clear


def test_weights_of_one_model_have_no_error():
    a, b = (Finding((), np.array(value), summary=value) for value in (1.0, 3.0))
    assert compare.estimate([a])[2:] == (0, "")
    found = compare.difference([b], [a])
    assert found.value == 2 and math.isnan(found.error)


def test_a_seed_without_a_number_leaves_none_of_its_label():
    found = compare.estimate([*seeds([1.0, 2.0]), *seeds([NAN])])
    assert math.isnan(found.value) and math.isnan(found.error) and found.basis == ""
    assert math.isnan(compare.estimate([*seeds([1.0]), *seeds([NAN])]).value)
    assert math.isnan(compare.difference(seeds([1.0, NAN]), seeds([1.0])).value)
    assert math.isnan(compare.estimate(seeds([NAN])).value)
    assert math.isnan(compare.estimate([]).value)
    assert math.isnan(compare.difference(seeds([1.0]), []).value)


def test_a_curve_is_the_mean_of_seeds_with_their_standard_deviation():
    values = np.array([[1, 2, NAN], [3, np.inf, NAN], [8, 6, NAN]])
    found = compare.curve([Finding((LAYERS,), each, np.ones(3)) for each in values])
    np.testing.assert_allclose(found.mean, [4, 4, NAN])
    np.testing.assert_allclose(found.spread, [np.std([1, 3, 8], ddof=1), np.std([2, 6], ddof=1), NAN])
    assert found.seeds == 3


def test_a_curve_of_one_model_has_its_error_over_images():
    finding = Finding((LAYERS,), np.arange(3.0), np.array([0.1, NAN, 0.2]))
    np.testing.assert_array_equal(compare.curve([finding]).spread, finding.error)
    assert np.isnan(compare.curve([replace(finding, error=None)]).spread).all()


def test_images_are_paired_only_if_they_are_the_same():
    def single(images, seed):
        values = np.random.default_rng(seed).random(9)
        error = values.std(ddof=1) / 3
        return Finding((), np.array(values.mean()), np.array(error), 9, values.mean(), error, values, images)

    one, other, unknown = np.arange(9), np.arange(9)[::-1], None
    for images, basis in ((one, "images"), (other, "unpaired"), (unknown, "images")):
        assert compare.difference([single(images, 1)], [single(one, 2)]).basis == basis


def test_rounding_is_no_difference():
    assert (
        compare.difference(
            [Finding((), np.array(0.3), summary=0.1 + 0.2)], [Finding((), np.array(0.3), summary=0.3)]
        )[0]
        == 0
    )
