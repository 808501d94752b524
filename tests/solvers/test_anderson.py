"""ParaTAA: its fixed points, its accelerations, its published test, and the faults of its released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.denoisers import mixture

RESIDUAL = {"rule": "residual", "threshold": 1e-3}


def rounds(solver, name, steps, count=4, **options):
    sampler = px.SAMPLERS[name](steps=steps)
    network = mixture(64, 10, power=0.0).network(px.vp())
    noise = problems.noise(count, shape=(64,))
    result = px.sample(network, noise, sampler, solver, generator=problems.generators(count), **options)
    return float(np.mean([one.rounds for one in result]))


@pytest.mark.parametrize(
    ("name", "steps", "options", "published"),
    [
        ("ddim", 50, {"order": 1, "acceleration": "none"}, 38.5),
        ("ddim", 50, {"acceleration": "none"}, 14.0),
        ("ddim", 100, {"acceleration": "none"}, 14.0),
        ("ddim", 50, {}, 9.0),
        ("ddim", 100, {}, 9.0),
        ("ddpm", 100, {"acceleration": "none"}, 33.0),
        ("ddpm", 100, {}, 19.5),
    ],
)
def test_rounds_to_the_published_tolerance_are_those_published_within_two(name, steps, options, published):
    assert abs(rounds(px.Anderson(**options, **RESIDUAL), name, steps) - published) <= 2.0


def test_fixed_points_of_order_k_are_the_truncated_series():
    # Order 1 is every state's own sequential step: one more state is exact after every round, from any guess.
    sampler = px.samplers.ddim(steps=12)
    network = problems.network("power law", "ddim")
    noise = problems.noise(1)
    exact = px.sample(network, noise, sampler, px.Sequential(), keep_trajectory=True).trajectory
    solver = px.Anderson(order=1, acceleration="none")
    result = px.sample(network, noise, sampler, solver, tolerance=0, keep_trajectory=True)
    assert torch.allclose(result.trajectory, exact, rtol=1e-10)
    fast, slow = (rounds(px.Anderson(order=k, acceleration="none"), "ddim", 50, tolerance=1e-3) for k in (None, 3))
    assert fast < slow


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_longer_histories_in_a_sliding_window_are_never_much_worse(name):
    base = rounds(px.Anderson(window=20, order=20, **RESIDUAL), name, 100)
    for history in (3, 5):
        assert rounds(px.Anderson(window=20, order=20, history=history, **RESIDUAL), name, 100) <= 1.1 * base


def test_triangular_acceleration_beats_the_others_on_stochastic_samplers():
    triangular = rounds(px.Anderson(**RESIDUAL), "ddpm", 100)
    for other in ("none", "anderson", "prefix"):
        assert triangular < rounds(px.Anderson(acceleration=other, **RESIDUAL), "ddpm", 100)


def test_relative_ridge_does_not_fade_with_the_residual():
    """An absolute one turns into no acceleration once the differences are small against it."""
    relative = rounds(px.Anderson(ridge=1e-3), "ddim", 50, tolerance=1e-8)
    absolute = rounds(px.Anderson(ridge=1e-3, absolute=True), "ddim", 50, tolerance=1e-8)
    none = rounds(px.Anderson(acceleration="none"), "ddim", 50, tolerance=1e-8)
    assert relative + 2 < absolute
    assert rounds(px.Anderson(ridge=1.0, absolute=True), "ddim", 50, tolerance=1e-8) == none


def test_memory_of_two_rounds_is_bounded_in_trajectories():
    from meter import measure

    sampler = px.samplers.ddim(steps=50)
    figures = measure(sampler, px.Anderson(), 1, shape=(4, 16, 16))
    assert figures["windows"] <= 15


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "heun", "flow_euler", "euler_ancestral"])
@pytest.mark.parametrize("acceleration", ["none", "anderson", "prefix", "triangular"])
def test_every_acceleration_ends_at_the_sequential_sample_in_n_rounds(name, acceleration):
    for options in ({}, {"window": 7, "order": 4, "history": 4}):
        solver = px.Anderson(acceleration=acceleration, **options)
        result = problems.solve("power law", name, 25, solver, tolerance=0)
        assert problems.relative(result.x, problems.reference("power law", name, 25)) <= 1e-10
        assert result.rounds <= result[0].steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "order must be at least 1"),
        ({"history": 0}, "history must be a whole number of rounds"),
        ({"acceleration": "newton"}, "acceleration must be 'triangular'"),
        ({"ridge": -1.0}, "ridge must be at least 0"),
        ({"rule": "rms"}, "rule must be 'error' or 'residual'"),
        ({"threshold": -1.0}, "threshold must be at least 0"),
        ({"entry": "x"}, "entry must be 'extrapolate' or 'copy'"),
        ({"window": -3}, "window must be a whole number"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        px.Anderson(**options)
