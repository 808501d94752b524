"""The driver: batches, callbacks, early ends, guesses, and what it refuses."""

from __future__ import annotations

import collections
import dataclasses
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import parataxis as px
import problems
from parataxis.denoisers import guided


def setting(count=3, points=25, name="ddim"):
    return problems.network("power law", name), problems.noise(count), problems.sampler(name, points)


def test_callable_of_ten_lines_is_enough():
    """A callable of ten lines is enough."""
    network, noise, sampler = setting()
    result = px.sample(network, noise, sampler, px.Picard(), tolerance=1e-6)
    assert result.x.shape == noise.shape
    assert result.converged
    assert [one.reason for one in result] == ["converged"] * 3
    assert result[0].nfe_ratio == result[0].evaluations / 25
    assert len(result[0].history) == result[0].rounds


def test_round_of_the_batch_is_one_call_of_the_network():
    """A round of the batch is one call of the network."""
    network, noise, sampler = setting(5)
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return network(x, t)

    result = px.sample(counted, noise, sampler, px.Picard(window=8), tolerance=1e-4)
    assert len(calls) == result.rounds
    assert sum(calls) == result.evaluations + 1  # a row is evaluated twice, to see whether others matter to it
    assert calls[0] == 5 * 8


def test_rows_are_limited_without_changing_the_result():
    network, noise, sampler = setting()
    sizes = []

    def counted(x, t):
        sizes.append(len(x))
        return network(x, t)

    limited = px.sample(counted, noise, sampler, px.Picard(), max_rows=7)
    assert max(sizes) == 7
    assert torch.allclose(limited.x, px.sample(network, noise, sampler, px.Picard()).x, rtol=1e-12)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(
    "solver", [px.Sequential(), px.Secant(window=8), px.Picard(window=8), px.Anderson(), px.Parareal()]
)
@pytest.mark.parametrize("name", ["ddpm clipped", "ddim", "dpmpp_2m"])
def test_network_may_write_into_its_input(name, solver, rows):
    """Also where outputs are transformed by what the network was given: clipped, or turned into data predictions."""
    if name == "ddpm clipped":
        scheduler = DDPMScheduler(30, clip_sample=True)
        scheduler.set_timesteps(30)
        sampler = px.from_scheduler(scheduler)
    else:
        sampler = px.SAMPLERS[name](steps=30)
    noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def draw(network):
        generator = torch.Generator().manual_seed(1)
        return px.sample(network, noise, sampler, solver, generator=generator, max_rows=rows).x

    assert torch.equal(draw(lambda x, t: x.mul_(0.9).tanh_()), draw(lambda x, t: (0.9 * x).tanh()))


def test_conditions_follow_their_sample():
    _, noise, sampler = setting(4)
    seen = {}

    def conditional(x, t, condition):
        for row, label, extra in zip(x, condition["label"], condition["extra"], strict=True):
            if bool((t == sampler.times[0]).all()):
                seen[tuple(row.tolist())] = (int(label), float(extra[0]))
        return 0.1 * x * condition["label"][:, None] + condition["extra"][:, :1]

    condition = {"label": torch.arange(4), "extra": torch.arange(8.0, dtype=torch.float64).view(4, 2)}
    batch = px.sample(conditional, noise, sampler, px.Picard(window=4), condition=condition)
    for b in range(4):
        one = {name: value[b : b + 1] for name, value in condition.items()}
        alone = px.sample(conditional, noise[b : b + 1], sampler, px.Picard(window=4), condition=one)
        assert torch.allclose(alone.x[0], batch.x[b], rtol=1e-12)
    with pytest.raises(ValueError, match=r"one row a sample, \(4, \.\.\.\), got shape \(3,\)"):
        px.sample(conditional, noise, sampler, px.Picard(), condition=torch.arange(3))


def test_guidance_takes_two_rows_and_one_where_it_changes_nothing():
    def conditional(x, t, label):
        return x * label[:, None]

    x, label = torch.ones(2, 3), torch.tensor([2.0, 3.0])
    output = guided(conditional, 2.5, 0.0)(x, torch.zeros(2), label)
    assert torch.equal(output, torch.tensor([[5.0] * 3, [7.5] * 3]))
    assert guided(conditional, 1, 0.0) is conditional


