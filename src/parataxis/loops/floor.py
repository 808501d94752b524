r"""How far the rounding of outputs moves the result of a loop, in this call: another input may be near a decision.

Along slopes d that the rounds have measured, between the latest two evaluations of every step: a solver's own slopes
may say what is good for its convergence (Picard's always say that states keep their size), not what the network makes
of a change. A loop with a recurrence carries the rounding e_j of output f_j to its last state as

    n_j e_j,        n_j = sum_l m_{j+l+1} B_{j+l,l},        m_j = A_j m_{j+1} + d_j n_j,        m_N = 1

and roundings are independent. Of any other loop two passes show it, one of them with outputs that are moved so far.

Of a network in 16 bits these passes also answer what a change of the output had beside the move of its input, as a
norm, in another direction: a chaotic network makes much of its rounding in directions that no slope shows.
"""

from __future__ import annotations

from itertools import compress

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read
from .error_estimate import largest_relative_distance
from .known_outputs import KnownOutputs
from .rows import SMALLEST
from .spool import looked_at
from .structure import Structure

__all__ = ["FloorMeasurement", "MeasuredSlopes", "carried_to_the_end"]

SMALLEST_MOVE = 8  # roundings, relative to an input, below which a change of the output is mostly rounding
# Of moves, relative to an input, that show how errors grow: more roundings than these, as the solver's own rounding
# goes anywhere, and less than this, as other places have other slopes.
CLEAR_MOVE, FAR_MOVE = 64, 1e-2


class MeasuredSlopes:
    """Slopes of outputs f along a move of their inputs u: d = <f' - f, u' - u> / |u' - u|^2.

    Args:
        structure: Of the stage.

    Attributes:
        slopes: (N, S) along the clear move that an error grows most along, or the latest one; NaN where there was none.
        latest: (N, S) along the latest move.
    """

    def __init__(self, structure: Structure) -> None:
        self.slopes: Array = np.full((structure.steps, structure.samples), np.nan)
        self.latest = self.slopes.copy()
        self._across: list[tuple[tuple[int, int], float, float]] = []  # step and sample, size of the move, across
        self._growth = np.full(self.slopes.shape, -1.0)  # of an error along a clear move, from step to step
        coefficients = structure.coefficients
        self._weights = coefficients.state_weight, coefficients.output_weight.sum(1)
        rounding = max(structure.unit, float(torch.finfo(structure.network_dtype).eps))
        self._smallest, self._clear = SMALLEST_MOVE * rounding, CLEAR_MOVE * rounding
        self._evaluated: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def note(self, steps: Indices, samples: Indices, inputs: Tensor, outputs: Tensor) -> None:
        """Note evaluations (n, dim) of steps and samples."""
        keys = list(zip(steps.tolist(), samples.tolist(), strict=True))
        rows = [row for row, key in enumerate(keys) if key in self._evaluated]
        if rows:
            before = [self._evaluated[keys[row]] for row in rows]
            new_inputs, new_outputs = inputs[rows], outputs[rows]
            moves = new_inputs - torch.stack([u for u, _ in before])
            changes = new_outputs - torch.stack([f for _, f in before])
            squares = [rows.square().sum(1) for rows in (moves, changes, new_inputs)]
            products, moved, changed, size = read(torch.stack([(moves * changes).sum(1), *squares]))
            far = moved > self._smallest**2 * size
            slopes = products[far] / moved[far]
            across = np.sqrt(np.maximum(changed[far] / moved[far] - slopes**2, 0.0))
            sizes = np.sqrt(moved[far] / size[far])
            for key, slope, *beside in zip(
                compress((keys[row] for row in rows), far), slopes, sizes, across, strict=True
            ):
                self._across.append((key, *beside))
                self.latest[key] = slope
                growth = self._growth_along(key[0], slope) if self._clear < beside[0] < FAR_MOVE else -1.0
                if growth >= self._growth[key]:
                    self.slopes[key], self._growth[key] = slope, growth
        # Steps before those that are evaluated now are accepted, and are not evaluated again.
        first = {sample: min(steps[samples == sample].tolist()) for sample in set(samples.tolist())}
        self._evaluated = {key: pair for key, pair in self._evaluated.items() if key[0] >= first.get(key[1], 0)}
        for row, key in enumerate(keys):
            self._evaluated[key] = inputs[row], outputs[row]

    def _growth_along(self, step: int, slope: float) -> float:
        """Return by how much an error grows along a slope."""
        by_state, by_output = self._weights
        return abs(float(by_state[step] + by_output[step] * slope))

    def across(self, rounding: Array) -> Array:
        """Return (N, S) |f' - f - d (u' - u)| / |u' - u| of the latest moves beyond the rounding (N,); else 0."""
        across = np.zeros_like(self.slopes)
        for key, size, value in self._across:
            if size > SMALLEST_MOVE * rounding[key[0]]:
                across[key] = value
        return across

    def forget(self) -> None:
        """Let go of the evaluations."""
        self._evaluated.clear()


