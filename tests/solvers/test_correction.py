"""Corrections: the trajectory of affine outputs, in chunks or at once, and its norms from a Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest

from parataxis.solvers import correction


def loop(samples, width, lags, seed=0):
    """Return coefficients, slopes and residuals of some loops."""
    draw = np.random.default_rng(seed)
    state_weight = draw.uniform(0.5, 1.1, (samples, width))
    output_weight = draw.normal(0, 0.3, (samples, width, lags + 1))
    return state_weight, output_weight, draw.normal(0, 0.5, (samples, width)), draw.normal(0, 1, (samples, width, 5))


def direct(state_weight, output_weight, slopes, residuals):
    """Return the changes of all states by forward substitution."""
    changes = np.zeros_like(residuals)
    for s, i in np.ndindex(slopes.shape):
        changes[s, i] = residuals[s, i]
        if i:
            changes[s, i] += state_weight[s, i] * changes[s, i - 1]
        for lag in range(min(output_weight.shape[2] - 1, i - 1) + 1 if i else 0):
            changes[s, i] += output_weight[s, i, lag] * slopes[s, i - lag] * changes[s, i - lag - 1]
    return changes


def applied(chunks, lags, residuals):
    """Return the changes that the matrices give, chunk by chunk."""
    changes, first = residuals.copy(), 0
    for chunk in chunks:
        stop = first + chunk.shape[1]
        changes[:, first:stop] += chunk @ changes[:, stop - chunk.shape[2] : stop]
        first = stop
    return changes


@pytest.mark.parametrize("lags", [0, 1, 3, 70])
@pytest.mark.parametrize("width", [1, 2, 9, 64, 65, 150, 220])
def test_matrices_are_forward_substitution(width, lags):
    """Narrow windows have one matrix, wide ones several; both give the changes of forward substitution."""
    *numbers, residuals = loop(2, width, lags)
    chunks = correction.propagation(*numbers)
    assert [chunk.shape[1:] for chunk in chunks] == correction.chunk_shapes(width, lags)
    expected = direct(*numbers, residuals)
    assert np.allclose(applied(chunks, lags, residuals), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lags", [0, 2, 70])
@pytest.mark.parametrize("width", [7, 150, 220])
def test_norms_follow_from_the_gram_matrix(width, lags):
    """The norms of the changes need no more of the residuals than their inner products."""
    *numbers, residuals = loop(3, width, lags)
    changes, own = correction.corrected_norms(
        correction.propagation(*numbers), lags, residuals @ residuals.swapaxes(1, 2)
    )
    assert np.allclose(changes, np.linalg.norm(direct(*numbers, residuals), axis=2), rtol=1e-8)
    assert np.allclose(own, np.linalg.norm(residuals, axis=2))


def test_norms_behind_an_overflow_are_unknown():
    """A residual that overflowed leaves the states before it as they are."""
    *numbers, residuals = loop(1, 6, 0)
    gram = residuals @ residuals.swapaxes(1, 2)
    gram[:, 3] = gram[:, :, 3] = np.inf
    changes, own = correction.corrected_norms(correction.propagation(*numbers), 0, gram)
    assert np.isfinite(changes[0, :3]).all()
    assert np.isinf(changes[0, 3:]).all()
    assert np.isinf(own[0, 3:]).all()


@pytest.mark.parametrize("lags", [0, 2])
def test_an_order_keeps_so_many_terms(lags):
    """Order 1 is the sequential step of each state, order W everything."""
    *numbers, _ = loop(2, 8, lags)
    assert not correction.propagation(*numbers, order=1)[0].any()
    whole = correction.propagation(*numbers)[0]
    assert np.allclose(correction.propagation(*numbers, order=8)[0], whole)
    assert not np.allclose(correction.propagation(*numbers, order=3)[0], whole)
