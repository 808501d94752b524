"""Schedules: grids, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

import parataxis as px


@pytest.mark.parametrize("schedule", [px.vp(), px.cosine(), px.vp(400, 0.00085, 0.012, "scaled_linear")])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_grids_fall_from_noise_to_the_sample(schedule, spacing):
    for steps in (1, 7, 50, schedule.training_steps):
        grid = schedule.grid(steps, spacing)
        assert grid.times.shape == (steps,)
        assert bool((np.diff(grid.times) < 0).all())
        assert bool((np.diff(grid.sigma / grid.alpha) < 0).all())
        assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)
        assert np.allclose(grid.alpha**2 + grid.sigma**2, 1)


def test_levels_and_times_are_inverse():
    schedule = px.vp()
    times = np.array([3.0, 500.0, 998.0])
    alpha, sigma = schedule.alpha_sigma(times)
    assert np.allclose(schedule.times_of(sigma / alpha), times)
    alpha, sigma = px.karras().alpha_sigma(np.log(np.array([0.5, 10.0])) / 4)
    assert np.allclose(sigma, [0.5, 10.0])


def test_shift_spends_more_steps_at_high_noise():
    plain, shifted = px.flow().grid(10), px.flow(3.0).grid(10)
    assert bool((shifted.sigma[1:-1] > plain.sigma[1:-1]).all())
    assert np.allclose(shifted.alpha + shifted.sigma, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: px.vp().grid(0), "steps must be an integer of at least 1, got 0"),
        (lambda: px.vp().grid(2.5), "got 2.5"),
        (lambda: px.vp().grid(1001), "at most the 1000 training steps of this schedule, got 1001"),
        (lambda: px.flow().grid(2000), "at most the 1000 training steps"),
        (lambda: px.vp().grid(10, "log"), "spacing must be 'trailing', 'leading' or 'linspace', got 'log'"),
        (lambda: px.vp().grid(10, "leading", 200), "beyond 999"),
        (lambda: px.vp().grid(10, "leading", -5), "offset -5 puts the last time at -5, before 0"),
        (lambda: px.vp().grid(10, "leading", 1.5), "offset must be an integer number of training steps, got 1.5"),
        (lambda: px.vp(beta_start=2.0), r"beta_start must be in \(0, 1\), got 2.0"),
        (lambda: px.vp(beta_end=float("nan")), r"beta_end must be in \(0, 1\), got nan"),
        (lambda: px.flow("a"), "shift must be positive, got 'a'"),
        (lambda: px.karras(sigma_max=float("inf")), "0 < min < max, got 0.002 and inf"),
        (lambda: px.karras(rho=0), "rho must be positive, got 0"),
        (lambda: px.flow().grid(10, "leading"), "spacing of a flow"),
        (lambda: px.vp(shape="cosine"), "shape must be 'linear' or 'scaled_linear'"),
        (lambda: px.flow(0), "shift must be positive"),
        (lambda: px.karras(1.0, 0.5), "0 < min < max"),
        (lambda: px.samplers.ddim(eta=2.0), r"eta must be in \[0, 1\], got 2.0"),
        (lambda: px.samplers.ddim(eta="a"), r"eta must be in \[0, 1\], got 'a'"),
        (lambda: px.samplers.ddim(clip="a"), "clip must be positive, got 'a'"),
        (lambda: px.samplers.ddim(clip=True), "clip must be positive, got True"),
        (lambda: px.samplers.ddim(final="last"), "final must be 'zero' or 'first'"),
        (lambda: px.samplers.ddim(clip=-1), "clip must be positive"),
        (lambda: px.samplers.ddim(clip=1, quantile=0.9), "clip or quantile, not both"),
        (lambda: px.samplers.ddim(quantile=1.5), r"quantile must be in \(0, 1\]"),
        (lambda: px.samplers.ddim(prediction="noise"), "prediction must be 'eps', 'x0', 'v', 'flow' or 'edm'"),
        (
            lambda: px.samplers.ddpm(variance="learned"),
            "a learned variance scales the noise by a function of the output",
        ),
        (lambda: px.samplers.euler_ancestral(eta=-1), "eta must be at least 0"),
        (lambda: px.samplers.euler(px.karras(), karras=True), "karras=True needs a schedule with training steps"),
        (lambda: px.samplers.dpmpp_2m(px.flow(), karras=True, spacing="trailing"), "karras=True needs"),
    ],
)
def test_what_a_schedule_or_sampler_refuses_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", px.SAMPLERS.values())
@pytest.mark.parametrize("schedule", ["vp", 1000, px.vp, px.samplers.schedules.Karras])
def test_what_is_no_schedule_is_named(sampler, schedule):
    with pytest.raises(TypeError, match=r"schedule must be a schedule, such as parataxis.vp\(\), got "):
        sampler(schedule, steps=20)
