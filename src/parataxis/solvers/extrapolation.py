r"""Which states enter a window, and outputs between those that were evaluated: factors, on the host.

A state that enters a window is a linear combination of rows that are there already, the *tail*:

    [new_hi, new_{hi-1}, u_{hi-1}, f_{hi-1}, f_middle, f_early | final outputs of the L steps before hi - 1 | noise of
     the steps hi - 1, hi, ..]

``copy``: the last state, in the proportion of expected sizes. ``line``: outputs continue the straight line through two
of the window; ``bend`` is what a parabola through the one between them adds, and as much of it is taken as bends have
lasted, see :func:`persistence`. ``frozen``: the last prediction is frozen; used where steps add noise, which a line
would follow, and in recorded loops, of which less is known.
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

__all__ = ["apart", "bend", "between_nodes", "copied", "frozen", "line", "persistence", "span"]

HI, POINT, LAST_X, LATE, MIDDLE, EARLY, HISTORY = range(7)


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


def apart(width: int) -> int:
    """Return how many steps lie between the outputs that say how outputs bend."""
    return max(1, width // 8)


def span(width: int) -> int:
    """Return how many steps lie between the two outputs of a line."""
    return min(2 * apart(width), width // 2)


def line(tables: Tables, lo: Indices, hi: Indices, width: int, count: int, tail: int) -> Array:
    """Return factors of the states hi + 1, .. with outputs on the line through those of two steps of the window."""
    late = np.maximum(hi - 1, 0)
    place = _places(tables, hi, count) / np.maximum(np.minimum(span(width), late - lo), 1)[:, None]
    state, outputs = np.zeros((len(hi), tail)), np.zeros((*place.shape, tail))
    state[:, HI] = 1.0
    outputs[..., LATE], outputs[..., EARLY] = 1 + place, -place
    return _driven(tables, hi, state, outputs)


def bend(tables: Tables, hi: Indices, width: int, count: int, tail: int) -> Array:
    """Return factors of what is added to :func:`line` if outputs follow the parabola through three of the window."""
    place = _places(tables, hi, count) / span(width)
    outputs = np.zeros((*place.shape, tail))
    outputs[..., LATE] = outputs[..., EARLY] = 2 * place * (place + 1)
    outputs[..., MIDDLE] = -2 * outputs[..., LATE]
    return _driven(tables, hi, np.zeros((len(hi), tail)), outputs)


def persistence(products: Array) -> Array:
    """Return (S,) how much of a bend of the outputs is still there where states enter, between 0 and 1.

    With the last second difference d of outputs that lie :func:`apart`, and the one before it,

        theta = <d, d_before> / |d_before|^2

    is what has lasted from one to the other. States enter at least twice as far from the last one: theta^2. Of a smooth
    network theta is near 1; of a rough one each output bends in its own way, and theta is near 0 or below.

    Args:
        products: (S, 2, 2) inner products of (d, d_before).
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lasted = products[:, 0, 1] / products[:, 1, 1]
    return np.where(lasted > 0, np.minimum(lasted, 1.0) ** 2, 0.0)


def _places(tables: Tables, hi: Indices, count: int) -> Array:
    """Return (S, L + count) how far the steps hi - L .. hi + count - 1 lie behind step hi - 1."""
    lags = tables.b.shape[1] - 1
    behind = (hi - np.maximum(hi - 1, 0))[:, None]
    return np.asarray(behind + np.arange(-lags, count), dtype=np.float64)


def _driven(tables: Tables, hi: Indices, state: Array, outputs: Array) -> Array:
    """Return factors (S, count, tail) of the states hi + 1, .. from those of state hi and of outputs from hi - L on."""
    lags = tables.b.shape[1] - 1
    count = outputs.shape[1] - lags
    step = hi[:, None] + np.arange(count)
    if lags == 0:
        spread = products(tables.a[step])
        after = np.eye(count) + np.zeros_like(spread)
        after[:, :, :-1] += spread[:, :, 1:]
        return np.asarray(spread[:, :, :1] * state[:, None] + after @ (tables.b[step, 0][:, :, None] * outputs))
    factors = np.zeros((len(hi), count, outputs.shape[2]))
    for k in range(count):
        state = tables.a[step[:, k], None] * state
        for lag in range(lags + 1):
            state = state + tables.b[step[:, k], lag, None] * outputs[:, lags + k - lag]
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
