"""Solvers that are exact in law: their rounds, their answers, and two-sample tests of what they draw."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.solvers import coupling, speculative

VARIANTS = problems.law_exact()
NAMES = [name for name in px.SAMPLERS if problems.sampler(name, 10).coefficients.noise_std.any()]
WIDE = [solver for solver in VARIANTS if solver.window != 1]
SHORT = [solver for solver in VARIANTS if solver.window == 4]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
def test_round_settles_a_state_so_n_rounds_are_enough(solver, name):
    """A round settles a state so n rounds are enough."""
    for points in (2, 3, 25):
        for one in problems.solve("data set", name, points, solver, count=3):
            assert one.converged
            assert one.rounds <= one.steps == points
            fronts = [round_.accepted for round_ in one.history]
            assert all(after > before for before, after in itertools.pairwise(fronts))


@pytest.mark.parametrize("solver", WIDE, ids=repr)
def test_much_noise_and_many_steps_need_far_fewer_rounds(solver):
    result = problems.solve("power law", "ddpm", 200, solver, count=4)
    assert result.rounds <= 100
    assert result.evaluations <= 4 * 200 * (2 if solver.window else 5)


def test_acceptance_is_drawn_from_the_generator_of_its_sample():
    """The same noise and other generators give other samples; the same generator gives the same one."""
    sampler, network = problems.sampler("ddpm", 25), problems.network("power law", "ddpm")
    times, samples = sampler.network_times(torch.float64), []
    for seed in (0, 1, 2, 2):
        recurrence = sampler.recurrence(problems.noise(1), problems.generators(1))
        generator = [torch.Generator().manual_seed(seed)]
        runs = px.start(sampler, recurrence, px.Speculative(window=8, proposal="fresh"), generator=generator)
        for _ in px.drive(runs, lambda rows: network(rows.x, times[rows.step])):
            pass
        samples.append(runs[0].solution.x)
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])
    assert torch.equal(samples[2], samples[3])


def test_block_that_is_rejected_draws_new_noise():
    """What was seen of the noise has been decided on: used again, the law would be another. The caller's stays."""
    sampler, network = problems.sampler("ddpm", 25), problems.network("power law", "ddpm")
    times = sampler.network_times(torch.float64)
    recurrence = sampler.recurrence(problems.noise(1), problems.generators(1))
    before = recurrence.noise.clone()
    solver = px.Speculative(window=8, verification="block")
    runs = px.start(sampler, recurrence, solver, generator=[torch.Generator().manual_seed(0)])
    for _ in px.drive(runs, lambda rows: network(rows.x, times[rows.step])):
        pass
    noise = runs[0].state_dict()["noise"]
    assert bool((noise != before[0].flatten(1)).any())
    assert torch.equal(recurrence.noise, before)


def test_latest_proposals_need_fewer_rounds_than_fresh_ones():
    latest, fresh = (
        sum(one.rounds for one in problems.solve("power law", "ddpm", 200, px.Speculative(proposal=kind), count=8))
        for kind in ("latest", "fresh")
    )
    assert latest <= 0.8 * fresh


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
def test_every_query_lies_on_the_loop_within_the_width(solver, name):
    sampler = problems.sampler(name, 25)
    network, times = problems.network("power law", name), sampler.network_times(torch.float64)
    runs = px.start(sampler, sampler.recurrence(problems.noise(3), problems.generators(3)), solver)
    width = problems.bound(solver, sampler.steps)

    def evaluate(rows):
        for run in runs:
            own = rows.step[rows.sample == run.place].tolist()
            assert own == list(range(run.accepted, run.accepted + len(own)))
            assert len(own) <= width
            assert not own or own[-1] < sampler.steps
        return network(rows.x, times[rows.step])

    for _ in px.drive(runs, evaluate):
        pass
    assert all(run.done and run.accepted == 25 for run in runs)


