"""How a pass answers the calls of a denoiser, without running it."""

from __future__ import annotations

from functools import partial
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
        noise: (N,) added to the outputs, relative to them: for measuring the floor; or None.
        slopes: (N, S) of outputs, in the place of those that are known; NaN for these.
        across: (N, S) by how much more outputs move, in another direction, or None.
    """

    records_calls = False

    def __init__(
        self, known: KnownOutputs, noise: Array | None = None, slopes: Array | None = None, across: Array | None = None
    ) -> None:
        self.known, self.noise, self._across = known, noise, across
        self._slopes = None if slopes is None else np.where(np.isnan(slopes), known.slopes, slopes)

    def answer(self, call: int, step: int, states: Tensor) -> list[Any]:
        """Return the affine model's outputs."""
        slopes = None if self._slopes is None else upload(self._slopes[step], states).unsqueeze(1)
        across = None if self._across is None else partial(self._move_across, call, step)
        leaves = self.known.answer(call, step, states, slopes, across)
        if self.noise is not None:
            outputs = random_outputs(self.known.structure.outputs[call], PROBE_SEED, call)
            for leaf, noise in zip(leaves, outputs, strict=True):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.add_(noise, alpha=float(self.noise[step]) * float(leaf.float().square().mean().sqrt()))
        return leaves

    def _move_across(self, call: int, step: int, moves: Tensor) -> Tensor:
        """Return moves (R, dim) of inputs with their elements in another order and of other signs, times ``across``.

        The same at all steps, as a network hardly changes from one to the next: so what grows goes on growing.
        """
        assert self._across is not None
        generator = np.random.default_rng(PROBE_SEED)
        order = upload(generator.permutation(moves.shape[1]), moves.device)
        rows = self.known.structure.row_maps[call].sample_of_row
        signs = generator.choice([-1.0, 1.0], moves.shape[1])
        return moves[:, order] * upload(self._across[step, rows][:, None] * signs, moves)
