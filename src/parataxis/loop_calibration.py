"""Calibrate the loop of somebody else, a function or a pipeline, by calls with the user's own arguments."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .calibration import (
    Calibration,
    Candidates,
    Outcome,
    Setting,
    certified,
    choose_setting,
    relative_errors,
    sequences,
)
from .fingerprint import loop_fingerprint, without_counters
from .loops.randomness import RandomState
from .loops.world import World
from .parallel import parallel

__all__ = ["calibrate_loop"]


def calibrate_loop(
    target: Callable[..., Any],
    calls: Sequence[tuple[Any, ...] | dict[str, Any]],
    candidates: Candidates = None,
    *,
    tolerance: float = 1e-2,
    coverage: float = 0.95,
    confidence: float = 0.95,
    denoisers: Sequence[nn.Module] | None = None,
) -> Calibration:
    """Measure how far the error test may be loosened for a sampling loop; see :mod:`parataxis.calibration`.

    Each call runs once as it is and once for each setting that is tried, from the same arguments (tensors are copied)
    and the same state of all that the loop reaches, generators and lists among them, with the random numbers of torch,
    numpy and Python seeded with the number of the call; all of it is put back afterwards. A call is one run, however
    many samples its batch has: its error is that of the worst. What the loop returns is compared tensor by tensor,
    array by array, image by image.

    Args:
        target: A function that runs a sampling loop, or a diffusers pipeline; as in :func:`parataxis.parallel`.
        calls: The arguments of each run: a tuple of positional ones or a dict of keyword ones, as they will be used:
            59 for the defaults. Seeds, prompts and conditions should differ as they will; what differs among them may
            be anything later, and what is the same in all of them (steps, guidance, shapes) must stay so.
        candidates: Solvers or settings; see :func:`parataxis.calibrate`.
        tolerance: Relative error that a run should keep, compared with the unmodified loop.
        coverage: Share of the runs that should keep it.
        confidence: Probability, over calibrations, that this share is kept.
        denoisers: As in :func:`parataxis.parallel`.

    Raises:
        TypeError: If the calls are not tuples or dicts.
        ValueError: If the loop cannot be solved in parallel (with the reason), returns nothing that can be compared, or
            arguments are out of range.
    """
    begun, lists = time.perf_counter(), sequences(candidates, tolerance, coverage, confidence)
    if not calls or not all(isinstance(call, (tuple, dict)) for call in calls):
        raise TypeError(
            "calls must hold the arguments of each run, a tuple of positional or a dict of keyword ones, got "
            f"{calls!r:.200}."
        )
    arguments = [((), call) if isinstance(call, dict) else (call, {}) for call in calls]
    facts = [loop_fingerprint(target, args, kwargs) for args, kwargs in arguments]
    exact = []
    for number, (args, kwargs) in enumerate(arguments):
        with _same_start(target, args, kwargs, number) as (own_args, own_kwargs):
            exact.append(_numbers(target(*own_args, **own_kwargs)))
    evaluations, steps = 0, 0

    def outcomes(setting: Setting) -> list[Outcome]:
        nonlocal evaluations, steps
        run = parallel(target, setting.solver, tolerance=tolerance * setting.scale, denoisers=denoisers)
        ran = []
        for number, ((args, kwargs), expected) in enumerate(zip(arguments, exact, strict=True)):
            with warnings.catch_warnings(), _same_start(target, args, kwargs, number) as (own_args, own_kwargs):
                warnings.simplefilter("ignore", RuntimeWarning)  # that it was slow, or ran as it is: said below
                value = _numbers(run(*own_args, **own_kwargs))
            report = run.report
            if report.mode == "sequential":
                raise ValueError(f"this loop runs sequentially, so there is nothing to calibrate: {report.reason}")
            steps, evaluations = report.steps, evaluations + report.evaluations
            errors = [error for pair in zip(value, expected, strict=True) for error in _errors(*pair, report.samples)]
            work = report.evaluations / max(report.steps * report.samples, 1)
            ran.append(Outcome(max(errors), report.error_estimate, report.rounds, work))
        return ran

    chosen, quantile, trials = choose_setting(lists, outcomes, tolerance, coverage, confidence, 10**9)
    last_args, last_kwargs = arguments[-1]
    facts.append(loop_fingerprint(target, last_args, last_kwargs))
    return certified(
        lists,
        (chosen, quantile, trials),
        tolerance=tolerance,
        coverage=coverage,
        confidence=confidence,
        runs=len(calls),
        fingerprint=without_counters(*facts),
        evaluations=evaluations + steps * len(calls),
        seconds=time.perf_counter() - begun,
    )


@contextmanager
def _same_start(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Give copies of arguments; put back afterwards what a run has written and drawn, wherever the loop reaches it."""
    world = World([("the loop", target), ("an argument", args), ("an argument", kwargs)])
    random_state = RandomState(world.random)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # what the loop may use
    random.seed(seed)
    try:
        yield tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    finally:
        random_state.restore()
        world.restore()


def _numbers(value: Any) -> list[Tensor]:
    """Return the tensors, arrays and images in what a loop returned, as tensors."""
    numbers: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            numbers.append(leaf.detach().cpu())
        elif isinstance(leaf, np.ndarray) or hasattr(leaf, "getbands"):  # an image of Pillow
            numbers.append(torch.from_numpy(np.array(leaf)))
    numbers = [tensor for tensor in numbers if tensor.numel() and not tensor.is_complex()]
    if not numbers:
        raise ValueError(
            f"the loop returned {type(value).__name__}, without a tensor, array or image: return what is to be "
            "compared."
        )
    return numbers


def _errors(x: Tensor, exact: Tensor, samples: int) -> list[float]:
    """Return the relative error of every sample, where the first dimension is that of the batch, or of the whole."""
    if x.shape != exact.shape:
        raise ValueError(f"the loop returned {tuple(exact.shape)} and then {tuple(x.shape)} for the same arguments.")
    batched = x.ndim > 1 and len(x) == samples
    return relative_errors(x, exact) if batched else relative_errors(x.reshape(1, -1), exact.reshape(1, -1))