def test_one_run_serves_a_loop_that_belongs_to_someone_else():
    network, noise, sampler = setting()
    times = sampler.network_times(noise.dtype)
    [run, *_] = px.start(sampler, sampler.recurrence(noise), px.Picard(window=8), tolerance=1e-4)
    while not run.done:
        query = run.query
        assert query.x.shape == (len(query.step), problems.DIM)
        run.answer(network(query.x, times[query.step]))
    expected = px.sample(network, noise, sampler, px.Picard(window=8), tolerance=1e-4)
    assert torch.allclose(run.solution.x, expected.x[0], rtol=1e-12)
    assert run.solution.rounds == expected[0].rounds


def test_on_round_sees_an_estimate_that_becomes_the_sample():
    network, noise, sampler = setting(2, 50)
    expected = px.sample(network, noise, sampler, px.Sequential()).x
    for solver in (px.Picard(), px.Picard(window=8), px.Sequential()):
        errors = []

        def watch(runs, errors=errors):
            errors.append(problems.relative(torch.stack([run.estimate for run in runs]), expected))

        result = px.sample(network, noise, sampler, solver, tolerance=1e-6, on_round=watch)
        assert len(errors) == result.rounds
        assert errors[-1] <= 1e-6
        assert errors[len(errors) // 2] < errors[0]


def test_stop_ends_a_run_early_with_its_estimate():
    network, noise, sampler = setting(3, 50)
    result = px.sample(network, noise, sampler, px.Picard(), tolerance=1e-8, stop=lambda run: run.rounds >= 4)
    assert [one.rounds for one in result] == [4, 4, 4]
    assert [one.reason for one in result] == ["stopped: <lambda>"] * 3
    assert not result.converged
    assert problems.relative(result.x, px.sample(network, noise, sampler, px.Sequential()).x) < 0.5


def test_multistep_table_without_data_predictions_has_an_estimate_too():
    """A multistep table without data predictions has an estimate too."""
    network, noise, sampler = setting(2, 25, "dpmpp_2m")
    table = sampler.recurrence(noise)
    blind = px.Recurrence(dataclasses.replace(table.coefficients, x0_from_input=None, x0_from_output=None), table.start)
    times = sampler.network_times(noise.dtype)
    expected, errors = px.sample(network, noise, sampler, px.Sequential()).x, []
    [run, _] = px.start(sampler, blind, px.Picard(window=4), tolerance=1e-6)
    while not run.done:
        run.answer(network(run.query.x, times[run.query.step]))
        assert run.solution.error_estimate <= 1e-6 if run.done else run.solution.error_estimate == math.inf
        errors.append(problems.relative(run.estimate[None], expected[:1]))
    assert errors[-1] <= 1e-6
    assert max(errors) <= errors[0]


def test_interrupting_returns_the_last_estimate():
    network, noise, sampler = setting(2, 50)
    calls = []

    def interrupted(x, t):
        calls.append(len(x))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return network(x, t)

    result = px.sample(interrupted, noise, sampler, px.Picard(), tolerance=1e-10)
    assert [one.reason for one in result] == ["interrupted"] * 2
    assert [one.error_estimate for one in result] == [math.inf] * 2
    assert result[0].rounds == 4
    assert bool(torch.isfinite(result.x).all())


def test_guess_begins_with_the_noise_of_the_call():
    """Whatever stands in its first state: the loop begins with the noise."""
    network, noise, sampler = setting(2, 12, "ddim")
    guess = torch.full((2, sampler.steps + 1, problems.DIM), 5.0, dtype=noise.dtype)
    result = px.sample(network, noise, sampler, px.Secant(), guess=guess, tolerance=1e-8)
    assert problems.relative(result.x, px.sample(network, noise, sampler, px.Sequential()).x) <= 1e-7


def test_trajectory_is_a_guess_that_saves_rounds():
    """A trajectory is a guess that saves rounds."""
    for name in px.SAMPLERS:
        network, noise, sampler = setting(2, 50, name)
        options = {"tolerance": 1e-6}
        kept = px.sample(
            network, noise, sampler, px.Picard(), keep_trajectory=True, generator=problems.generators(2), **options
        )
        assert kept.trajectory.shape == (2, sampler.steps + 1, problems.DIM)
        assert torch.equal(kept.trajectory[:, -1], kept.x)
        for solver in (px.Picard(), px.Picard(window=16)):
            cold = px.sample(network, noise, sampler, solver, generator=problems.generators(2), **options)
            warm = px.sample(
                network, noise, sampler, solver, guess=kept.trajectory, generator=problems.generators(2), **options
            )
            assert warm.rounds < cold.rounds
            assert problems.relative(warm.x, kept.x) <= 1e-6
        with pytest.raises(ValueError, match=r"guess must have the shape \(B, N \+ 1, \*shape\)"):
            px.sample(network, noise, sampler, px.Picard(), guess=kept.trajectory[:, 1:])
        with pytest.raises(ValueError, match="guess holds NaN"):
            px.sample(network, noise, sampler, px.Picard(), guess=kept.trajectory * float("nan"))


def test_one_generator_draws_in_the_order_of_the_loop():
    sampler = px.samplers.ddpm(steps=10)
    noise = problems.noise(3)
    table = sampler.recurrence(noise, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for i in range(9):
        drawn = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        assert torch.equal(table.noise[:, i], float(sampler.coefficients.noise_std[i]) * drawn)
    assert not table.noise[:, 9].any()


def test_states_are_kept_in_float32_for_a_network_in_half_precision():
    network, noise, sampler = setting(2)

    def half(x, t):
        assert x.dtype == torch.bfloat16
        return network(x.double(), t).bfloat16()

    result = px.sample(half, noise.bfloat16(), sampler, px.Picard(), tolerance=1e-3)
    assert result.x.dtype == torch.float32
    expected = px.sample(half, noise.bfloat16(), sampler, px.Sequential()).x
    assert problems.relative(result.x, expected) <= 2e-2


def test_progress_counts_accepted_levels(capsys):
    """Progress counts settled levels."""
    network, noise, sampler = setting(2)
    px.sample(network, noise, sampler, px.Picard(window=8), progress=True)
    assert "50/50" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": -1e-3}, "tolerance must be a relative error of at least 0, got -0.001"),
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"noise": torch.zeros(3, dtype=torch.int64)}, "noise must be a floating-point tensor"),
        ({"noise": torch.zeros(4)}, "at least 2 dimensions"),
        ({"noise": torch.zeros(0, 16)}, "expected at least one sample"),
        ({"noise": torch.zeros(4, 0)}, r"noise has the shape \(4, 0\), expected"),
        (
            {"noise": torch.ones(3, 4).to_sparse()},
            "noise must be a dense tensor with values, got layout torch.sparse_coo",
        ),
        ({"noise": torch.zeros(3, 4, device="meta")}, "noise must be a dense tensor with values, .* on meta"),
        ({"noise": torch.full((3, 4), torch.nan)}, "noise has NaN or Inf"),
        ({"noise": np.zeros((3, 4))}, "noise must be a floating-point tensor .* got ndarray and rows_per_round=None"),
        ({"noise": [torch.zeros(4)]}, "noise must be a floating-point tensor .* got list and rows_per_round=None"),
        ({"tolerance": None}, "tolerance must be"),
        ({"tolerance": "a"}, "tolerance must be"),
        ({"tolerance": float("inf")}, "tolerance must be"),
        ({"tolerance": True}, "tolerance must be"),
        ({"max_rows": 0}, "max_rows must be an integer of at least 1, got 0"),
        ({"max_rows": 1.5}, "max_rows must be an integer of at least 1, got 1.5"),
        ({"max_rows": True}, "max_rows must be an integer of at least 1, got True"),
        ({"buckets": 8}, r"buckets must be numbers of rows of at least 1, such as \(1, 2, 4, 8\), got 8"),
        ({"buckets": (1, 2.5)}, "buckets must be numbers of rows"),
        ({"frozen_steps": 1.5}, "frozen_steps must be an integer of at least 0, got 1.5"),
        ({"frozen_steps": True}, "frozen_steps must be an integer of at least 0, got True"),
        ({"guess": [1]}, r"guess must have the shape \(B, N \+ 1, \*shape\) = \(3, 26, 16\), got list"),
        ({"condition": np.zeros((3, 2))}, r"condition must have tensors \(3, \.\.\.\)"),
        ({"condition": 3.0}, "condition must have tensors .* got 3.0"),
        ({"condition": {}}, "condition must have tensors .* got a dict"),
        ({"condition": ["a", "b", "c"]}, "condition must have tensors"),
        ({"condition": {"label": torch.zeros(3), "text": np.zeros((3, 2))}}, "condition has a NumPy array"),
        ({"sampler": px.samplers.ddpm(steps=5), "generator": [torch.Generator()]}, "3 samples, 1 generators"),
    ],
)
def test_what_does_not_fit_together_is_said(change, message):
    network, noise, sampler = setting()
    given = {"noise": noise, "sampler": sampler, **change}
    with pytest.raises(ValueError, match=message):
        px.sample(network, given.pop("noise"), given.pop("sampler"), px.Picard(), **given)


