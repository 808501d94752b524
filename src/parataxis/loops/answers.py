"""How a pass answers the calls of a denoiser, without running it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..arrays import Array, upload
from .known_outputs import KnownOutputs
from .structure import Structure, random_outputs

__all__ = ["PROBE_SEED", "AffineAnswers", "Answers", "PerturbedAnswers"]

PROBE_SEED = 99  # of the pass that shows what the loop adds
PROBE_NOISE = 0.1  # of the combined outputs of that pass, relative to their inputs


class Answers(Protocol):
    """Answers the calls of one stage in one pass."""

    records_calls: bool

    def answer(self, call: int, step: int, states: Tensor) -> list[Any]:
        """Return the output leaves of a call of this step at states (R, dim)."""
        ...


class PerturbedAnswers:
    """f = d u + noise, with d such that states keep their size; the calls are recorded.

    Args:
        structure: Of the stage.
        seed: Of the noise.
    """

    records_calls = True

    def __init__(self, structure: Structure, seed: int = PROBE_SEED) -> None:
        self.structure, self.seed = structure, seed

    def answer(self, call: int, step: int, states: Tensor) -> list[Any]:
        """Return d u + noise."""
        structure = self.structure
        leaves = random_outputs(structure.outputs[call], self.seed, call)
        weights = float(np.abs(structure.guidance_weights[step]).sum())
        scale = PROBE_NOISE * float(states.square().mean().sqrt()) / weights
        leaves = [leaf * scale if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
        structure.row_maps[call].add(leaves, states * float(structure.slopes[step]))
        return leaves


class AffineAnswers:
    """f_q + d_q (u - u_q) from the evaluations that are known.

    Args:
        known: These evaluations.
        noise: Added to the outputs, relative to them: for measuring the floor.
        slopes: (N, S) of outputs, in the place of those that are known; NaN for these.
    """

    records_calls = False

    def __init__(self, known: KnownOutputs, noise: float = 0.0, slopes: Array | None = None) -> None:
        self.known, self.noise = known, noise
        self._slopes = None if slopes is None else np.where(np.isnan(slopes), known.slopes, slopes)

    def answer(self, call: int, step: int, states: Tensor) -> list[Any]:
        """Return the affine model's outputs."""
        slopes = None if self._slopes is None else upload(self._slopes[step], states).unsqueeze(1)
        leaves = self.known.answer(call, step, states, slopes)
        if self.noise:
            outputs = random_outputs(self.known.structure.outputs[call], PROBE_SEED, call)
            for leaf, noise in zip(leaves, outputs, strict=True):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.add_(noise, alpha=self.noise * float(leaf.float().square().mean().sqrt()))
        return leaves
