"""The laws: what holds for every solver with every sampler on every problem."""

from __future__ import annotations

import math

import pytest
import torch

import parataxis as px
import problems

VARIANTS = problems.variants()
NARROW = [solver for solver in VARIANTS if getattr(solver, "window", 8) == 8]
NAMES = list(px.SAMPLERS)
PAIRS = [(solver, name) for solver in VARIANTS for name in NAMES if problems.works(solver, name)]
PROBLEMS = list(problems.mixtures())
# A window of one level is the sequential loop to the bit: a law of its own.
WIDE = [pair for pair in PAIRS if getattr(pair[0], "window", 0) != 1]


def identify(value):
    return repr(value) if not isinstance(value, str) else value


@pytest.mark.parametrize(("points", "dtype"), [(10, torch.float64), (25, torch.float64), (100, torch.float32)], ids=str)
@pytest.mark.parametrize(("solver", "name"), WIDE, ids=identify)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_with_tolerance_zero_the_result_is_sequential_in_at_most_n_rounds(problem, solver, name, points, dtype):
    result = problems.solve(problem, name, points, solver, dtype=dtype, tolerance=0)
    expected = problems.reference(problem, name, points, dtype=dtype)
    assert problems.relative(result.x, expected) <= (1e-10 if dtype == torch.float64 else 1e-5)
    assert result.converged
    assert result.rounds <= result[0].steps


@pytest.mark.parametrize(("solver", "name"), [pair for pair in PAIRS if pair[0] in NARROW], ids=identify)
def test_with_tolerance_zero_a_thousand_steps_are_sequential(solver, name):
    result = problems.solve("power law", name, 1000, solver, dtype=torch.float32, tolerance=0, count=1)
    expected = problems.reference("power law", name, 1000, count=1, dtype=torch.float32)
    assert problems.relative(result.x, expected) <= 1e-5
    assert result.rounds <= result[0].steps


@pytest.mark.parametrize(("solver", "name"), PAIRS, ids=identify)
def test_every_query_lies_on_the_loop_within_the_width(solver, name):
    sampler = problems.sampler(name, 25)
    noise = problems.noise(3)
    runs = px.start(sampler, sampler.recurrence(noise, problems.generators(3)), solver, tolerance=1e-3)
    network, times = problems.network("power law", name), sampler.network_times(torch.float64)
    width = problems.bound(solver, sampler.steps)
    asked = []

    def evaluate(rows):
        for index in range(3):
            own = rows.step[rows.sample == index].tolist()
            assert len(own) <= width
            assert len(set(own)) == len(own)
            assert set(own) <= set(range(sampler.steps))
        asked.append(set(rows.step.tolist()))
        return network(rows.x, times[rows.step])

    fronts = [0] * 3
    for _ in px.drive(runs, evaluate):
        assert all(run.accepted >= before for run, before in zip(runs, fronts, strict=True))
        if not isinstance(solver, px.Parareal):
            assert all(run.accepted > before or run.done for run, before in zip(runs, fronts, strict=True))
        fronts = [run.accepted for run in runs]
    assert set.union(*asked) == set(range(sampler.steps))
    # The first rounds of nested nodes are narrower, and some levels are settled by then.
    assert max(run.peak_width for run in runs) == width or isinstance(solver, px.CoarseToFine)


@pytest.mark.parametrize(("solver", "name"), PAIRS, ids=identify)
def test_same_inputs_give_the_same_bits(solver, name):
    """The same inputs give the same bits."""
    first, second = (problems.solve("power law", name, 25, solver, tolerance=1e-3) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert [one.history for one in first] == [one.history for one in second]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", [solver for solver in VARIANTS if getattr(solver, "window", 0) == 1], ids=identify)
def test_window_one_is_the_sequential_loop_to_the_bit(solver, name):
    result = problems.solve("power law", name, 25, solver, dtype=torch.float32)
    assert torch.equal(result.x, problems.reference("power law", name, 25, dtype=torch.float32))
    assert all(round_.width == 1 for one in result for round_ in one.history)
    assert result.rounds == result[0].steps


# How far the true error may exceed the estimate: the estimate is of first order, and rounding is not in it.
FACTOR, ROUNDING = 1.0, 1e-12


@pytest.mark.parametrize(("problem", "points"), [*((problem, 25) for problem in PROBLEMS), ("power law", 100)])
@pytest.mark.parametrize(("solver", "name"), WIDE, ids=identify)
def test_error_falls_with_the_tolerance_and_stays_below_its_estimate(problem, solver, name, points):
    """The error falls with the tolerance and stays below its estimate."""
    expected = problems.reference(problem, name, points, count=4)
    worst = []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-6):
        result = problems.solve(problem, name, points, solver, count=4, tolerance=tolerance)
        errors = (result.x - expected).norm(dim=1) / expected.norm(dim=1)
        for error, one in zip(errors.tolist(), result, strict=True):
            # A run whose estimate ends above the tolerance says so.
            assert one.converged == (one.error_estimate <= tolerance)
            assert error <= FACTOR * one.error_estimate + ROUNDING, f"tolerance {tolerance}"
        worst.append(float(errors.max()))
    assert worst[-1] <= worst[0] or math.isclose(worst[0], 0, abs_tol=ROUNDING)
    assert worst[-1] <= 1e-6


