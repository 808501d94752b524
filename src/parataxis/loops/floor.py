"""How far the rounding of outputs moves the result of a loop: measured by passes whose outputs are moved so far.

The stubs of these passes answer along slopes that the rounds have measured, between the latest two evaluations of every
step: a solver's own slopes may say what is good for its convergence (Picard's always say that states keep their size),
not what the network makes of a change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read
from .error_estimate import largest_relative_distance
from .structure import Structure

__all__ = ["FloorMeasurement", "MeasuredSlopes"]

SMALLEST_MOVE = 8  # ulps of an input, relative to it, below which a change of the output is mostly rounding


class MeasuredSlopes:
    """Slopes of outputs f along the latest move of their inputs u: d = <f' - f, u' - u> / |u' - u|^2.

    Args:
        structure: Of the stage.

    Attributes:
        slopes: (N, S); NaN where an input has not moved.
    """

    def __init__(self, structure: Structure) -> None:
        self.slopes: Array = np.full((structure.steps, structure.samples), np.nan)
        self._smallest = SMALLEST_MOVE * float(torch.finfo(structure.network_dtype).eps)
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
            sizes = [(moves * changes).sum(1), moves.square().sum(1), new_inputs.square().sum(1)]
            products, moved, size = read(torch.stack(sizes))
            far = moved > self._smallest**2 * size
            chosen = [keys[row] for row, is_far in zip(rows, far, strict=True) if is_far]
            for (step, sample), slope in zip(chosen, products[far] / moved[far], strict=True):
                self.slopes[step, sample] = slope
        # Steps before those that are evaluated now are accepted, and are not evaluated again.
        first = {sample: min(steps[samples == sample].tolist()) for sample in set(samples.tolist())}
        self._latest = {key: pair for key, pair in self._latest.items() if key[0] >= first.get(key[1], 0)}
        for row, key in enumerate(keys):
            self._latest[key] = inputs[row], outputs[row]

    def forget(self) -> None:
        """Let go of the evaluations."""
        self._latest.clear()


class FloorMeasurement:
    """Two passes, the first one with noise: the distance of their last states is the floor.

    Args:
        rounding: Of outputs, relative to them: the size of the noise.
        slopes: (N, S) that have been measured, with which both answer.
    """

    def __init__(self, rounding: float, slopes: Array) -> None:
        self.rounding, self.slopes = rounding, slopes
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
