"""Means with their intervals."""

import math

import numpy as np
import pytest

from paxo.evaluation.estimates import Estimate, bootstrap_mean


def test_the_interval_is_that_of_the_normal_law_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert found.value == values.mean()
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found.count == 4000


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    truth, sets = 0.7, 200
    held = 0
    for _ in range(sets):
        found = bootstrap_mean(rng.binomial(1, truth, 80))
        held += found.low <= truth <= found.high
    # 200 draws of a share of 0.95 deviate by 0.015; percentile intervals are a little narrow.
    assert 0.90 <= held / sets <= 0.99


def test_another_level_gives_another_width():
    values = np.arange(50.0)
    narrow, wide = bootstrap_mean(values, level=0.5), bootstrap_mean(values, level=0.99)
    # Quantiles of the normal law: 0.674 against 2.576 standard errors.
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(2.576 / 0.674, rel=0.1)


def test_the_same_values_give_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(2).random(30)
    assert bootstrap_mean(values) == bootstrap_mean(values.copy())
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25, 0.25]])
def test_values_that_do_not_differ_have_an_interval_of_no_width(values):
    assert bootstrap_mean(np.array(values)) == Estimate(0.25, 0.25, 0.25, len(values))


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_mean(np.array([]))


def test_an_estimate_reads_as_mean_and_interval():
    assert str(Estimate(0.5, 0.4375, 0.5625, 64)) == "0.500 [0.438, 0.562]"
