"""SRDS: the ticks of its data flow, its exactness, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.denoisers import mixture
from parataxis.solvers.block_schedule import BlockSchedule


def ticks(steps, count=1, name="ddim", tolerance=1e-2, seed=0, **options):
    sampler = px.SAMPLERS[name](steps=steps)
    network = mixture(64, 10, power=0.0).network(px.vp())
    noise = problems.noise(count, shape=(64,), seed=seed)
    solver = px.Parareal(**options)
    return px.sample(network, noise, sampler, solver, tolerance=tolerance, generator=problems.generators(count))


def test_without_the_pipeline_blocks_wait_for_the_sweep():
    """A coarse step is taken in the round in which its state is known; the other steps come behind all of these."""
    options = {"limit": 3, "width": None, "lagged": False, "guessed": False}
    first = {
        pipelined: [
            tick.steps.tolist()
            for tick in itertools.islice(BlockSchedule([0, 4, 8, 12], pipelined=pipelined, **options).ticks(), 4)
        ]
        for pipelined in (False, True)
    }
    assert first[False] == [[0], [1, 4], [2, 8], [3, 5, 9]]
    assert first[True] == [[0], [1, 4], [2, 5, 8], [3, 6, 9]]


@pytest.mark.parametrize(("steps", "blocks"), [(1, 1), (3, 3), (12, 6), (50, 12), (300, 30)])
def test_default_blocks_are_the_root_of_three_times_the_steps(steps, blocks):
    """So two iterations take the fewest rounds; each block has as many steps as the others, to within one."""
    bounds = px.Parareal().bounds(steps)
    assert len(bounds) == blocks + 1
    assert (bounds[0], bounds[-1]) == (0, steps)
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 1


@pytest.mark.parametrize(
    ("steps", "blocks", "iterations", "expected"),
    [(25, 5, 1, 9), (25, 5, 3, 17), (100, 10, 1, 19), (100, 10, 3, 37), (961, 31, 1, 61), (961, 31, 3, 121)],
)
def test_pipelined_ticks_are_those_of_the_formula(steps, blocks, iterations, expected):
    length = steps // blocks
    assert expected == iterations * length + blocks - iterations
    result = ticks(steps, blocks=blocks, iterations=iterations, rule="none")
    assert result.rounds == expected
    evaluations = sum(steps - q * length for q in range(iterations)) + blocks - iterations
    assert result.evaluations == evaluations
    assert result[0].peak_width <= blocks


@pytest.mark.parametrize(("steps", "blocks"), [(25, 5), (23, 7), (50, 9), (10, 10), (12, 1), (100, 17)])
def test_with_the_stop_test_off_the_pipeline_takes_exactly_n_rounds(steps, blocks):
    for width in (None, 1, 2, 5):
        result = ticks(steps, blocks=blocks, rule="none", width=width)
        assert result.rounds == steps
        assert result[0].peak_width <= (width or blocks)


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("limit", [None, 1, 2, 3])
def test_no_schedule_takes_more_than_n_rounds(pipelined, limit):
    """Whatever the blocks, the limits and the guess; without numbers, as the schedule depends on none."""
    for steps in range(1, 41):
        default = px.Parareal().bounds(steps)
        for blocks in {len(default) - 1, 1, 2, 3, 5, steps // 2, steps - 1, steps} & set(range(1, steps + 1)):
            bounds = px.Parareal(blocks=blocks).bounds(steps)
            for width, guessed in itertools.product((None, 1, 3), (False, True)):
                schedule = BlockSchedule(
                    bounds,
                    min(limit or blocks, blocks),
                    width=width,
                    pipelined=pipelined,
                    lagged=True,
                    guessed=guessed,
                )
                assert 1 <= sum(1 for _ in schedule.ticks()) <= steps


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_without_the_pipeline_the_sample_is_sequential_within_its_estimate(name):
    for steps in (1, 2, 3, 4, 5, 7, 8, 9, 11, 25, 40):
        expected = problems.reference("power law", name, steps)
        for tolerance in (1e-2, 1e-4, 0):
            result = problems.solve("power law", name, steps, px.Parareal(pipelined=False), tolerance=tolerance)
            assert result.rounds <= steps
            errors = (result.x - expected).norm(dim=1) / expected.norm(dim=1)
            for error, one in zip(errors.tolist(), result, strict=True):
                assert error <= one.error_estimate + 1e-10 <= tolerance + 2e-10


def test_two_iterations_of_a_block_may_begin_at_once():
    """Each keeps a coarse step of its own then, and the block that of the later one."""
    bounds = px.Parareal().bounds(60)
    schedule = BlockSchedule(bounds, len(bounds) - 1, width=3, pipelined=True, lagged=False, guessed=False)
    together = [tick for tick in schedule.ticks() if len(set(tick.blocks)) < len(tick.blocks)]
    assert together
    for tick in together:
        assert len(set(tick.coarse)) == len(tick.first)
        assert sorted(tick.latest_blocks) == sorted(set(tick.blocks))
        for index, block in zip(tick.latest, tick.latest_blocks, strict=True):
            others = [
                tick.iterations[row] for row, other in zip(tick.first, tick.blocks, strict=True) if other == block
            ]
            assert tick.iterations[tick.first[index]] == max(others)


def test_samples_that_are_answered_apart_are_those_of_a_batch():
    """Each run is answered alone, one more often than the others."""
    sampler, network = problems.sampler("ddpm", 25), problems.network("power law", "ddpm")
    times = sampler.network_times(torch.float64)
    for solver in (px.Parareal(), px.Parareal(width=3), px.Parareal(pipelined=False)):
        expected = problems.solve("power law", "ddpm", 25, solver, count=3)
        runs = px.start(sampler, sampler.recurrence(problems.noise(3), problems.generators(3)), solver)
        while not all(run.done for run in runs):
            for run in [runs[0], *runs]:
                if not run.done:
                    run.answer(network(run.query.x, times[run.query.step]))
        for run, one in zip(runs, expected, strict=True):
            assert (run.rounds, run.evaluations) == (one.rounds, one.evaluations)
            assert problems.relative(run.solution.x[None], one.x[None]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pipelined", [True, False])
def test_parareal_is_exact_after_as_many_iterations_as_blocks(pipelined, dtype):
    sampler = px.samplers.ddim(steps=30)
    exact = mixture(32, 6).network(px.vp())

    def network(x, t):
        return exact(x.float(), t).to(dtype)

    noise = problems.noise(2, dtype, shape=(32,))
    sequential = px.sample(network, noise, sampler, px.Sequential()).x
    result = px.sample(network, noise, sampler, px.Parareal(blocks=6, pipelined=pipelined, rule="none"))
    assert torch.equal(result.x, sequential)
    assert result[0].error_estimate == 0.0


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("coarse", ["hop", "two-step"])
@pytest.mark.parametrize("width", [None, 3])
def test_every_admitted_sampler_ends_at_its_own_sequential_sample(name, coarse, width):
    for points in (25, 40):
        solver = px.Parareal(coarse=coarse, width=width)
        result = problems.solve("power law", name, points, solver, tolerance=0)
        assert problems.relative(result.x, problems.reference("power law", name, points)) <= 1e-10
        assert result.rounds <= points


def test_published_stop_test_takes_the_published_ticks():
    """The published stop test takes the published ticks."""
    for steps, expected in ((25, 20), (100, 43)):
        result = ticks(steps, 8, blocks=math.isqrt(steps), rule="srds")
        assert abs(np.mean([one.rounds for one in result]) - expected) <= 6
    for steps, most in ((25, 16), (100, 28)):
        best = min(
            np.mean([one.rounds for one in ticks(steps, 8, blocks=blocks, rule="srds", coarse="two-step")])
            for blocks in (
                math.isqrt(steps),
                round(1.5 * steps**0.5),
                round(3**0.5 * steps**0.5),
                2 * math.isqrt(steps),
            )
        )
        assert best <= most


def test_published_stop_test_compares_the_mean_change_with_its_threshold():
    """The first sample that moved by no more is the last."""
    samples = [ticks(49, blocks=7, rule="none", iterations=p).x for p in range(1, 6)]
    moved = [float((after - before).abs().mean()) for before, after in itertools.pairwise(samples)]
    for p, (before, change) in enumerate(itertools.pairwise(moved), 1):
        assert change < 0.5 * before
        result = ticks(49, blocks=7, rule="srds", threshold=0.5 * before)
        torch.testing.assert_close(result.x, samples[p + 1])


def test_noise_of_the_block_makes_the_coarse_step_good_for_stochastic_samplers():
    """The noise of the block makes the coarse step good for stochastic samplers."""
    result = ticks(100, 4, name="ddpm", blocks=10)
    assert np.mean([one.rounds for one in result]) <= 42


def test_sample_that_stands_still_is_as_certain_as_the_boundaries_before_it():
    """The network ends at the same point from wherever it comes; the states on the way are still changing."""
    point, cut = torch.linspace(-1, 1, problems.DIM, dtype=torch.float64), 300

    def network(x, t):
        alpha, sigma = (torch.from_numpy(values)[:, None] for values in px.vp().alpha_sigma(t.numpy()))
        return torch.where(t[:, None] < cut, (x - alpha * point) / sigma, torch.tanh(x))

    for solution in px.sample(network, problems.noise(2), px.samplers.ddim(steps=48), px.Parareal(blocks=8)):
        assert solution.x == pytest.approx(point, abs=1e-9)
        assert solution.converged
        assert 1e-6 < solution.error_estimate <= 1e-2


def test_guess_replaces_the_first_sweep():
    """A guess replaces the first sweep."""
    sampler = px.samplers.ddim(steps=49)
    network = mixture(32, 6).network(px.vp())
    noise = problems.noise(2, shape=(32,))
    kept = px.sample(network, noise, sampler, px.Sequential(), keep_trajectory=True)
    cold = px.sample(network, noise, sampler, px.Parareal(blocks=7), tolerance=1e-4)
    warm = px.sample(network, noise, sampler, px.Parareal(blocks=7), tolerance=1e-4, guess=kept.trajectory)
    assert warm.rounds < cold.rounds
    assert problems.relative(warm.x, kept.x) <= 1e-10
    assert px.sample(network, noise, sampler, px.Parareal(), keep_trajectory=True).trajectory is None


def test_early_end_returns_what_is_known_of_the_sample():
    """An early end returns what is known of the sample."""
    sampler, network = px.samplers.ddim(steps=50), mixture(64, 10, power=0.0).network(px.vp())
    noise = problems.noise(2, shape=(64,))
    expected = px.sample(network, noise, sampler, px.Sequential()).x
    for unknown in (False, True):
        if unknown:  # without data predictions the end of the farthest hop stands for the sample
            sampler = dataclasses.replace(
                sampler, coefficients=dataclasses.replace(sampler.coefficients, x0_from_input=None, x0_from_output=None)
            )
        errors = []
        for most in (1, 4, 12, 16, 24):
            ended = px.sample(network, noise, sampler, px.Parareal(), tolerance=0, stop=px.stopping.rounds(most))
            assert all(one.rounds == most and one.error_estimate == math.inf for one in ended)
            errors.append(problems.relative(ended.x, expected))
        if not unknown:
            assert errors[0] <= 1.05
        assert errors[-2] < errors[0]
        assert errors[-1] <= 0.05


def test_what_parareal_refuses_raises():
    """What parareal refuses is said with the reason."""
    noise = problems.noise(1)
    for name, options, message in [
        ("heun", {}, "one-step sampler, or one earlier output that is a data prediction"),
        ("ddim", {"blocks": 30}, "blocks=30 is more than the 25 steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            px.sample(problems.network("power law", name), noise, problems.sampler(name, 25), px.Parareal(**options))
    for options, message in [
        ({"pipelined": "no"}, "pipelined must be True or False, got 'no'"),
        ({"blocks": 0}, "blocks must be a whole number of at least 1, or None, got 0"),
        ({"width": 1.5}, "width must be"),
        ({"iterations": -1}, "iterations must be"),
        ({"coarse": "none"}, "coarse must be 'hop' or 'two-step'"),
        ({"rule": "always"}, "rule must be 'change', 'srds' or 'none'"),
        ({"threshold": -0.1}, "threshold must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            px.Parareal(**options)
