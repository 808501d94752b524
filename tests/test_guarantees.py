"""Exact binomial bounds and conformal quantiles, against scipy and by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from parataxis.guarantees import (
    allowed_failures,
    binomial_at_most,
    conformal_quantile,
    failure_bound,
    failure_interval,
)


@pytest.mark.parametrize(("failures", "runs", "chance"), [(0, 59, 0.05), (3, 200, 0.01), (40, 60, 0.7), (5, 5, 0.2)])
def test_binomial_sum_equals_scipy(failures, runs, chance):
    assert binomial_at_most(failures, runs, chance) == pytest.approx(stats.binom.cdf(failures, runs, chance), abs=1e-12)


def test_runs_that_a_coverage_takes():
    """95 % takes 59, 93 and 124 runs with 0, 1 and 2 failures; 99 % takes 299, 473 and 628; one fewer do not do."""
    for coverage, needed in ((0.95, (59, 93, 124)), (0.99, (299, 473, 628))):
        for failures, runs in enumerate(needed):
            assert allowed_failures(runs, coverage, 0.95) == failures
            assert allowed_failures(runs - 1, coverage, 0.95) == failures - 1


@pytest.mark.parametrize(("failures", "runs"), [(0, 20), (1, 59), (17, 200), (199, 200), (200, 200)])
def test_intervals_are_those_of_clopper_and_pearson(failures, runs):
    interval = stats.binomtest(failures, runs).proportion_ci(0.95, "exact")
    assert failure_interval(failures, runs) == pytest.approx((interval.low, interval.high), abs=1e-9)
    bound = 1.0 if failures == runs else stats.beta.ppf(0.9, failures + 1, runs - failures)
    assert failure_bound(failures, runs, 0.9) == pytest.approx(bound, abs=1e-9)


def test_conformal_quantile_covers_and_needs_enough_scores():
    assert conformal_quantile(range(18), 0.95) == math.inf
    assert conformal_quantile(range(19), 0.95) == 18
    assert conformal_quantile(range(99), 0.9) == 89
    scores = np.random.default_rng(0).exponential(size=(4000, 40))
    covered = [scores[row, 39] <= conformal_quantile(scores[row, :39], 0.95) for row in range(4000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)  # exactly 38 / 40
