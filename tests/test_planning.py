"""Plans: what calls cost, which solver is fastest, and whether it took as long as was said.

Most tests put a clock of their own in the place of the machine's: only the network moves it, by a known cost of its
rows. One test sleeps.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.engine.latency import format_seconds
from parataxis.planning import CURVES, RoundsCurve

ODE, SDE = "ddim", "ddpm"


@pytest.fixture
def costing(monkeypatch):
    """Return a function that makes exact networks which take so long: tau(rows) on the test's clock."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(tau, name=ODE, memory=10**9):
        exact = problems.network("power law", name)

        def denoise(x, t):
            denoise.calls.append(len(x))
            if len(x) > memory:
                raise torch.OutOfMemoryError("out of memory")
            now[0] += tau(len(x))
            return exact(x, t)

        denoise.calls = []
        return denoise

    return make


def bent(rows, free=8):
    """Flat, then linear."""
    return 0.01 * max(1.0, rows / free)


def raised(rows):
    """Linear above a constant."""
    return 0.006 + 0.002 * rows


def linear(rows):
    return 0.01 * rows


def measure(denoise, most=64):
    """Return the latency of a network as plan measures it."""
    rows = px.engine.rows.EvalBatch(
        problems.noise(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    )
    return px.latency(lambda own: denoise(own.x, own.step + 500), rows, max_rows=most)


def test_rows_that_cost_as_much_as_one_are_found(costing):
    """The rows that cost as much as one are found."""
    for free in (1, 4, 8, 32):
        assert measure(costing(lambda rows, free=free: bent(rows, free))).batch_headroom == pytest.approx(free)
    assert measure(costing(lambda rows: 0.01)).batch_headroom == pytest.approx(64)
    assert measure(costing(raised)).batch_headroom == pytest.approx(raised(1) / 0.002)


@pytest.mark.parametrize("tau", [bent, raised, linear, lambda rows: 0.01])
def test_costs_between_and_behind_the_measured_points_are_right(costing, tau):
    known = measure(costing(tau), most=50)
    asked = np.array([1, 2, 3, 5, 8, 11, 17, 32, 49, 50, 100, 500])
    assert known.seconds(asked) == pytest.approx([tau(rows) for rows in asked])


def test_few_calls_are_made_and_none_where_the_cost_is_plain(costing):
    denoise = costing(linear)
    known = measure(denoise, most=1000)
    assert known.rows == (1, 2, 4)
    assert len(denoise.calls) <= 3 * 6
    denoise = costing(bent)
    assert measure(denoise, most=1000).rows == (1, 2, 4, 8, 16, 32)


def test_planning_makes_few_calls_and_no_larger_ones_than_can_matter(costing):
    sampler, noise = problems.sampler(ODE, 100), problems.noise(1)
    denoise = costing(bent)
    known = px.plan(denoise, noise, sampler)
    assert len(denoise.calls) <= 40
    assert denoise.calls.count(1) <= 20
    # The cost of this one never is a straight line, but no solver is faster by calls that take so long.
    denoise = costing(lambda rows: 0.01 * rows**0.6)
    known = px.plan(denoise, noise, sampler)
    assert known.latency.rows == (1, 2, 4, 8, 16, 32, 64)
    every = px.plan(denoise, noise, sampler, known=measure(denoise, most=100))
    assert every.solver == known.solver
    assert every.seconds == pytest.approx(known.seconds)


def test_network_that_returns_no_output_is_not_planned_for():
    """A network that returns no output is not planned for."""
    noise, sampler = problems.noise(2), problems.sampler(ODE, 20)
    for broken, message in (
        (lambda x, t: x[:1, :3], r"returned the shape \(1, 3\), expected that of its input, \(1, 16\)"),
        (lambda x, t: [x], "returned list, expected a tensor"),
        (lambda x, t: x.float(), "returned torch.float32"),
        (lambda x, t: x / 0, "returned NaN or Inf at step 0 of 20"),
    ):
        with pytest.raises(px.OutputError, match=message):
            px.plan(broken, noise, sampler)


def test_planning_with_buckets_makes_no_other_calls(costing):
    denoise = costing(bent)
    result = px.sample(denoise, problems.noise(1), problems.sampler(ODE, 40), "auto", buckets=(4, 8, 16))
    assert result.converged
    assert set(denoise.calls) <= {4, 8, 16}


def test_disturbed_measurement_does_not_lift_what_costs_more():
    """A disturbed measurement does not lift what costs more."""
    known = px.Latency((1, 2, 4, 8), (1.0, 3.0, 1.2, 2.0))
    assert known.seconds([1, 2, 3, 4, 8]) == pytest.approx([1.0, 1.2, 1.2, 1.2, 2.0])
    assert px.Latency((1, 2), (4.0, 3.0)).batch_headroom == 2


def test_where_memory_ends_is_remembered_and_more_rows_take_several_calls(costing):
    known = measure(costing(bent, memory=20))
    assert known.limit == 16
    assert known.seconds([16, 40, 48]) == pytest.approx([bent(16), 2 * bent(16) + bent(8), 3 * bent(16)])
    assert "at most 16 rows a call" in str(known)
    with pytest.raises(torch.OutOfMemoryError):
        measure(costing(raised, memory=0))


def test_with_buckets_other_numbers_of_rows_cost_as_much_as_the_next(costing):
    rows = px.engine.rows.EvalBatch(
        problems.noise(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    )
    denoise = costing(raised)
    known = px.latency(lambda own: denoise(own.x, own.step), rows, buckets=(4, 16))
    assert set(denoise.calls) == {4, 16}
    assert known.seconds([1, 4, 5, 16]) == pytest.approx([raised(rows) for rows in (4, 4, 16, 16)])
    assert known.seconds(18) == pytest.approx(raised(16) + raised(4))


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", [ODE, SDE])
@pytest.mark.parametrize("tau", [bent, raised, lambda rows: 0.01])
def test_once_its_rounds_are_known_a_solve_takes_as_long_as_planned(costing, tau, name, count):
    denoise, sampler = costing(tau, name), problems.sampler(name, 50)
    solvers = [px.Picard(window=16), px.Anderson(window=16), px.Secant(window=16)]
    before = [
        one
        for solver in solvers
        for one in px.sample(denoise, problems.noise(8), sampler, solver, generator=problems.generators(8))
    ]
    plan = px.plan(denoise, problems.noise(count), sampler, measured=before, windows=(16,))
    for solver in solvers:
        [expected] = [one for one in plan.candidates if one.solver == solver]
        generators = problems.generators(count, seed=2000)
        result = px.sample(denoise, problems.noise(count, seed=100), sampler, solver, generator=generators)
        assert result.seconds == pytest.approx(expected.seconds.median, rel=0.2)  # two rounds of some ten
        assert expected.seconds.low <= expected.seconds.median <= expected.seconds.high
    assert plan.solver == min(plan.candidates, key=lambda one: one.seconds.median).solver
    assert plan.speedup.median == pytest.approx(50 * tau(count) / plan.seconds)


def test_network_whose_batch_is_not_free_is_left_to_the_loop(costing):
    """A network whose batch is not free is left to the loop."""
    plan = px.plan(costing(linear), problems.noise(1), problems.sampler(ODE, 50))
    assert plan.solver == px.Sequential()
    assert plan.reason == "the network's batch is not free: 8 rows cost 8.0 x one row"
    assert plan.speedup == pytest.approx((1, 1, 1))
    assert plan.seconds == pytest.approx(0.5)
    batch = px.plan(costing(lambda rows: bent(rows, 16)), problems.noise(16), problems.sampler(ODE, 50))
    assert batch.reason == "the network's batch is not free: 128 rows cost 8.0 x 16 rows"


def test_few_steps_are_left_to_the_loop(costing):
    plan = px.plan(costing(lambda rows: 0.2), problems.noise(1), problems.sampler(SDE, 6))
    assert plan.solver == px.Sequential()
    assert plan.reason.startswith("6 steps are few: the fewest rounds are ")
    assert "rounds were measured for N from" in plan.setting


def test_network_cheaper_than_the_solver_is_left_to_the_loop():
    """A network cheaper than the solver is left to the loop, where rounds are many: this one is rough."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    plan = px.plan(lambda x, t: torch.sin(6 * x @ weight), torch.randn(1, 64), problems.sampler(ODE, 100))
    assert plan.solver == px.Sequential()
    assert plan.reason.startswith("the solver's own work, ")


def test_devices_share_rows_and_change_the_choice(costing):
    def planned(devices, count=1):
        return px.plan(costing(linear), problems.noise(count), problems.sampler(SDE, 100), devices=devices)

    assert planned(1).solver == px.Sequential()
    assert planned(2).solver == px.Sequential()
    narrow, wide = planned(8), planned(64)
    assert narrow.solver.window == 8
    assert wide.solver.window is None or wide.solver.window > 8
    assert wide.speedup.median > narrow.speedup.median > 1
    # Eight samples keep eight devices busy without any solver.
    assert planned(8, count=8).solver == px.Sequential()


def test_rows_per_step_take_their_share_of_the_batch(costing):
    denoise, sampler = costing(lambda rows: 10 * bent(rows)), problems.sampler(ODE, 50)
    one, two = (px.plan(denoise, problems.noise(1), sampler, rows_per_step=rows, windows=(8,)) for rows in (1, 2))
    assert [one.loop_seconds, two.loop_seconds] == pytest.approx([5, 5])
    assert 1.5 * one.seconds < two.seconds < 2 * one.seconds


def test_limits_of_rows_are_part_of_the_plan(costing):
    denoise, sampler = costing(lambda rows: 0.01), problems.sampler(ODE, 50)
    free = px.plan(denoise, problems.noise(1), sampler, windows=(16,))
    limited = px.plan(denoise, problems.noise(1), sampler, windows=(16,), max_rows=4)
    assert limited.latency.limit == 4
    assert 3 < min(one.seconds.median for one in limited.candidates if one.solver != px.Sequential()) / free.seconds < 4
    small = px.plan(costing(lambda rows: 0.01, memory=5), problems.noise(1), sampler, windows=(16,))
    assert small.latency.limit == 4
    assert small.solver == limited.solver


def test_rounds_of_earlier_solves_are_expected_again(costing):
    denoise, sampler, noise = costing(bent), problems.sampler(ODE, 100), problems.noise(4)
    before = px.sample(denoise, noise, sampler, px.Picard(window=8), tolerance=1e-3)

    def rounds(**options):
        plan = px.plan(denoise, noise[:1], sampler, tolerance=1e-3, known=known, **options)
        return {repr(one.solver): one.rounds for one in plan.candidates}

    known = measure(denoise)
    first, second = rounds(), rounds(measured=before)
    own, other = repr(px.Picard(window=8)), repr(px.Anderson(window=8))
    typical = statistics.median(one.rounds for one in before)
    assert abs(second[own].median - typical) <= 1
    assert second[own].high - second[own].low <= first[own].high - first[own].low
    assert second[other] == first[other]
    # Solves of the other kind, of other solvers and from a guess say nothing.
    kept = px.sample(denoise, noise, sampler, px.Picard(), keep_trajectory=True, tolerance=1e-3).trajectory
    for useless in (
        px.sample(denoise, noise, sampler, px.Sequential()),
        px.sample(costing(bent, SDE), noise, problems.sampler(SDE, 100), px.Picard(window=8)),
        px.sample(denoise, noise, sampler, px.Picard(window=8), guess=kept),
        px.sample(denoise, noise, sampler, px.Picard(window=8), stop=px.stopping.rounds(2)),
    ):
        assert rounds(measured=useless) == first


def test_plan_prints_as_a_table(costing):
    """A plan prints as a table."""
    plan = px.plan(costing(bent), problems.noise(1), problems.sampler(ODE, 50))
    lines = str(plan).splitlines()
    assert lines[0] == "ddim, N = 50, 1 sample, tolerance 0.01, cpu"
    assert lines[1].startswith("1 row 10 ms, times that: 2 rows 1.0, 4 rows 1.0, 8 rows 1.0, 16 rows 2.0")
    assert lines[1].endswith("b* = 8.0")
    assert lines[3].split() == ["plain", "loop", "1", "50", "500", "ms", "1.00"]
    [chosen] = [line for line in lines if line.startswith(">")]
    assert chosen.split()[1:3] == [type(plan.solver).__name__, str(plan.solver.window)]
    assert len(lines) == 4 + len(plan.candidates) + 1
    assert lines[-1].startswith(f"{plan.solver!r}: ")
    assert "2 x cpu" in str(px.plan(costing(bent), problems.noise(1), problems.sampler(ODE, 50), devices=2))


def test_auto_solves_as_planned_and_says_how_well(costing):
    for tau, parallel in ((bent, True), (linear, False)):
        denoise, noise, sampler = costing(tau), problems.noise(2), problems.sampler(SDE, 50)
        result = px.sample(denoise, noise, sampler, "auto", generator=problems.generators(2))
        assert (result.plan.solver != px.Sequential()) == parallel
        named = px.sample(denoise, noise, sampler, result.plan.solver, generator=problems.generators(2))
        assert torch.equal(result.x, named.x)
        assert named.plan is None
        assert result.seconds == pytest.approx(named.seconds)
        off = 100 * (result.seconds / result.plan.seconds - 1)
        said = f"2 x 50 steps by {result.plan.solver!r}: converged after {result.rounds} rounds, "
        assert f": {said}" in str(result)
        assert result.sequential_seconds == result.plan.loop_seconds
        assert result.speedup == result.sequential_seconds / result.seconds
        assert str(result).startswith(f"{format_seconds(result.seconds)}, {result.speedup:.2g} times as fast as")
        assert str(result).endswith(f" {off:+.0f} %")
        assert "planned" not in str(named)


def test_auto_keeps_the_end_of_memory_that_planning_met(costing):
    denoise = costing(lambda rows: 0.01, memory=6)
    result = px.sample(denoise, problems.noise(1), problems.sampler(ODE, 50), "auto")
    assert result.converged
    assert result[0].peak_width > 6
    assert sum(size > 6 for size in denoise.calls) == 1


def test_auto_needs_a_start_from_noise(costing):
    denoise, noise, sampler = costing(bent), problems.noise(1), problems.sampler(ODE, 20)
    kept = px.sample(denoise, noise, sampler, px.Sequential(), keep_trajectory=True).trajectory
    for options in ({"guess": kept}, {"guess": kept, "frozen_steps": 3}):
        with pytest.raises(ValueError, match="a guess saves rounds: choose a solver"):
            px.sample(denoise, noise, sampler, "auto", **options)
    with pytest.raises(ValueError, match="there is no solver 'automatic'"):
        px.sample(denoise, noise, sampler, "automatic")


def test_planning_leaves_random_numbers_alone(costing):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    px.plan(costing(bent, SDE), problems.noise(2), problems.sampler(SDE, 25))
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 1.5}, "devices must be an integer of at least 1, got 1.5"),
        ({"tolerance": float("inf")}, "tolerance must be a relative error of at least 0, got inf"),
        ({"max_rows": 0}, "max_rows must be an integer"),
        ({"devices": 0}, "devices must be an integer of at least 1, got 0"),
        ({"rows_per_step": 0}, "rows_per_step must be an integer of at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be a relative error of at least 0, got -1.0"),
        ({"solvers": [px.Picard(entry="copy")]}, "no forecast for Picard.*'copy'"),
        ({"solvers": [px.Parareal()]}, "no forecast for Parareal.*: plan with Picard"),
        ({"solvers": []}, "nothing to choose from"),
        ({"windows": ()}, "nothing to choose from"),
        ({"windows": (0,)}, "window must be a whole number of steps"),
        ({"condition": torch.arange(3)}, "one row a sample"),
    ],
)
def test_what_cannot_be_planned_is_said(costing, options, message):
    with pytest.raises(ValueError, match=message):
        px.plan(costing(bent), problems.noise(1), problems.sampler(ODE, 20), **options)


@pytest.mark.parametrize("measured", [3, [3], px.Secant()])
def test_what_was_measured_are_solutions(costing, measured):
    with pytest.raises(TypeError, match=r"measured must be what parataxis.sample returned, or a list of its solutions"):
        px.plan(costing(bent), problems.noise(1), problems.sampler(ODE, 20), measured=measured)


def test_every_curve_belongs_to_a_solver_and_stays_within_its_bounds():
    known = json.loads(CURVES.read_text())
    classes = {cls.__name__: cls for cls in px.SOLVERS.values()}
    for name, kinds in known["curves"].items():
        assert set(kinds) <= {"ode", "sde"}
        for kind in kinds:
            curve = RoundsCurve.load(classes[name](), problems.sampler(SDE if kind == "sde" else ODE, 25).coefficients)
            for steps in (5, 25, 100, 1000):
                for window in {min(one, steps) for one in (1, 8, 32, 1000)}:
                    for tolerance in (0.0, 1e-3, 1e-1, 10.0):
                        rounds = curve.rounds(steps, window, tolerance)
                        assert steps / window <= rounds <= steps
                        widths = curve.widths(np.full(1, np.ceil(rounds)), steps, window)
                        assert len(widths) == np.ceil(rounds)
                        assert widths.min() >= 1
                        assert widths.max() == window
                    loose, tight = (curve.rounds(steps, window, tolerance) for tolerance in (1e-1, 1e-3))
                    assert loose <= tight


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("name", [ODE, SDE, "dpmpp_2m", "flow_euler"])
@pytest.mark.parametrize("solver", [px.Picard, px.Anderson, px.Secant])
def test_rounds_are_foreseen(solver, name, window):
    sampler, chosen = problems.sampler(name, 50), solver(window=window)
    result = problems.solve("power law", name, 50, chosen, count=6)
    expected = RoundsCurve.load(chosen, sampler.coefficients).rounds(50, window or 50, 1e-2)
    # Exact mixtures are easier than the trained networks that the curves are for.
    assert 0.4 <= statistics.median(one.rounds for one in result) / expected <= 1.25


def test_sleeping_network_takes_as_long_as_planned():
    """A sleeping network takes as long as planned."""
    exact, sampler, noise = problems.network("power law", ODE), problems.sampler(ODE, 40), problems.noise(1)

    def sleeping(x, t):
        end = time.perf_counter() + 2 * bent(len(x))
        output = exact(x, t)
        time.sleep(max(0.0, end - time.perf_counter()))
        return output

    solver = px.Picard(window=8)
    before = px.sample(sleeping, noise, sampler, solver)
    plans, solves = [], []
    for _ in range(4):
        plans.append(px.plan(sleeping, noise, sampler, solvers=[px.Picard()], windows=(8,), measured=before))
        solves.append(px.sample(sleeping, noise, sampler, solver).seconds)
    assert all(plan.solver == solver for plan in plans)
    # Whatever else the machine does makes a solve longer: the shortest is the least disturbed.
    assert min(solves) == pytest.approx(statistics.median(plan.seconds for plan in plans), rel=0.3), (plans, solves)
    assert statistics.median(plan.latency.batch_headroom for plan in plans) == pytest.approx(8, rel=0.3)


def test_loop_of_a_second_is_planned_by_trial(costing):
    """What is chosen is what was fastest, at the seconds and rounds that it took."""
    denoise, noise, sampler = costing(lambda rows: bent(rows) / 5), problems.noise(1), problems.sampler(ODE, 100)
    plan = px.plan(denoise, noise, sampler)
    result = px.sample(denoise, noise, sampler, plan.solver)
    assert result.seconds == pytest.approx(plan.seconds)
    assert result.rounds == plan.chosen.rounds.median
    assert plan.loop_seconds == pytest.approx(px.sample(denoise, noise, sampler, px.Sequential()).seconds)


def test_noisy_timing_is_said_and_compares_sizes_all_the_same(monkeypatch):
    """Every second call takes three times as long: sizes still compare as they do, at their average seconds."""
    now, calls = [0.0], [0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def denoise(x, t):
        calls[0] += 1
        now[0] += 1e-3 * len(x) * (1 + 2 * (calls[0] // 5 % 2))
        return x

    example = px.engine.rows.EvalBatch(torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(1).long())
    known = px.latency(lambda rows: denoise(rows.x, rows.step), example, max_rows=4)
    assert known.noisy
    assert "timing is noisy: equal calls differ by " in str(known)
    assert float(known.seconds(4) / known.seconds(1)) == pytest.approx(4, rel=0.05)
    assert float(known.seconds(1)) == pytest.approx(2e-3, rel=0.25)


def test_plan_calibrates_the_solver_that_it_chooses():
    """The calibration is of the planned solver and of this batch's conditions, and is sampled with."""
    network, sampler = problems.network("power law", ODE), px.SAMPLERS[ODE](steps=30)
    known = px.Latency((1, 64), (1.0, 1.0))  # rows are free, so the loop is not chosen
    planned = px.plan(network, problems.noise(2), sampler, windows=(8,), known=known, calibrate=20)
    assert planned.calibration is not None
    assert planned.calibration.solver in (planned.solver, px.Sequential())
    assert planned.calibration.runs == 20
    assert "With a confidence of 95%" in str(planned)
    assert px.sample(network, problems.noise(2), sampler, planned.calibration).converged
    assert px.plan(network, problems.noise(2), sampler, windows=(8,), known=known).calibration is None
    with pytest.raises(ValueError, match="calibrate must be an integer of at least 0"):
        px.plan(network, problems.noise(2), sampler, known=known, calibrate=-1)
