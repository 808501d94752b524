"""The noise of the steps that solvers stand on, where the noise of all steps is not held but drawn again."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..arrays import Indices, upload
from ..samplers.redrawn import RedrawnNoise

__all__ = ["HeldNoise"]


class HeldNoise:
    """A ring of steps for each of S samples: step i lies at i modulo R.

    Args:
        noise: Of all samples.
        like: (S, dim) their states.
        reach: So many steps from where a sample stands are held.

    Attributes:
        steps: R.
        rows: (S, R, dim) what these steps add.
    """

    def __init__(self, noise: RedrawnNoise, like: Tensor, reach: int) -> None:
        self._noise, self._size = noise, noise.size
        # The reach may begin at the end of a block.
        self._slots = -(-reach // noise.size) + 1
        self.steps = self._slots * noise.size
        self._blocks = -(-noise.steps // noise.size)
        self.rows = like.new_zeros(len(like), self.steps, like.shape[1])
        self._held = np.full((len(like), self._slots), -1)

    def load(self, places: Indices, first: Indices) -> None:
        """Hold the steps from ``first`` (n,) on, of the samples at these places (n,)."""
        wanted = (first // self._size)[:, None] + np.arange(self._slots)
        missing = (self._held[places[:, None], wanted % self._slots] != wanted) & (wanted < self._blocks)
        if not missing.any():
            return
        for block in np.unique(wanted[missing]).tolist():
            rows = places[((wanted == block) & missing).any(1)]
            drawn = self._noise.block(block)
            slot, index = block % self._slots, upload(rows, drawn.device)
            begin = slot * self._size
            self.rows[:, begin : begin + drawn.shape[1]].index_copy_(0, index, drawn.index_select(0, index))
            self._held[rows, slot] = block
