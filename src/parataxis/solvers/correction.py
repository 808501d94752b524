r"""Which trajectory follows, if each output were f_i + d_i (u - u_i)? The correction, on the host.

With the residuals r_i = step_i(U) - u_{i+1} of a window of W steps, the changes of its states are

    delta = (I - K)^{-1} r,   K[i, i-1] = A_i + B_{i,0} d_i,   K[i, i-1-l] = B_{i,l} d_{i-l}
    new_{i+1} = step_i(U) + (M r)_i,   M = (I - K)^{-1} - I = K + K^2 + ..

In this form rounding errors scale with the correction, and a state whose inputs did not move comes out as exactly the
sequential step. All norms of the changes follow from the Gram matrix of the residuals, so the device is read once.

Arrays are for S samples side by side: growth and slopes (S, W), matrices (S, W, W). Row and column i belong to the
state behind step i of the window. Windows of more than :data:`CHUNK` steps are corrected chunk by chunk, since a full
matrix would cost W^3 on the host. Each chunk starts from the changes of the L + 1 states before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array

__all__ = ["CHUNK", "chunk_shapes", "corrected_norms", "products", "propagation"]

CHUNK = 64  # steps whose corrections follow from each other in one matrix product


def products(growth: Array) -> Array:
    """Return (S, n, n), entry [i, c] = J_c J_{c+1} .. J_i for c <= i, else 0, of growths J (S, n)."""
    count = growth.shape[1]
    lower = np.tri(count, dtype=bool)
    spread = np.where(lower, growth[:, :, None], 1.0)
    np.multiply.accumulate(spread, axis=1, out=spread)
    spread *= lower
    return spread


def chunk_shapes(width: int, lags: int, *, whole: bool = False) -> list[tuple[int, int]]:
    """Return (rows, columns) of the matrices of :func:`propagation`; columns count the states before the chunk too.

    A chunk has at least the L + 1 rows that the next one starts from.
    """
    size = width if whole else max(CHUNK, lags + 1)
    return [(min(size, width - a), min(lags + 1, a) + min(size, width - a)) for a in range(0, width, size)]


def propagation(state_weight: Array, output_weight: Array, slopes: Array, order: int | None = None) -> list[Array]:
    """Return M in chunks: how residuals, and changes of the states before a chunk, change the states behind them.

    Args:
        state_weight: (S, W) A_i; zeros beyond the end of a window.
        output_weight: (S, W, L + 1) B_{i,l}, likewise.
        slopes: (S, W) d_i.
        order: Keep K + .. + K^{order-1} only; None keeps all powers. 1 leaves the sequential step of each state.
    """
    width, lags = slopes.shape[1], output_weight.shape[2] - 1
    if order is not None:
        return [_truncated(state_weight, output_weight, slopes, order)]
    if lags:
        ends = np.cumsum([0, *(rows for rows, _ in chunk_shapes(width, lags))]).tolist()
        return [_multistep(state_weight, output_weight, slopes, slice(*steps)) for steps in pairwise(ends)]
    growth = state_weight + output_weight[:, :, 0] * slopes
    chunks, first = [], 0
    for rows, columns in chunk_shapes(width, 0):
        # Column c carries the state behind step c, which the steps behind it move; of the states before the first
        # chunk none moves.
        behind = _behind(rows, columns)
        chunk = np.where(behind, growth[:, first : first + rows, None], 1.0)
        np.multiply.accumulate(chunk, axis=1, out=chunk)
        chunk *= behind
        chunks.append(chunk)
        first += rows
    return chunks


@cache
def _behind(rows: int, columns: int) -> NDArray[np.bool_]:
    """Return (rows, columns) which states lie behind that of a column: the last one's lies before the first row's."""
    return np.tri(rows, columns, columns - rows - 1, dtype=bool)


@cache
def _identity(rows: int, columns: int) -> Array:
    """Return (rows, columns) ones where a state is its own."""
    return np.eye(rows, columns, columns - rows)


def _multistep(state_weight: Array, output_weight: Array, slopes: Array, steps: slice) -> Array:
    """Return one chunk of M by forward substitution over its rows."""
    count, samples, lags = steps.stop - steps.start, len(slopes), output_weight.shape[2] - 1
    before = min(lags + 1, steps.start)
    effect = np.zeros((samples, before + count, before + count)) + np.eye(before + count)
    for k in range(count):
        row, i = before + k, steps.start + k
        for lag in range(min(lags, i) + 1):
            if row - lag < 1:
                break  # the states before the window do not move
            weight = output_weight[:, i, lag] * slopes[:, i - lag]
            if lag == 0:
                weight = weight + state_weight[:, i]
            effect[:, row] += weight[:, None] * effect[:, row - lag - 1]
    identity = np.zeros((count, before + count))
    identity[:, before:] = np.eye(count)
    return np.asarray(effect[:, before:] - identity)


def _truncated(state_weight: Array, output_weight: Array, slopes: Array, order: int) -> Array:
    """Return K + .. + K^{order-1} as one matrix (S, W, W)."""
    samples, width = slopes.shape
    lags = output_weight.shape[2] - 1
    if lags == 0:
        growth = state_weight + output_weight[:, :, 0] * slopes
        moved = np.zeros((samples, width, width))
        moved[:, :, :-1] = products(growth)[:, :, 1:]
        age = np.arange(width)[:, None] - np.arange(width)
        return np.where(age < order, moved, 0.0)
    step = np.zeros((samples, width, width))
    for i in range(1, width):
        step[:, i, i - 1] += state_weight[:, i]
        for lag in range(min(lags, i - 1) + 1):
            step[:, i, i - 1 - lag] += output_weight[:, i, lag] * slopes[:, i - lag]
    total = np.zeros_like(step)
    for _ in range(min(order, width) - 1):
        total = step + step @ total
    return total


def rows_of(chunks: Sequence[Array]) -> Iterator[slice]:
    """Yield which states each chunk is for."""
    first = 0
    for chunk in chunks:
        yield slice(first, first := first + chunk.shape[1])


def corrected_norms(chunks: Sequence[Array], lags: int, gram: Array) -> tuple[Array, Array]:
    """Return the norms of the changes delta and of the residuals of all states, (S, W) each.

    Infinite where a residual overflowed, and for all states behind it: nothing is known of them.

    Args:
        chunks: From :func:`propagation`.
        lags: L.
        gram: (S, W, W) inner products of the residuals.
    """
    samples = len(gram)
    diagonal = gram.diagonal(0, 1, 2)
    overflow = not np.isfinite(gram.sum())
    if overflow:
        lost = ~np.isfinite(diagonal)
        gram = np.where(lost[:, :, None] | lost[:, None], 0, gram)
        diagonal = gram.diagonal(0, 1, 2)
    if len(chunks) == 1:
        change = chunks[0] + _identity(*chunks[0].shape[1:])
        changes = ((change @ gram) * change).sum(2)
    else:
        squares = []
        before = np.zeros((samples, 0, gram.shape[1]))  # the changes of the states before a chunk, as sums of residuals
        inner = before @ gram  # and their inner products with all residuals
        for rows, chunk in zip(rows_of(chunks), chunks, strict=True):
            size, known = chunk.shape[1], before.shape[1]
            change = chunk + _identity(size, known + size)
            joint = np.empty((samples, known + size, known + size))
            joint[:, :known, :known] = inner @ before.transpose(0, 2, 1)
            joint[:, :known, known:] = inner[:, :, rows]
            joint[:, known:, :known] = inner[:, :, rows].transpose(0, 2, 1)
            joint[:, known:, known:] = gram[:, rows, rows]
            squares.append(((change @ joint) * change).sum(2))
            last = change[:, -lags - 1 :]
            before = last[:, :, :known] @ before
            before[:, :, rows] += last[:, :, known:]
            inner = last[:, :, :known] @ inner + last[:, :, known:] @ gram[:, rows]
        changes = np.concatenate(squares, 1)
    changes, residuals = np.sqrt(np.maximum(changes, 0)), np.sqrt(np.maximum(diagonal, 0))
    if overflow:
        behind = np.logical_or.accumulate(lost, 1)
        changes, residuals = np.where(behind, np.inf, changes), np.where(behind, np.inf, residuals)
    return changes, residuals
