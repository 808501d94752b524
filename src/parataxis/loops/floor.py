"""How far the rounding of outputs moves the result of a loop: measured by passes whose outputs are moved so far.

The stubs of these passes answer along slopes that the rounds have measured, between the latest two evaluations of every
step: a solver's own slopes may say what is good for its convergence (Picard's always say that states keep their size),
not what the network makes of a change.

Of a network in 16 bits they also answer what a change of the output had beside the move of its input, as a norm, in
another direction: a chaotic network makes much of its rounding in directions that no slope shows.
"""

from __future__ import annotations

from itertools import compress

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read
from .error_estimate import largest_relative_distance
from .structure import Structure

__all__ = ["FloorMeasurement", "MeasuredSlopes"]

SMALLEST_MOVE = 8  # roundings, relative to an input, below which a change of the output is mostly rounding


class MeasuredSlopes:
    """Slopes of outputs f along the latest move of their inputs u: d = <f' - f, u' - u> / |u' - u|^2.

    Args:
        structure: Of the stage.

    Attributes:
        slopes: (N, S); NaN where an input has not moved.
    """

    def __init__(self, structure: Structure) -> None:
        self.slopes: Array = np.full((structure.steps, structure.samples), np.nan)
        self._across: list[tuple[tuple[int, int], float, float]] = []  # step and sample, size of the move, across
        self._smallest = SMALLEST_MOVE * max(structure.unit, float(torch.finfo(structure.network_dtype).eps))
        self._latest: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def note(self, steps: Indices, samples: Indices, inputs: Tensor, outputs: Tensor) -> None:
        """Note evaluations (n, dim) of steps and samples."""
        keys = list(zip(steps.tolist(), samples.tolist(), strict=True))
        rows = [row for row, key in enumerate(keys) if key in self._latest]
        if rows:
            before = [self._latest[keys[row]] for row in rows]
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
                self.slopes[key] = slope
                self._across.append((key, *beside))
        # Steps before those that are evaluated now are accepted, and are not evaluated again.
        first = {sample: min(steps[samples == sample].tolist()) for sample in set(samples.tolist())}
        self._latest = {key: pair for key, pair in self._latest.items() if key[0] >= first.get(key[1], 0)}
        for row, key in enumerate(keys):
            self._latest[key] = inputs[row], outputs[row]

    def across(self, rounding: float) -> Array:
        """Return (N, S) |f' - f - d (u' - u)| / |u' - u| of the latest moves that are more than rounding; else 0."""
        across = np.zeros_like(self.slopes)
        for key, size, value in self._across:
            if size > SMALLEST_MOVE * rounding:
                across[key] = value
        return across

    def forget(self) -> None:
        """Let go of the evaluations."""
        self._latest.clear()


class FloorMeasurement:
    """Two passes, the first one with noise: the distance of their last states is the floor.

    Args:
        rounding: Of outputs, relative to them: the size of the noise.
        slopes: (N, S) that have been measured, with which both answer.
        across: (N, S) what they answer beside these, as a norm, or None.
    """

    def __init__(self, rounding: float, slopes: Array, across: Array | None = None) -> None:
        self.rounding, self.slopes, self.across = rounding, slopes, across
        self._noisy: Tensor | None = None  # (S, dim) the last state of the pass with noise

    @property
    def noise(self) -> float:
        """That the next pass adds to its outputs, relative to them."""
        return self.rounding if self._noisy is None else 0.0

    def take(self, last_state: Tensor) -> float | None:
        """Take the last state of a pass; return the floor, or None after the pass with noise."""
        if self._noisy is None:
            self._noisy = last_state
            return None
        return largest_relative_distance(self._noisy, last_state)