@pytest.mark.parametrize("generator", [0, [1, 2, 3], "abc"])
def test_what_is_no_generator_is_said(generator):
    network, noise, sampler = setting()
    message = "generator must be a torch.Generator, one for each sample, or None, got"
    for call in (
        lambda: px.sample(network, noise, sampler, px.Picard(), generator=generator),
        lambda: px.sample(network, noise, sampler, px.Picard(), generator=generator, rows_per_round=8),
        lambda: px.numerical_floor(network, noise, sampler, generator=generator),
        lambda: px.start(sampler, sampler.recurrence(noise), px.Picard(), generator=generator),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_network_that_cannot_be_called_is_told_from_one_that_fails():
    """A network that cannot be called is told from one that fails."""
    _, noise, sampler = setting()

    class Net(torch.nn.Module):
        def forward(self, x, t, label):
            return x + label[:, None]

    def fails(x, t):
        return x + "a"

    labels = torch.zeros(3)
    for options in ({}, {"rows_per_round": 8}):
        with pytest.raises(TypeError, match=r"called as denoise\(x, t\), as there is no condition=, .*'label'"):
            px.sample(Net(), noise, sampler, px.Picard(), **options)
        with pytest.raises(TypeError, match=r"called as denoise\(x, t, condition\), as there is a condition="):
            px.sample(lambda x, t: x, noise, sampler, px.Picard(), condition=labels, **options)
        with pytest.raises(TypeError, match=r"^unsupported operand"):
            px.sample(fails, noise, sampler, px.Picard(), **options)
        with pytest.raises(TypeError, match=r"denoise must be a network that can be called .* got None"):
            px.sample(None, noise, sampler, px.Picard(), **options)


def test_condition_may_be_a_named_tuple_with_leaves_that_all_samples_share():
    """A condition may be a named tuple with leaves that all samples share."""
    _, noise, sampler = setting()
    Told = collections.namedtuple("Told", ["shift", "scale"])

    def network(x, t, told):
        return told.scale * x + told.shift[:, None]

    condition = Told(torch.arange(3.0), 0.1)
    found = px.sample(network, noise, sampler, px.Picard(window=4), condition=condition)
    streamed = px.sample(network, noise, sampler, px.Picard(window=4), condition=condition, rows_per_round=5)
    torch.testing.assert_close(found.x, streamed.x)


def test_networks_may_have_parameters_that_want_gradients():
    _, noise, sampler = setting(2, 10)
    net = torch.nn.Linear(problems.DIM, problems.DIM, dtype=noise.dtype)
    [run, _] = runs = px.start(sampler, sampler.recurrence(noise.clone().requires_grad_()), px.Secant())
    while not run.done:
        run.answer(net(run.query.x))
    for _ in px.drive(runs, lambda rows: net(rows.x)):
        pass
    expected = px.sample(lambda x, t: net(x), noise, sampler, px.Secant())
    torch.testing.assert_close(torch.stack([one.solution.x for one in runs]), expected.x)
    assert not run.solution.x.requires_grad


def test_runs_of_several_calls_are_not_driven_together():
    _, noise, sampler = setting(1, 10)
    runs = [
        *px.start(sampler, sampler.recurrence(noise), px.Picard()),
        *px.start(sampler, sampler.recurrence(noise), px.Picard()),
    ]
    with pytest.raises(ValueError, match="must be of one call of start"):
        next(px.drive(runs, lambda rows: rows.x))


def test_table_without_alpha_and_sigma_is_solved_or_refused_by_name():
    """A table without alpha and sigma is solved or refused by name."""
    sampler = px.samplers.ddim(steps=20)
    _, weight = sampler.coefficients.dense()
    noise = problems.noise(1)
    table = px.Recurrence.from_dense(weight, sampler.recurrence(noise).base())
    network, times = problems.network("power law", "ddim"), sampler.network_times(noise.dtype)
    with pytest.raises(ValueError, match="rule='paradigms' compares with alpha and sigma"):
        px.start(sampler, table, px.Picard(rule="paradigms"))
    for solver in (px.Sequential(), px.Picard(window=8)):
        [run] = px.start(sampler, table, solver, tolerance=0)
        while not run.done:
            run.answer(network(run.query.x, times[run.query.step]))
            assert bool(torch.isfinite(run.estimate).all())
        expected = px.sample(network, noise, sampler, px.Sequential()).x
        assert problems.relative(run.solution.x[None], expected) <= 1e-8


def test_rule_that_ended_a_run_is_named():
    """The rule that ended a run is named."""
    network, noise, sampler = setting(2, 50)
    for stop, name in [
        (px.stopping.rounds(3), "rounds(limit=3)"),
        (px.stopping.error_below(1e-3), "error_below(bound=0.001)"),
        (px.stopping.preview_settled(psnr=35.0), "preview_settled("),
    ]:
        result = px.sample(network, noise, sampler, px.Picard(), tolerance=1e-9, stop=stop)
        assert all(one.reason.startswith("stopped: ") for one in result)
        assert name in result[0].reason
        assert not result.converged
    for broken in (lambda: px.stopping.rounds(0), lambda: px.stopping.error_below(0)):
        with pytest.raises(ValueError, match="must be"):
            broken()


def test_one_rule_serves_many_solves_and_forgets_them():
    network, noise, sampler = setting(2, 50)
    for rule in (px.stopping.error_below(1e-3), px.stopping.preview_settled()):
        seen = weakref.WeakSet()
        first = px.sample(network, noise, sampler, px.Picard(), tolerance=1e-9, stop=rule, on_round=seen.update)
        again = px.sample(network, noise, sampler, px.Picard(), tolerance=1e-9, stop=rule)
        assert [one.rounds for one in again] == [one.rounds for one in first]
        flat = px.sample(lambda x, t: 0.1 * x, noise[:, :5], sampler, px.Picard(), tolerance=1e-9, stop=rule)
        assert flat.x.shape == (2, 5)
        gc.collect()
        assert not seen  # the rule holds no run


def test_accepted_preview_is_close_to_the_sample():
    """A settled preview is close to the sample."""
    network, noise, sampler = setting(4, 100)
    expected = px.sample(network, noise, sampler, px.Sequential()).x
    early = px.sample(network, noise, sampler, px.Anderson(), tolerance=1e-9, stop=px.stopping.preview_settled())
    late = px.sample(network, noise, sampler, px.Anderson(), tolerance=1e-9)
    assert early.rounds < late.rounds
    error = (early.x - expected).square().mean(1)
    assert bool((10 * torch.log10(4 / error) >= 35).all())


def test_trajectories_survive_the_disk(tmp_path):
    network, noise, sampler = setting(2, 20)
    kept = px.sample(network, noise, sampler, px.Picard(), keep_trajectory=True)
    path = tmp_path / "kept.safetensors"
    px.save_trajectory(path, kept.trajectory, sampler)
    assert torch.equal(px.load_trajectory(path, sampler), kept.trajectory)
    with pytest.raises(ValueError, match="written for ddim with other times"):
        px.load_trajectory(path, px.samplers.ddim(steps=20, spacing="leading"))
    with pytest.raises(ValueError, match=r"trajectory must be \(B, 21"):
        px.save_trajectory(path, kept.trajectory[:, 1:], sampler)
    lost = px.sample(network, noise, sampler, px.Picard())
    for none in (lost, lost.trajectory):
        with pytest.raises(
            TypeError, match=f"got {type(none).__name__}: pass the .trajectory .* with keep_trajectory=True"
        ):
            px.save_trajectory(path, none, sampler)
    with pytest.raises(ValueError, match="cannot be written"):
        px.save_trajectory(tmp_path / "none" / "kept", kept.trajectory, sampler)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as a trajectory"):
        px.load_trajectory(path, sampler)


def test_frozen_states_stay_and_the_others_follow_from_them():
    network, noise, sampler = setting(2, 50)
    kept = px.sample(network, noise, sampler, px.Sequential(), keep_trajectory=True).trajectory
    other = problems.mixtures()["data set"].network(px.vp())
    for solver in (px.Picard(), px.Picard(window=8), px.Anderson(window=16)):
        result = px.sample(
            other, noise, sampler, solver, guess=kept, frozen_steps=20, keep_trajectory=True, tolerance=0
        )
        assert torch.equal(result.trajectory[:, :21], kept[:, :21])
        x, times = kept[:, 20], sampler.network_times(noise.dtype)
        for i in range(20, 50):
            f = other(x, times[i].expand(2))
            x = float(sampler.coefficients.state_weight[i]) * x + float(sampler.coefficients.output_weight[i, 0]) * f
        assert problems.relative(result.x, x) <= 1e-9
        assert result.rounds <= 30
    for options, message in [
        ({"frozen_steps": 5}, "pass one"),
        ({"frozen_steps": 50, "guess": kept}, "frozen_steps < N = 50"),
        ({"frozen_steps": 5, "guess": kept, "solver": px.Parareal()}, "a solver with a window"),
    ]:
        with pytest.raises(ValueError, match=message):
            px.sample(network, noise, sampler, options.pop("solver", px.Picard()), **options)


def test_floor_is_what_the_network_makes_of_its_batch():
    """The floor is what the network makes of its batch and no tolerance goes below it."""
    sampler, noise = problems.sampler("ddpm", 20), problems.noise(2)
    network = problems.network("power law", "ddpm")

    def rough(x, t):
        return network(x, t) * (1 + 1e-5 * len(x))

    assert px.numerical_floor(network, noise, sampler, generator=problems.generators(2)) <= 1e-12
    found = px.numerical_floor(rough, noise, sampler, generator=problems.generators(2))
    sequential, among = (
        px.sample(make, noise, sampler, px.Sequential(), generator=problems.generators(2)).x
        for make in (lambda x, t: network(x, t) * (1 + 1e-5), lambda x, t: network(x, t) * (1 + 8e-5))
    )
    assert found == pytest.approx(problems.relative(among, sequential), rel=1e-3)
    with pytest.raises(ValueError, match=r"rows must be an integer of at least 2, got 2\.5"):
        px.numerical_floor(rough, noise, sampler, rows=2.5)
    with pytest.raises(ValueError, match=r"tolerance 1e-05 is below the floor \d\.\d+e-05 of this network"):
        px.sample(rough, noise, sampler, px.Secant(), tolerance=1e-5, numerical_floor=found)
    assert px.sample(rough, noise, sampler, px.Secant(), tolerance=1e-2, numerical_floor=found).converged


@pytest.mark.parametrize(("kind", "chaotic"), [("chaotic", True), ("linear", False), ("saturated", False)])
def test_floor_is_what_a_loop_makes_of_a_last_place(kind, chaotic):
    """Near 1 for a loop whose sample a last place of its noise decides, though its rows do not depend on each other."""
    sampler, network = problems.hard_sampler("clipped", 40), problems.pointwise(kind, 2.0)
    noise = problems.noise(1, torch.float32)
    start, moved = (px.sample(network, x, sampler, px.Sequential()).x for x in (noise, noise * (1 + 1e-7)))
    floor = px.numerical_floor(network, noise, sampler)
    assert (floor > 0.3) == (problems.relative(moved, start) > 0.3) == chaotic
    if not chaotic:
        assert floor < 1e-5