@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
def test_same_inputs_give_the_same_bits(solver):
    """The same inputs give the same bits."""
    first, second = (problems.solve("power law", "ddpm", 25, solver, keep_trajectory=True) for _ in range(2))
    assert torch.equal(first.trajectory, second.trajectory)
    assert [one.history for one in first] == [one.history for one in second]
    one, other, third = (
        px.sample(
            problems.network("power law", "ddpm"),
            problems.noise(2),
            problems.sampler("ddpm", 25),
            solver,
            generator=torch.Generator().manual_seed(seed),
        ).x
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
def test_sample_alone_is_the_sample_in_a_batch(solver, name):
    """A sample alone is the sample in a batch."""
    batch = problems.solve("data set", name, 25, solver, count=4)
    for index in range(4):
        alone = px.sample(
            problems.network("data set", name),
            problems.noise(4)[index, None],
            problems.sampler(name, 25),
            solver,
            generator=problems.generators(4)[index : index + 1],
        )
        assert problems.relative(alone.x, batch.x[index, None]) <= 1e-12
        assert alone[0].history == batch[index].history


@pytest.mark.parametrize("solver", [solver for solver in VARIANTS if solver.window == 1], ids=repr)
def test_window_one_is_the_sequential_loop(solver):
    for generator in (torch.Generator().manual_seed(3), problems.generators(2)):
        network, noise, sampler = problems.network("power law", "ddpm"), problems.noise(2), problems.sampler("ddpm", 25)
        states = [one.get_state() for one in ([generator] if isinstance(generator, torch.Generator) else generator)]
        result = px.sample(network, noise, sampler, solver, generator=generator)
        for one, state in zip([generator] if len(states) == 1 else generator, states, strict=True):
            one.set_state(state)
        expected = px.sample(network, noise, sampler, px.Sequential(), generator=generator)
        assert problems.relative(result.x, expected.x) <= 1e-12


def test_solvers_that_are_not_exact_in_distribution_draw_nothing_but_the_noise():
    """Solvers that are not exact in law draw nothing but the noise."""
    network, noise, sampler = problems.network("power law", "ddpm"), problems.noise(2), problems.sampler("ddpm", 25)
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    px.sample(network, noise, sampler, px.Picard(), generator=first)
    sampler.recurrence(noise, second)
    assert torch.equal(first.get_state(), second.get_state())


@pytest.mark.parametrize("solver", WIDE, ids=repr)
def test_every_state_is_kept_and_nothing_else_of_the_callers_is_changed(solver):
    network, sampler = problems.network("data set", "ddpm"), problems.sampler("ddpm", 25)
    table = sampler.recurrence(problems.noise(3), problems.generators(3))
    kept = table.noise.clone()
    runs = px.start(sampler, table, solver, keep_trajectory=True, generator=problems.generators(3))
    times = sampler.network_times(torch.float64)
    for _ in px.drive(runs, lambda rows: network(rows.x, times[rows.step])):
        assert all(bool(torch.isfinite(run.estimate).all()) for run in runs)
    assert torch.equal(table.noise, kept)
    for run in runs:
        solution = run.solution
        assert solution.trajectory.shape == (26, problems.DIM)
        assert torch.equal(solution.trajectory[0], table.start[run.place])
        assert torch.equal(solution.trajectory[-1], solution.x)
        assert solution.error_estimate == 0
        assert solution.reason == "converged"


def test_rows_are_limited_and_progress_is_shown(capsys):
    options = {"count": 3, "keep_trajectory": True}
    whole = problems.solve("power law", "ddpm", 25, px.Speculative(), **options)
    parts = problems.solve("power law", "ddpm", 25, px.Speculative(), max_rows=5, progress=True, **options)
    assert problems.relative(parts.x, whole.x) <= 1e-12
    assert "75/75" in capsys.readouterr().err
    single = problems.solve("power law", "ddpm", 25, px.Speculative(), dtype=torch.float32)
    assert single.x.dtype == torch.float32


@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_network_that_breaks_at_a_accepted_input_is_named_by_step(solver, value):
    """A network that breaks at a settled input is named by step."""
    good, sampler = problems.network("power law", "ddpm"), problems.sampler("ddpm", 25)
    time = float(sampler.times[17])

    def broken(x, t):
        output = good(x, t)
        output[t == time] = value
        return output

    with pytest.raises(px.OutputError, match=r"NaN or Inf at step 17 of 25, sample \d, for an accepted input"):
        px.sample(broken, problems.noise(2), sampler, solver, generator=problems.generators(2))


def test_what_it_cannot_do_raises_with_the_reason():
    """What it cannot do is refused with the reason."""
    network, noise = problems.network("power law", "ddpm"), problems.noise(1)
    for name in ("ddim", "euler", "flow_euler", "heun", "dpmpp_2m"):
        with pytest.raises(ValueError, match="does not support this sampler: no step of this sampler adds noise"):
            px.sample(network, noise, problems.sampler(name, 5), px.Speculative())
    local = px.Coefficients(np.ones(3), np.ones((3, 2)), np.ones(3))
    assert "one-step sampler" in px.Speculative().unsupported(local)
    sampler = problems.sampler("ddpm", 5)
    guess = torch.zeros(1, 6, problems.DIM, dtype=torch.float64)
    for options in ({"guess": guess}, {"guess": guess, "frozen_steps": 2}):
        with pytest.raises(ValueError, match="takes no guess and no frozen states"):
            px.sample(network, noise, sampler, px.Speculative(), **options)
    table = px.Recurrence(sampler.coefficients, noise)
    with pytest.raises(ValueError, match="the recurrence has no noise, though its steps add some"):
        next(px.drive(px.start(sampler, table, px.Speculative()), lambda rows: rows.x))
    with pytest.raises(ValueError, match="1 samples, 2 generators"):
        px.start(sampler, sampler.recurrence(noise), px.Speculative(), generator=problems.generators(2))
    for option in ("window", "verification", "proposal"):
        with pytest.raises(ValueError, match=f"{option} must be .* got 0"):
            px.Speculative(**{option: 0})


# What they draw. A case is a name, the sampler and the network.


def planar(problem, name, **options):
    sampler = px.SAMPLERS[name](steps=8, **options)
    return sampler, problems.planar()[problem].network(px.vp(), scaled=name in problems.SCALED)


CASES = {
    "chain": problems.chain()[::-1],
    "ddpm": planar("data set", "ddpm"),
    "ddim, clipped": planar("mixture", "ddim", eta=1.0, clip=0.8),
    "euler_ancestral": planar("data set", "euler_ancestral"),
}
# All options; the windows hold the whole loop, so that much is rejected.
DRAWN = [dataclasses.replace(solver, window=None) for solver in SHORT]


def draw(case, solver, seed, count=500):
    """Return (count, N + 1, 2) trajectories."""
    sampler, network = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return px.sample(network, noise, sampler, solver, generator=generator, keep_trajectory=True).trajectory


@cache
def sequential(case, count=500):
    return draw(case, px.Sequential(), 1, count)


def energy(x, y, permutations):
    """Return the permutation p-value of the energy distance 2 E|x - y| - E|x - x'| - E|y - y'|; (n, ..) and (m, ..)."""
    both = torch.cat([x, y]).flatten(1).float()
    both = (both - both.mean(0)) / both.std(0)
    distance = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    weight = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))])
    generator = torch.Generator().manual_seed(0)
    shuffled = [weight[torch.randperm(len(weight), generator=generator)] for _ in range(permutations)]
    weights = torch.stack([weight, *shuffled])
    found = -((weights @ distance) * weights).sum(1)
    return float((found >= found[0]).float().mean())