class FloorMeasurement:
    """Two passes, the first one with noise: the distance of their last states is the floor.

    Args:
        rounding: (N,) of outputs, relative to them: the size of the noise.
        slopes: (N, S) that have been measured, with which both answer.
        across: (N, S) what they answer beside these, as a norm, or None.
    """

    def __init__(self, rounding: Array, slopes: Array, across: Array | None = None) -> None:
        self.rounding, self.slopes, self.across = rounding, slopes, across
        self._noisy: Tensor | None = None  # (S, dim) the last state of the pass with noise

    @property
    def noise(self) -> Array | None:
        """(N,) that the next pass adds to its outputs, relative to them; None if it adds nothing."""
        return self.rounding if self._noisy is None else None

    def take(self, last_state: Tensor) -> float | None:
        """Take the last state of a pass; return the floor, or None after the pass with noise."""
        if self._noisy is None:
            self._noisy = last_state
            return None
        return largest_relative_distance(self._noisy, last_state)


def carried_to_the_end(known: KnownOutputs, solution: Tensor, slopes: Array) -> Array:
    """Return (N, S) by how much the rounding of the outputs of a step moves the last state.

    As norms: relative to the state, for outputs that are all rounded by as much as they are large.

    Args:
        known: The evaluations of a stage with a recurrence.
        solution: (S, dim) its last state.
        slopes: (N, S) d that have been measured; NaN for those of the solver.
    """
    structure = known.structure
    slopes = np.where(np.isnan(slopes), known.slopes, slopes)
    state_weight, output_weight = structure.coefficients.state_weight, structure.coefficients.output_weight
    steps, lags = structure.steps, structure.coefficients.lags
    from_state, from_output = np.zeros((steps + lags + 1, structure.samples)), np.zeros_like(slopes)
    from_state[steps] = 1.0
    for j in reversed(range(steps)):
        for lag in range(min(lags, steps - 1 - j) + 1):
            from_output[j] += output_weight[j + lag, lag] * from_state[j + lag + 1]
        from_state[j] = state_weight[j] * from_state[j + 1] + slopes[j] * from_output[j]
    norms = _norms_of_rows(known) / read(torch.linalg.vector_norm(solution, dim=1)).clip(min=SMALLEST)
    return np.asarray(np.abs(from_output) * norms)


def _norms_of_rows(known: KnownOutputs) -> Array:
    """Return (N, S) the root of the sum of g_r^2 |f_r|^2 over the output rows of every step."""
    structure = known.structure
    squares = np.zeros((structure.steps, structure.samples))
    calls = [call for step in structure.calls_of_step for call in step]
    norms = []
    for call in calls:
        rows = structure.row_maps[call].answers(known.outputs[call] or [], structure.dtype)
        norms.append(torch.linalg.vector_norm(rows, dim=1))
        looked_at(rows)
    ends = np.cumsum([len(values) for values in norms])[:-1]
    before = np.zeros(structure.steps, np.int64)  # rows of a sample in the calls of each step so far
    for call, values in zip(calls, np.split(read(torch.cat(norms)), ends), strict=True):
        row_map, step = structure.row_maps[call], structure.step_of_call[call]
        weights = structure.guidance_weights[step][row_map.guidance_index + before[step]]
        np.add.at(squares[step], row_map.sample_of_row, (weights * values) ** 2)
        before[step] += int(row_map.guidance_index.max()) + 1
    return np.asarray(np.sqrt(squares))
