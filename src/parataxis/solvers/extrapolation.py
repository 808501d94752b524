r"""Which states enter a window, and outputs between those that were evaluated: factors, on the host.

A state that enters a window is a linear combination of rows that are there already, the *tail*:

    [new_hi, new_{hi-1}, u_{hi-1}, f_{hi-1}, f_early | final outputs of the L steps before hi - 1 | noise of the steps
     hi - 1, hi, ..]

``copy``: the last state, in the proportion of expected sizes. ``line``: outputs continue the straight line through two
of the window. ``frozen``: the last prediction is frozen; used where steps add noise, which a line would follow, and in
recorded loops, of which less is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Indices
from ..samplers.coefficients import Coefficients
from .correction import products

if TYPE_CHECKING:
    from .tables import Tables

__all__ = ["between_nodes", "copied", "frozen", "line"]

HI, POINT, LAST_X, LATE, EARLY, HISTORY = range(6)


def copied(tables: Tables, hi: Indices, count: int, tail: int) -> Array:
    """Return factors (S, count, tail) of the states hi + 1, .., hi + count as copies of state hi."""
    factors = np.zeros((len(hi), count, tail))
    factors[:, :, HI] = tables.rms[hi[:, None] + 1 + np.arange(count)] / tables.rms[hi][:, None]
    return factors


def frozen(tables: Tables, hi: Indices, count: int, tail: int) -> Array:
    """Return factors of the states hi + 1, .. where the prediction of step hi - 1 is frozen."""
    step = np.maximum(hi - 1, 0)[:, None] + np.arange(count + 1)  # the first leads to state hi, which is not wanted
    slope = tables.frozen[step[:, 0]][:, None]
    noises = tail - HISTORY > tables.b.shape[1] - 1
    lags = tables.b.shape[1] - 1
    factors = np.zeros((len(hi), count + 1, tail))
    if lags == 0:
        spread = products(tables.a[step] + tables.b[step, 0] * slope)
        after = np.eye(count + 1) + np.zeros_like(spread)  # what enters at step c, carried on to the state behind i
        after[:, :, :-1] += spread[:, :, 1:]
        factors[:, :, POINT] = spread[:, :, 0]
        factors[:, :, LATE] = (after @ tables.b[step, 0][:, :, None])[:, :, 0]
        factors[:, :, LAST_X] = -slope * factors[:, :, LATE]
        if noises:
            factors[:, :, HISTORY : HISTORY + count + 1] = after
        return factors[:, 1:]
    rows, state = np.arange(len(hi)), np.zeros((len(hi), tail))
    state[:, POINT] = 1.0
    outputs = []
    for lag in range(lags):
        output = np.zeros((len(hi), tail))
        output[:, HISTORY + lag] = 1.0
        outputs.append(output)
    for k in range(count + 1):
        output = slope * state
        output[:, LATE] += 1.0
        output[:, LAST_X] -= slope[:, 0]
        outputs.append(output)
        state = tables.a[step[rows, k], None] * state
        for lag in range(lags + 1):
            state = state + tables.b[step[rows, k], lag, None] * outputs[-1 - lag]
        if noises:
            state[:, HISTORY + lags + k] += 1.0
        factors[:, k] = state
    return factors[:, 1:]


def line(tables: Tables, lo: Indices, hi: Indices, width: int, count: int, tail: int) -> Array:
    """Return factors of the states hi + 1, .. with outputs on the line through those of two steps of the window."""
    late = np.maximum(hi - 1, 0)
    early = np.maximum(lo, late - width // 2)
    step = hi[:, None] + np.arange(count)
    lags = tables.b.shape[1] - 1
    factors = np.zeros((len(hi), count, tail))
    span = np.maximum(late - early, 1)[:, None]
    if lags == 0:
        place = (step - late[:, None]) / span
        spread = products(tables.a[step])
        after = np.eye(count) + np.zeros_like(spread)
        after[:, :, :-1] += spread[:, :, 1:]
        weight = tables.b[step, 0]
        factors[:, :, HI] = spread[:, :, 0]
        factors[:, :, LATE : EARLY + 1] = after @ np.stack([weight * (1 + place), -weight * place], 2)
        return factors
    place = (hi[:, None] - lags + np.arange(lags + count) - late[:, None]) / span
    state = np.zeros((len(hi), tail))
    state[:, HI] = 1.0
    for k in range(count):
        state = tables.a[step[:, k], None] * state
        for lag in range(lags + 1):
            weight, at = tables.b[step[:, k], lag], place[:, lags + k - lag]
            state[:, LATE] += weight * (1 + at)
            state[:, EARLY] -= weight * at
        factors[:, k] = state
    return factors


def between_nodes(
    nodes: NDArray[np.bool_], inside: NDArray[np.bool_], steps: Indices, coefficients: Coefficients, tables: Tables
) -> tuple[Array, Array]:
    """Return factors (S, W, W) in the outputs and in the states that give the outputs of all steps.

    Between nodes the data prediction (else the output) follows straight lines in log(alpha/sigma), or in the number of
    the step where that is unknown.
    """
    samples, width = nodes.shape
    place = np.arange(coefficients.steps, dtype=np.float64)
    if coefficients.alpha is not None and coefficients.sigma is not None and (coefficients.alpha[:-1] > 0).all():
        place = np.log(coefficients.alpha[:-1] / coefficients.sigma[:-1])
    by_output, by_state = np.zeros((samples, width, width)), np.zeros((samples, width, width))
    for s in range(samples):
        at, all_steps = np.flatnonzero(nodes[s]), np.flatnonzero(inside[s])
        by_output[s, at, at] = 1.0
        between = np.setdiff1d(all_steps, at)
        if not len(between):
            continue
        after = np.searchsorted(at, between)
        left, right = at[after - 1], at[np.minimum(after, len(at) - 1)]
        i, left_step, right_step = steps[s][between], steps[s][left], steps[s][right]
        span = place[right_step] - place[left_step]
        share = np.divide(place[i] - place[left_step], span, out=np.zeros(len(i)), where=span != 0)
        p, q = tables.p, tables.q
        for node, step, part in ((left, left_step, 1 - share), (right, right_step, share)):
            by_output[s, between, node] += part * q[step] / q[i]
            by_state[s, between, node] += part * p[step] / q[i]
        by_state[s, between, between] -= p[i] / q[i]
    return by_output, by_state