def kolmogorov(z):
    """Return the p-value of z being standard normal."""
    z = z.flatten().sort().values
    below, count = torch.special.ndtr(z), len(z)
    rank = torch.arange(1, count + 1) / count
    away = float(torch.maximum(rank - below, below - rank + 1 / count).max())
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * away
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 100)))


def whiteness(case, trajectory):
    """Return p-values of the noise that the steps of trajectories added: standard normal, whatever came before.

    z_i = (x_{i+1} - A_i x_i - B_i f_i) / C_i; as it is, along the network's own output, and with the one before it.
    Steps without noise must have none.
    """
    sampler, network = CASES[case]
    local, states = sampler.coefficients, trajectory[:, :-1]
    point = torch.arange(local.steps).repeat(len(states))
    outputs = network(states.flatten(0, 1), sampler.network_times(torch.float64)[point])
    outputs = sampler.output(point, states.flatten(0, 1), outputs).view_as(states)
    decay, weight, scale = (
        torch.from_numpy(one)[:, None] for one in (local.state_weight, local.output_weight[:, 0], local.noise_std)
    )
    rest = trajectory[:, 1:] - decay * states - weight * outputs
    noisy = local.noise_std > 0
    assert float(rest[:, ~noisy].abs().max()) <= 1e-12
    z, outputs = (rest / scale)[:, noisy], outputs[:, noisy]
    along = (z * outputs).sum(-1) / outputs.norm(dim=-1)
    pairs = (z[:, :-1:2] + z[:, 1::2]) / math.sqrt(2)
    return kolmogorov(z), kolmogorov(along), kolmogorov(pairs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", DRAWN, ids=repr)
def test_law_is_that_of_the_sequential_loop(solver, case):
    """The law is that of the sequential loop."""
    drawn, expected = draw(case, solver, 7), sequential(case)
    pair = [3, 6]
    assert energy(drawn[:, -1], expected[:, -1], 499) > 0.05
    assert energy(drawn[:, pair], expected[:, pair], 499) > 0.05
    assert min(whiteness(case, drawn)) > 0.02


@pytest.mark.parametrize("solver", SHORT, ids=repr)
def test_law_holds_where_the_network_breaks_on_proposals(solver):
    """The law holds where the network breaks on proposals."""
    sampler, network = CASES["chain"]
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    runs = px.start(sampler, sampler.recurrence(noise, generator), solver, keep_trajectory=True, generator=generator)
    times = sampler.network_times(torch.float64)

    def fragile(rows):
        outputs = network(rows.x, times[rows.step])
        front = torch.tensor([runs[index].accepted for index in rows.sample.tolist()])
        outputs[(rows.step > front) & (torch.sin(1000 * rows.x[:, 0]) > 0)] = float("nan")
        return outputs

    for _ in px.drive(runs, fragile):
        pass
    drawn = torch.stack([run.solution.trajectory for run in runs])
    assert min(whiteness("chain", drawn)) > 0.02
    assert energy(drawn[:, -1], sequential("chain")[:, -1], 499) > 0.05


@pytest.mark.parametrize("solver", DRAWN, ids=repr)
def test_forgetting_to_reflect_is_found_out(solver, monkeypatch):
    # What replaces a rejected proposal then keeps the noise along v that led to the rejection.
    monkeypatch.setattr(speculative.Tested, "whitened_offset", lambda self: np.zeros(len(self.count)))
    assert min(whiteness("chain", draw("chain", solver, 7, 1000))) < 1e-3
    if solver.verification == "reflection":
        case = "euler_ancestral"
        drawn, expected = draw(case, solver, 7, 1000), sequential(case, 1000)
        assert energy(drawn[:, -1], expected[:, -1], 1999) < 1e-3


@pytest.mark.parametrize("case", ["chain", "ddpm"])
def test_accepting_everything_is_found_out(case, monkeypatch):
    monkeypatch.setattr(speculative, "accept", lambda log_ratio, uniforms, tests: tests)
    drawn, expected = draw(case, px.Speculative(), 7), sequential(case)
    assert energy(drawn[:, -1], expected[:, -1], 1999) < 1e-3
    assert min(whiteness(case, drawn)) < 1e-3


def test_noise_along_v_has_the_density_it_is_drawn_from():
    """The noise along v has the density it is drawn from."""
    for chance, size in ((1.0, 0.1), (1.0, 2.5), (0.3, 0.7), (0.9999, 1e-3), (1.0, 1e-6), (1e-3, 3.0)):
        high = coupling.crossing(chance, size)
        assert math.isclose(chance * math.exp(-((high + size) ** 2) / 2), math.exp(-(high**2) / 2), rel_tol=1e-9)
        grid = np.linspace(high - size - 12, high, 200_001)
        density = chance * np.exp(-((grid + size) ** 2) / 2) - np.exp(-(grid**2) / 2)
        total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (grid[1] - grid[0])
        total /= math.sqrt(2 * math.pi)
        assert math.isclose(total[-1], coupling.mass_below(high, chance, size), rel_tol=1e-6)
        for uniform in (0.01, 0.5, 0.99):
            drawn = coupling.residual_draw(chance, size, uniform)
            assert math.isclose(np.interp(drawn, grid, total) / total[-1], uniform, rel_tol=1e-4)
