"""The solver's own work is bounded: operations a round and memory, counted."""

from __future__ import annotations

import dataclasses

import pytest

import parataxis as px
import problems
from meter import measure

SOLVERS = [solver for solver in problems.variants() if getattr(solver, "window", None) == 8]
EXACT_IN_LAW = [px.Speculative(window=8), px.Speculative(window=8, verification="block")]
PAIRS = [(solver, name) for solver in SOLVERS for name in ("ddim", "ddpm", "dpmpp_2m")]
PAIRS += [(solver, name) for solver in EXACT_IN_LAW for name in ("ddpm", "euler_ancestral")]


@pytest.mark.parametrize(("solver", "name"), PAIRS, ids=str)
def test_operations_a_round_depend_neither_on_n_nor_on_the_number_of_samples(solver, name):
    figures = [
        measure(px.SAMPLERS[name](steps=steps), solver, count, shape=(4, 16, 16))["operations_a_round"]
        for steps, count in ((40, 1), (40, 6), (200, 1))
    ]
    assert max(figures) <= 150
    # Among more samples fewer rounds pass in which no run moves its window.
    assert max(figures) <= 1.2 * min(figures)


# Windows of memory besides one trajectory: six, and more where the round before is kept.
WINDOWS = {px.Picard: 6, px.Anderson: 8, px.Secant: 7}


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_memory_is_bounded_in_windows_and_a_trajectory(solver, name):
    width = 16
    figures = measure(px.SAMPLERS[name](steps=100), dataclasses.replace(solver, window=width), 2, shape=(4, 16, 16))
    # The noise of a stochastic sampler is not in "windows"; everything else is, start and rings of W + 1 included.
    assert figures["windows"] <= WINDOWS[type(solver)] + (0 if name == "ddpm" else 100 / width)


@pytest.mark.parametrize("solver", EXACT_IN_LAW, ids=repr)
def test_memory_of_solvers_exact_in_law_is_bounded_in_windows(solver):
    width = 16
    figures = measure(px.SAMPLERS["ddpm"](steps=100), dataclasses.replace(solver, window=width), 2, shape=(4, 16, 16))
    # Drawing new noise for blocks takes a copy of the noise of all steps, so that the caller's table stays as it is.
    assert figures["windows"] <= 8.5 + (100 / width if solver.verification == "block" else 0)
