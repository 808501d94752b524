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


def test_copies_keep_the_size_that_is_expected_of_their_state():
    """The last state, in the proportion of expected sizes."""
    local = px.samplers.flow_euler(steps=STEPS).coefficients  # halfway between noise and data states are smallest
    tables, hi = Tables.of(local, WIDTH), 9
    factors = extrapolation.copied(tables, np.array([hi]), COUNT, extrapolation.HISTORY)[0]
    rms = tables.rms[hi : hi + 1 + COUNT]
    assert factors[:, extrapolation.HI] == pytest.approx(rms[1:] / rms[0])
    assert factors[:, extrapolation.HI + 1 :] == pytest.approx(0)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_entering_states_follow_from_a_frozen_prediction(name):
    """Outputs move with the state by the slope that freezes the prediction of the last step; its noise is added."""
    local = px.SAMPLERS[name](steps=STEPS).coefficients
    lags, hi, random = local.lags, 10, np.random.default_rng(0)
    tables = Tables.of(local, WIDTH)
    rows = random.standard_normal(extrapolation.HISTORY + lags + (COUNT + 1 if local.stochastic else 0))
    noise = rows[extrapolation.HISTORY + lags :] if local.stochastic else np.zeros(COUNT + 1)
    outputs = list(rows[extrapolation.HISTORY : extrapolation.HISTORY + lags])  # of the steps before, in their order
    states, x = [], rows[extrapolation.POINT]
    for c in range(COUNT + 1):
        slope = tables.frozen[hi - 1]
        outputs.append(rows[extrapolation.LATE] + slope * (x - rows[extrapolation.LAST_X]))
        terms = [local.output_weight[hi - 1 + c, lag] * outputs[-1 - lag] for lag in range(lags + 1)]
        x = local.state_weight[hi - 1 + c] * x + sum(terms) + noise[c]
        states.append(x)
    factors = extrapolation.frozen(tables, np.array([hi]), COUNT, len(rows))[0]
    assert factors @ rows == pytest.approx(np.array(states[1:]))


def test_outputs_between_nodes_are_on_lines_of_the_data_prediction():
    """In log(alpha / sigma): a prediction that is linear there is found again without an error."""
    local, width = px.samplers.ddim(steps=STEPS).coefficients, 11
    steps = 3 + np.arange(width)[None]
    nodes = (np.arange(width) % 4 == 0)[None] | (np.arange(width) == width - 1)
    place = np.log(local.alpha[:-1] / local.sigma[:-1])[steps[0]]
    x, prediction = np.linspace(1.0, 2.0, width), 0.3 + 0.2 * place
    p, q = local.x0_from_input[steps[0]], local.x0_from_output[steps[0]]
    outputs = (prediction - p * x) / q
    tables, inside = Tables.of(local, width), np.ones((1, width), bool)
    by_output, by_state = extrapolation.between_nodes(nodes, inside, steps, local, tables)
    assert by_output[0] @ np.where(nodes[0], outputs, 0.0) + by_state[0] @ x == pytest.approx(outputs)
