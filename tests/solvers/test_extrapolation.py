"""Which states enter a window, as factors of what is there already."""

from __future__ import annotations

import numpy as np
import pytest

import parataxis as px
from parataxis.solvers import extrapolation
from parataxis.solvers.tables import Tables

STEPS, WIDTH, COUNT = 20, 6, 3


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_entering_states_follow_from_outputs_on_a_line(name):
    """Outputs that lie on a straight line of the steps are continued without an error, with their history."""
    local = px.SAMPLERS[name](steps=STEPS).coefficients
    lags, lo, hi = local.lags, 4, 4 + WIDTH
    outputs = 2.0 - 0.3 * np.arange(STEPS)
    x = np.ones(STEPS + 1)
    for i in range(STEPS):
        terms = [local.output_weight[i, lag] * outputs[i - lag] for lag in range(min(i, lags) + 1)]
        x[i + 1] = local.state_weight[i] * x[i] + sum(terms)
    tables, tail = Tables.of(local, WIDTH), extrapolation.HISTORY + lags
    factors = extrapolation.line(tables, np.array([lo]), np.array([hi]), WIDTH, COUNT, tail)[0]
    rows = np.zeros(tail)
    late = hi - 1
    rows[extrapolation.HI], rows[extrapolation.LATE] = x[hi], outputs[late]
    rows[extrapolation.EARLY] = outputs[max(lo, late - WIDTH // 2)]
    assert factors @ rows == pytest.approx(x[hi + 1 : hi + 1 + COUNT])
