"""What error to expect of a replay, from what its pass saw and what was known before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .known_outputs import KnownOutputs
from .passes import StageRecord
from .rows import SMALLEST

__all__ = ["estimate_error", "largest_relative_distance", "relative_rounding", "satisfies_recurrence"]


def estimate_error(record: StageRecord, solution: Tensor, solver_estimate: float) -> float:
    """Return the solver's own estimate plus the distance of the replay from what was solved for.

    Relative; the largest of all samples, infinite if it is not finite.
    """
    as_runs = record.structure.as_runs
    error = solver_estimate + largest_relative_distance(as_runs(solution), as_runs(record.last_state))
    return error if np.isfinite(error) else float("inf")


def largest_relative_distance(states: Tensor, reference: Tensor) -> float:
    """Return the largest |x - y| / |y| of states (S, dim)."""
    return float(((states - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=SMALLEST)).max())


def satisfies_recurrence(record: StageRecord, noise_terms: Sequence[Tensor], sizes: Sequence[float]) -> bool:
    """Return whether a pass obeys the recurrence: it adds along the way what an earlier one did.

    Up to the rounding of both. The earlier one had outputs at random, and a loop whose states shrink on the way to the
    sample, as those of variance-exploding schedules do, keeps large states to its end then. In 16 bits terms within a
    step may cancel, which makes single steps a poor test: half of them must be good.
    """
    structure = record.structure
    pairs = zip(noise_terms, sizes, record.noise_terms_with_sizes())  # noqa: B905  # the pass may have ended before
    errors = [float((term - before).norm()) / max(size, then, SMALLEST) for before, then, (term, size) in pairs]
    format_ = torch.finfo(structure.network_dtype)
    half_good = format_.bits >= 32 or bool(np.median(errors) <= 2 * format_.eps)
    return half_good and max(errors) <= 4 * structure.precision


def relative_rounding(known: KnownOutputs, outputs: Sequence[tuple[int, Sequence[Any]]]) -> float:
    """Return how much outputs of calls differ from those that are known, relative to these."""
    structure = known.structure
    squared_error = squared_norm = 0.0
    for call, output in outputs:
        row_map, before = structure.row_maps[call], known.outputs[call]
        assert before is not None
        reference = row_map.answers(before, structure.dtype)
        squared_error += float((row_map.answers(output, structure.dtype) - reference).square().sum())
        squared_norm += float(reference.square().sum())
    return float(np.sqrt(squared_error / max(squared_norm, SMALLEST)))
