"""Which states enter a window, as factors of what is there already."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parataxis as px
from parataxis.denoisers import mixture
from parataxis.solvers import extrapolation
from parataxis.solvers.tables import Tables

STEPS, WIDTH, COUNT = 20, 6, 3


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_entering_states_follow_from_outputs_on_a_line(name):
    """Outputs that lie on a straight line of the steps are continued without an error, with their history."""
    local = px.SAMPLERS[name](steps=STEPS).coefficients
    lags, lo, hi = local.lags, 4, 4 + WIDTH
    outputs = 2.0 - 0.3 * np.arange(STEPS)
    x = trajectory(local, outputs)
    tables, tail = Tables.of(local, WIDTH), extrapolation.HISTORY + lags
    factors = extrapolation.line(tables, np.array([lo]), np.array([hi]), WIDTH, COUNT, tail)[0]
    assert factors @ tail_of(x, outputs, hi, tail) == pytest.approx(x[hi + 1 : hi + 1 + COUNT])


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("width", [6, 8, 17])
def test_entering_states_follow_from_outputs_on_a_parabola(name, width):
    """With the bend, outputs that lie on a parabola are continued without an error."""
    local = px.SAMPLERS[name](steps=30).coefficients
    lags, hi = local.lags, 20
    outputs = 2.0 - 0.3 * np.arange(30) + 0.02 * np.arange(30) ** 2
    x = trajectory(local, outputs)
    tables, tail = Tables.of(local, width), extrapolation.HISTORY + lags
    factors = extrapolation.line(tables, np.array([hi - width]), np.array([hi]), width, COUNT, tail)[0]
    factors = factors + extrapolation.bend(tables, np.array([hi]), width, COUNT, tail)[0]
    assert factors @ tail_of(x, outputs, hi, tail, width) == pytest.approx(x[hi + 1 : hi + 1 + COUNT])


def trajectory(local, outputs):
    """Return the states that follow from outputs of one element."""
    x = np.ones(len(outputs) + 1)
    for i in range(len(outputs)):
        terms = [local.output_weight[i, lag] * outputs[i - lag] for lag in range(min(i, local.lags) + 1)]
        x[i + 1] = local.state_weight[i] * x[i] + sum(terms)
    return x


def tail_of(x, outputs, hi, tail, width=WIDTH):
    """Return the rows that states enter from."""
    rows, late, span = np.zeros(tail), hi - 1, extrapolation.span(width)
    rows[extrapolation.HI], rows[extrapolation.LATE] = x[hi], outputs[late]
    rows[extrapolation.MIDDLE], rows[extrapolation.EARLY] = outputs[late - span // 2], outputs[late - span]
    return rows


def test_bends_last_on_smooth_outputs_only():
    """A bend that stays counts in full, one that fades less, one that turns round or is not a number not at all."""
    smooth, fading, rough = [[1.0, 1.0], [1.0, 1.0]], [[0.25, 0.5], [0.5, 1.0]], [[1.0, -0.7], [-0.7, 1.0]]
    growing, nothing, overflow = [[9.0, 3.0], [3.0, 1.0]], np.zeros((2, 2)), np.full((2, 2), np.inf)
    products = np.array([smooth, fading, rough, growing, nothing, overflow])
    assert extrapolation.persistence(products).tolist() == [1.0, 0.25, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("window", [4, 8, 16])
def test_smooth_outputs_need_fewer_rounds_than_on_a_line(window, monkeypatch):
    """The exact network of Gaussian mixtures is smooth: what enters on a parabola is nearer to the trajectory."""
    network, noise = mixture(64).network(px.vp()), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def rounds():
        drawn = px.sample(network, noise, px.samplers.ddim(steps=60), px.Secant(window=window), tolerance=1e-2)
        return sum(solution.rounds for solution in drawn)

    on_a_parabola = rounds()
    monkeypatch.setattr(extrapolation, "persistence", lambda products: np.zeros(len(products)))
    assert on_a_parabola < rounds()


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