@pytest.mark.parametrize(("solver", "name"), PAIRS, ids=identify)
def test_sample_alone_is_the_sample_in_a_batch(solver, name):
    """A sample alone is the sample in a batch."""
    together = problems.solve("power law", name, 25, solver, count=5, tolerance=1e-3)
    for index in range(5):
        alone = px.sample(
            problems.network("power law", name),
            problems.noise(5)[index, None],
            problems.sampler(name, 25),
            solver,
            generator=problems.generators(5)[index : index + 1],
            tolerance=1e-3,
        )
        assert problems.relative(alone.x, together.x[index, None]) <= 1e-12
        assert alone[0].rounds == together[index].rounds
        assert alone[0].evaluations == together[index].evaluations


@pytest.mark.parametrize("solver", VARIANTS, ids=identify)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_network_that_breaks_at_an_accepted_input_is_named_by_step(solver, value):
    """A network that breaks at a settled input is named by step."""
    good = problems.network("power law", "ddim")
    time = float(problems.sampler("ddim", 25).times[17])

    def broken(x, t):
        output = good(x, t)
        output[t == time] = value
        return output

    with pytest.raises(px.OutputError, match=r"NaN or Inf at step 17 of 25, sample \d.*, for an accepted input"):
        px.sample(broken, problems.noise(2), problems.sampler("ddim", 25), solver)


@pytest.mark.parametrize("value", [float("nan"), 1e200])
@pytest.mark.parametrize(("solver", "name"), PAIRS, ids=identify)
def test_network_that_breaks_on_wrong_guesses_only_never_converges_wrongly(solver, name, value):
    """A network that breaks on wrong guesses only never converges wrongly."""
    good = problems.network("power law", name)
    times = problems.sampler(name, 25).network_times(torch.float64)
    kept = px.sample(
        good,
        problems.noise(1),
        problems.sampler(name, 25),
        px.Sequential(),
        generator=problems.generators(1),
        keep_trajectory=True,
    )
    trajectory = kept.trajectory[0, :-1]

    def fragile(x, t):
        output = good(x, t)
        away = torch.stack([(trajectory[times == one] - row).norm(dim=1).min() for row, one in zip(x, t, strict=True)])
        output[away > 0.5 * trajectory.norm(dim=1).median()] = value
        return output

    result = px.sample(
        fragile,
        problems.noise(1),
        problems.sampler(name, 25),
        solver,
        generator=problems.generators(1),
        tolerance=1e-4,
    )
    assert problems.relative(result.x, kept.x) <= 1e-4


@pytest.mark.parametrize("solver", VARIANTS, ids=identify)
def test_wrong_shape_type_or_dtype_is_named(solver):
    """A wrong shape type or dtype is named."""
    sampler, noise = problems.sampler("ddim", 10), problems.noise(1)
    for broken, message in [
        (
            lambda x, t: x[:, :-1],
            r"returned the shape \(\d+, 15\), expected that of its input, \(\d+, 16\), at steps? 0( to |\.)",
        ),
        (
            lambda x, t: x.float(),
            r"returned torch.float32, expected that of its input, torch.float64, at steps? 0( to |:)",
        ),
        (lambda x, t: [x], r"returned list, expected a tensor of shape \(\d+, 16\), at steps? 0( to |:)"),
    ]:
        with pytest.raises(px.OutputError, match=message):
            px.sample(broken, noise, sampler, solver)
