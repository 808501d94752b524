"""ParaDiGMS as published, and the traps of its implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.denoisers import mixture

PUBLISHED = {"rule": "paradigms", "entry": "copy"}


def paradigms(network, noise, sampler, drawn, window, threshold):
    """The published loop, written out for one sample: every x in full, one step at a time."""
    local, steps = sampler.coefficients, sampler.steps
    times = sampler.network_times(noise.dtype)
    x = noise.expand(steps + 1, -1).clone()
    alpha, sigma = local.alpha, local.sigma
    variance = [0.0] * (steps + 1)
    for i in range(steps - 1):
        ratio = 1 - (alpha[i] / alpha[i + 1]) ** 2
        variance[i + 1] = (sigma[i + 1] / sigma[i]) ** 2 * ratio
    lo, hi, rounds = 0, min(window, steps), 0
    while lo < steps:
        points = torch.arange(lo, hi)
        outputs = network(x[lo:hi], times[points])
        rounds += 1
        new = x.clone()
        for k in range(lo, hi):
            step = local.state_weight[k] * x[k] + local.output_weight[k, 0] * outputs[k - lo] + drawn[k]
            new[k + 1] = new[k] + (step - x[k])
        passed = 0
        for j in range(lo + 1, hi + 1):
            if not ((new[j] - x[j]).square().sum() <= threshold**2 * noise.numel() * variance[j]):
                break
            passed += 1
        x[lo + 1 : hi + 1] = new[lo + 1 : hi + 1]
        lo += min(passed + 1, hi - lo)
        last = min(lo + window, steps)
        x[hi + 1 : last + 1] = x[hi]
        hi = last
    return x[-1], rounds


@pytest.mark.parametrize("window", [1, 10, 64])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_published_rule_is_the_published_loop(name, window):
    """The published rule is the published loop."""
    sampler = px.SAMPLERS[name](px.vp(), 50)
    network = mixture(32, 6).network(px.vp())
    noise = problems.noise(3, shape=(32,))
    table = sampler.recurrence(noise, problems.generators(3))
    drawn = table.noise if table.noise is not None else torch.zeros(3, 50, 32, dtype=torch.float64)
    result = px.sample(network, noise, sampler, px.Picard(window=window, **PUBLISHED), generator=problems.generators(3))
    for b in range(3):
        x, rounds = paradigms(network, noise[b], sampler, drawn[b], window, 0.1)
        assert result[b].rounds == rounds
        assert problems.relative(result[b].x[None], x[None]) <= 1e-9


@pytest.mark.parametrize(("steps", "rounds"), [(50, 7.0), (100, 8.0)])
def test_rounds_of_the_published_rule_on_a_mixture_of_256_dimensions(steps, rounds):
    sampler = px.samplers.ddim(steps=steps)
    network = mixture(256, 10).network(px.vp())
    noise = problems.noise(4, torch.float32, shape=(256,))
    result = px.sample(network, noise, sampler, px.Picard(**PUBLISHED))
    assert abs(np.mean([one.rounds for one in result]) - rounds) <= 1.0


def test_2m_keeps_its_history_across_window_edges():
    sampler = px.samplers.dpmpp_2m(steps=50)
    network = mixture(32, 6).network(px.vp())
    noise = problems.noise(2, shape=(32,))
    sequential = px.sample(network, noise, sampler, px.Sequential()).x
    for solver in (px.Picard(window=8), px.Picard(window=8, threshold=1e-9, **PUBLISHED)):
        result = px.sample(network, noise, sampler, solver, tolerance=1e-8)
        assert problems.relative(result.x, sequential) <= 1e-7


def test_change_of_zero_passes_where_the_variance_is_zero():
    # v_N = 0: 0 <= 0 must pass, so the last state costs no extra round once it stands still.
    """A change of zero passes where the variance is zero."""
    sampler = px.samplers.ddim(steps=20)

    def constant(x, t):
        return torch.zeros_like(x)

    noise = problems.noise(1)
    result = px.sample(constant, noise, sampler, px.Picard(threshold=0.0, **PUBLISHED))
    assert problems.relative(result.x, px.sample(constant, noise, sampler, px.Sequential()).x) <= 1e-12


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_no_spacing_or_training_length_is_hard_wired(spacing):
    schedule = px.vp(400)
    sampler = px.samplers.ddpm(schedule, 37, spacing=spacing)
    network = mixture(16, 4).network(schedule)
    noise = problems.noise(2)
    runs = [
        px.sample(network, noise, sampler, solver, generator=problems.generators(2), tolerance=0).x
        for solver in (px.Sequential(), px.Picard(window=8))
    ]
    assert problems.relative(runs[1], runs[0]) <= 1e-10


def test_last_level_is_the_sampler_s_own():
    """The last level is the sampler s own."""
    for final in ("zero", "first"):
        sampler = px.samplers.ddim(steps=20, final=final)
        assert sampler.coefficients.sigma[-1] == (0.0 if final == "zero" else px.vp().alpha_sigma(np.zeros(1))[1][0])
        network = mixture(16, 4).network(px.vp())
        noise = problems.noise(2)
        sequential = px.sample(network, noise, sampler, px.Sequential()).x
        assert problems.relative(px.sample(network, noise, sampler, px.Picard()).x, sequential) <= 1e-2


def test_every_sample_of_a_batch_has_its_own_window():
    result = problems.solve("power law", "ddim", 100, px.Picard(window=16), count=6, tolerance=1e-4)
    assert len({one.rounds for one in result}) > 1


def test_rolling_in_takes_fewer_evaluations_than_copying():
    sampler = px.samplers.ddim(steps=200)
    network = mixture(64, 10).network(px.vp())
    noise = problems.noise(4, shape=(64,))
    rolled, copied = (
        px.sample(network, noise, sampler, px.Picard(window=20, entry=entry), tolerance=1e-3)
        for entry in ("extrapolate", "copy")
    )
    assert rolled.rounds < copied.rounds
    assert rolled.evaluations < 0.9 * copied.evaluations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of steps, at least 1, or None for all, got 0"),
        ({"window": 2.5}, "got 2.5"),
        ({"rule": "published"}, "rule must be 'error' or 'paradigms', got 'published'"),
        ({"entry": "guess"}, "entry must be 'extrapolate' or 'copy', got 'guess'"),
        ({"threshold": -1}, "threshold must be at least 0, got -1"),
        ({"threshold": float("nan")}, "threshold must be at least 0, got nan"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        px.Picard(**options)
