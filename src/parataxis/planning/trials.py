"""Plans by trial: for loops that take well under a second, the loop and the best solvers are run a few times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.executor import Executor
from ..engine.latency import LEAST_BUSY, NOISY, timed
from ..engine.run import drive, start
from ..samplers.sampler import Sampler
from ..solvers.base import Solver
from .candidates import Candidate, Range, expected_seconds

__all__ = ["try_candidates"]

TRIED_AT_ONCE = 2  # candidates that are tried side by side
FEWEST_TRIALS, MOST_TRIALS = 3, 5  # runs of each; more where equal runs differ by more than NOISY


def try_candidates(
    candidates: Sequence[Candidate], sampler: Sampler, noise: Tensor, tolerance: float, execute: Executor
) -> list[Candidate]:
    """Return the candidates, the best of them as they were measured: for loops that take well under a second.

    There a plan by trial costs little, and a forecast is worth least: what a round costs besides the network counts,
    and a busy machine disturbs short timings most. The loop and the candidates that are expected to be fastest are run
    in turn. The forecasts of others of their kinds are corrected by what these took more or less than forecast.

    Where equal runs on a CPU differ by much, they compare by their processor time, which other work does not lengthen,
    and the seconds are that times what a second of it took on average.

    Args:
        candidates: As forecast; the last one is sequential.
        sampler: The equation.
        noise: (B, *shape) the samples that are drawn.
        tolerance: Relative error allowed.
        execute: The network.
    """
    generator = torch.Generator(noise.device).manual_seed(0)
    recurrence = sampler.recurrence(noise.to(torch.promote_types(noise.dtype, torch.float32)), generator, noise.dtype)

    def run(solver: Solver) -> _Trial:
        def solve() -> int:
            runs = start(sampler, recurrence, solver, tolerance=tolerance, dtype=noise.dtype)
            return max(drive(runs, execute))

        processor = time.process_time()
        rounds, seconds = timed(solve, noise.device)
        return _Trial(seconds, time.process_time() - processor, rounds)

    taken: dict[Solver, list[_Trial]] = {candidates[-1].solver: []}
    corrected = list(candidates)
    # First the best of every kind, as what a round costs is measured for each kind, and may have been disturbed.
    fastest = list(
        {
            type(candidate.solver): candidate
            for candidate in sorted(corrected[:-1], key=expected_seconds, reverse=True)
        }.values()
    )
    while True:
        new = [candidate.solver for candidate in fastest if candidate.solver not in taken]
        if not new:
            return corrected
        taken |= {solver: [] for solver in new}
        while not _tried_enough(taken):
            for solver, trials in taken.items():
                trials.append(run(solver))
        results = _by_processor_time(taken) if noise.device.type == "cpu" and _noisy(taken) else taken
        loop = results[candidates[-1].solver]
        tried = {
            candidate.solver: _as_tried(candidate, results[candidate.solver], loop)
            for candidate in candidates
            if candidate.solver in taken
        }
        corrected = [
            tried.get(candidate.solver) or _corrected(candidate, candidates, tried) for candidate in candidates
        ]
        fastest = sorted(corrected[:-1], key=expected_seconds)[:TRIED_AT_ONCE]


def _corrected(candidate: Candidate, candidates: Sequence[Candidate], tried: dict[Solver, Candidate]) -> Candidate:
    """Return a candidate as forecast, corrected by what others of its kind took more or less than forecast."""
    ratio = statistics.median(
        tried[other.solver].seconds.median / other.seconds.median
        for other in candidates
        if other.solver in tried and type(other.solver) is type(candidate.solver)
    )
    return candidate._replace(seconds=Range(*(ratio * seconds for seconds in candidate.seconds)))


class _Trial(NamedTuple):
    """One run: its seconds, those of the processor, and its rounds."""

    seconds: float
    processor: float
    rounds: int


def _tried_enough(taken: dict[Solver, list[_Trial]]) -> bool:
    """Return whether every candidate was run often enough: more often where equal runs differ."""
    fewest = min(len(trials) for trials in taken.values())
    return fewest >= FEWEST_TRIALS and (fewest >= MOST_TRIALS or not _noisy(taken))


def _noisy(taken: dict[Solver, list[_Trial]]) -> bool:
    """Return whether equal runs differ by much."""
    quartiles = [np.quantile([trial.seconds for trial in trials], [0.25, 0.5, 0.75]) for trials in taken.values()]
    return any(high - low > NOISY * middle for low, middle, high in quartiles)


def _by_processor_time(taken: dict[Solver, list[_Trial]]) -> dict[Solver, list[_Trial]]:
    """Return the trials with the seconds that they would have taken had other work slowed them all alike."""
    every_run = [trial for trials in taken.values() for trial in trials]
    busiest = max(trial.processor / max(trial.seconds, 1e-9) for trial in every_run)
    if busiest < LEAST_BUSY:  # the network runs elsewhere, or waits
        return taken
    slower = sum(trial.seconds for trial in every_run) / sum(trial.processor for trial in every_run)
    return {
        solver: [trial._replace(seconds=slower * trial.processor) for trial in trials]
        for solver, trials in taken.items()
    }


def _as_tried(candidate: Candidate, trials: Sequence[_Trial], loop: Sequence[_Trial]) -> Candidate:
    """Return a candidate as it was measured.

    Each run is compared with the loop's run of the same turn: a machine that was busy with other things when a
    candidate was tried was busy for the loop, too. Who came later was tried in the last turns.
    """
    seconds, _, rounds = np.array(trials).T
    beside = np.array([trial.seconds for trial in loop])
    if trials is not loop:
        seconds = seconds / beside[-len(seconds) :] * np.median(beside)
    low, middle, high = (float(value) for value in np.quantile(seconds, [0.1, 0.5, 0.9]))
    counts = float(np.median(rounds))
    return candidate._replace(rounds=Range(counts, counts, counts), seconds=Range(low, middle, high))
