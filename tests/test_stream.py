"""Samples come and go, the rows of a round stay full, and each sample is what it would be alone."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

import parataxis as px
from parataxis.denoisers import mixture

EXACT = mixture(64).network(px.vp())
COUNT, STEPS, ROWS = 64, 25, 8
NOISE = torch.randn(COUNT, 64, generator=torch.Generator().manual_seed(0))


def seeded(number):
    return torch.Generator().manual_seed(number)


class Counted:
    """The network, and how many rows each call had."""

    def __init__(self):
        self.sizes = []

    def __call__(self, u, t, condition=None):
        self.sizes.append(len(u))
        shift = 0.0 if condition is None else condition["shift"][:, None]
        return EXACT(u + shift, t)


@pytest.mark.parametrize("solver", [px.Sequential(), px.Secant(window=8), px.Picard(window=3), px.Parareal(blocks=5)])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_64_samples_through_8_rows_are_those_of_one_batch_and_rounds_are_full(solver, name):
    sampler, network = px.SAMPLERS[name](steps=STEPS), Counted()
    batch = px.sample(EXACT, NOISE, sampler, solver, generator=seeded(1), tolerance=1e-4)
    found = px.sample(network, NOISE, sampler, solver, generator=seeded(1), tolerance=1e-4, rows_per_round=ROWS)
    # Rounding may decide whether a run is within its tolerance.
    assert ((found.x - batch.x).norm(dim=1) <= 2e-4 * batch.x.norm(dim=1)).all()
    assert found.evaluations == pytest.approx(batch.evaluations, rel=0.01)
    assert found.rounds == len(network.sizes)
    assert max(network.sizes) == ROWS
    # Only the last samples leave rows empty.
    assert set(network.sizes[: -3 * STEPS]) == {ROWS}
    assert found.evaluations <= ROWS * found.rounds <= 1.05 * found.evaluations + ROWS * STEPS / 2


def test_stream_asks_for_jobs_when_there_is_room():
    """A stream asks for jobs when there is room and yields samples as they are finished."""
    sampler, network, asked = px.SAMPLERS["ddpm"](steps=STEPS), Counted(), []

    def jobs():
        for number in range(1000):
            asked.append(number)
            yield px.Job(NOISE[number], {"shift": torch.tensor(0.1 * number)}, seeded(number))

    stream, found = px.stream(network, jobs(), sampler, px.Secant(window=4), rows_per_round=ROWS), {}
    assert asked == []
    for number, solution in stream:
        found[number] = solution
        assert torch.is_grad_enabled()
        assert len(stream.runs) <= ROWS
        assert len(asked) <= len(found) + ROWS + 1
        if len(found) == 12:
            break
    assert stream.rows == sum(network.sizes) == ROWS * stream.rounds
    for number, solution in found.items():
        alone = px.sample(
            network,
            NOISE[number : number + 1],
            sampler,
            px.Secant(window=4),
            condition={"shift": torch.tensor([0.1 * number])},
            generator=[seeded(number)],
        )
        torch.testing.assert_close(solution.x, alone.x[0], rtol=1e-4, atol=1e-5)
        assert solution.rounds == alone.rounds


def test_sample_takes_an_iterator_and_returns_its_samples_in_order():
    sampler = px.SAMPLERS["ddim"](steps=STEPS)
    found = px.sample(EXACT, iter(NOISE[:5]), sampler, px.Secant(window=4), rows_per_round=3, keep_trajectory=True)
    batch = px.sample(EXACT, NOISE[:5], sampler, px.Secant(window=4), keep_trajectory=True)
    torch.testing.assert_close(found.x, batch.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.trajectory, batch.trajectory, rtol=1e-4, atol=1e-5)
    assert found.converged


def test_exact_solvers_stream_with_a_random_stream_for_each_sample():
    """Law exact solvers stream with a random stream for each sample."""
    sampler, solver = px.SAMPLERS["ddpm"](steps=STEPS), px.Speculative(window=8)
    jobs = [px.Job(NOISE[0], None, seeded(number % 3)) for number in range(6)]
    found = px.sample(EXACT, jobs, sampler, solver, rows_per_round=ROWS)
    for number in range(3):
        torch.testing.assert_close(found[number].x, found[number + 3].x)
        assert found[number].rounds == found[number + 3].rounds
    assert (found[0].x - found[1].x).norm() > 0.1


def test_what_is_interrupted_is_returned_as_far_as_it_is():
    sampler, network = px.SAMPLERS["ddim"](steps=STEPS), Counted()

    def late(u, t):
        if len(network.sizes) == 40:
            raise KeyboardInterrupt
        return network(u, t)

    found = px.sample(late, NOISE, sampler, px.Sequential(), rows_per_round=ROWS)
    # 25 rounds for the first eight, and 15 for the next.
    reasons = [one.reason for one in found]
    assert reasons == ["converged"] * ROWS + ["interrupted"] * ROWS + ["not started"] * (COUNT - 2 * ROWS)
    assert all(one.error_estimate == math.inf for one in found[ROWS:])
    assert found.x.isfinite().all()
    assert torch.equal(found.x[2 * ROWS :], NOISE[2 * ROWS :])
    assert [one.rounds for one in found[2 * ROWS :]] == [0] * (COUNT - 2 * ROWS)


def test_samples_that_are_finished_but_not_yet_yielded_come_with_an_interrupt():
    stream = px.stream(EXACT, NOISE[:8], px.SAMPLERS["ddim"](steps=STEPS), px.Sequential(), rows_per_round=8)
    found = [next(stream) for _ in range(3)]
    found += stream.interrupt()
    assert [number for number, _ in found] == list(range(8))
    assert all(solution.converged for _, solution in found)
    assert list(stream) == []
    assert stream.runs == ()


def test_many_samples_share_one_memory_that_grows():
    sampler = px.SAMPLERS["ddpm"](steps=5)
    generators = [seeded(number) for number in range(COUNT)]
    streamed = px.sample(EXACT, NOISE, sampler, px.Sequential(), generator=generators, rows_per_round=40)
    batch = px.sample(EXACT, NOISE, sampler, px.Sequential(), generator=[seeded(number) for number in range(COUNT)])
    torch.testing.assert_close(streamed.x, batch.x, rtol=1e-4, atol=1e-5)


def test_noise_of_a_sample_with_its_own_generator_is_drawn_when_it_begins():
    """The noise of a sample with its own generator is drawn when it begins."""
    generators = [seeded(number) for number in range(COUNT)]

    def interrupted(u, t):
        raise KeyboardInterrupt

    px.sample(
        interrupted, NOISE, px.SAMPLERS["ddpm"](steps=5), px.Sequential(), generator=generators, rows_per_round=ROWS
    )
    drawn = [not torch.equal(one.get_state(), seeded(number).get_state()) for number, one in enumerate(generators)]
    assert drawn == [True] * ROWS + [False] * (COUNT - ROWS)


def test_stream_that_has_ended_is_gone_with_its_memory():
    """A stream that has ended is gone with its memory."""
    gc.collect()
    gc.disable()
    try:
        stream = px.stream(EXACT, NOISE[:8], px.SAMPLERS["ddim"](steps=5), px.Sequential(), rows_per_round=4)
        held = weakref.ref(stream)
        assert len(list(stream)) == 8
        del stream
        assert held() is None
        stream = px.stream(EXACT, NOISE[:8], px.SAMPLERS["ddim"](steps=5), px.Sequential(), rows_per_round=4)
        held = weakref.ref(stream)
        next(stream)
        assert len(list(stream.interrupt())) == 3
        del stream
        assert held() is None
    finally:
        gc.enable()


def test_output_that_is_not_finite_is_named_by_its_job():
    """An output that is not finite is named by its job."""
    network = Counted()

    def broken(u, t):
        output = network(u, t)
        if len(network.sizes) == 2 * STEPS + 4:
            output[-1] = float("nan")
        return output

    with pytest.raises(px.OutputError, match=r"NaN or Inf at step 3 of 25, sample 11"):
        list(px.stream(broken, NOISE, px.SAMPLERS["ddim"](steps=STEPS), px.Sequential(), rows_per_round=4))


def test_tensors_of_the_cpu_are_there_whatever_the_default_device():
    condition = {"shift": torch.linspace(0, 1, 8)}
    sampler, solver = px.SAMPLERS["ddim"](steps=5), px.Sequential()
    expected = px.sample(Counted(), NOISE[:8], sampler, solver, condition=condition)
    with torch.device("meta"):
        found = px.sample(Counted(), NOISE[:8], sampler, solver, condition=condition, rows_per_round=4)
    torch.testing.assert_close(found.x, expected.x)


def test_what_does_not_fit_is_named():
    sampler, solver = px.SAMPLERS["ddim"](steps=STEPS), px.Sequential()
    with pytest.raises(ValueError, match=r"job 1 is torch.float32 \(5,\) on cpu, and that of job 0 .* \(64,\)"):
        list(px.stream(EXACT, [NOISE[0], NOISE[0, :5]], sampler, solver, rows_per_round=2))
    with pytest.raises(ValueError, match="job 1 and job 0 differ in having a condition"):
        list(px.stream(EXACT, [NOISE[0], px.Job(NOISE[1], torch.ones(1))], sampler, solver, rows_per_round=2))
    with pytest.raises(ValueError, match="may differ in tensors only, got 'a'"):
        list(px.stream(Counted(), [px.Job(NOISE[0], "a"), px.Job(NOISE[1], "b")], sampler, solver, rows_per_round=2))
    with pytest.raises(ValueError, match="rows_per_round must be an integer of at least 1, got 0"):
        px.stream(EXACT, NOISE, sampler, solver, rows_per_round=0)
    with pytest.raises(ValueError, match=r"jobs with rows_per_round=, got tuple_iterator and rows_per_round=None"):
        px.sample(EXACT, iter(NOISE), sampler, solver)
    with pytest.raises(ValueError, match="solver='auto'"):
        px.sample(EXACT, NOISE, sampler, "auto", rows_per_round=8)
    with pytest.raises(ValueError, match="cannot be combined with guess"):
        px.sample(EXACT, NOISE, sampler, solver, rows_per_round=8, stop=lambda run: True)
    with pytest.raises(ValueError, match="pass condition and generator with each job"):
        px.sample(EXACT, iter(NOISE), sampler, solver, rows_per_round=8, condition=torch.ones(COUNT))
    with pytest.raises(ValueError, match="pass condition and generator with each job"):
        px.sample(EXACT, iter(NOISE), sampler, solver, rows_per_round=8, generator=seeded(1))
    with pytest.raises(ValueError, match="jobs are empty"):
        px.sample(EXACT, [], sampler, solver, rows_per_round=8)
    with pytest.raises(ValueError, match=r"noise must be a floating-point tensor .* got 3"):
        list(px.stream(EXACT, [3], sampler, solver, rows_per_round=2))
    with pytest.raises(ValueError, match=r"noise must be a floating-point tensor .* got NoneType and rows_per_round=8"):
        px.sample(EXACT, None, sampler, solver, rows_per_round=8)
    with pytest.raises(TypeError, match="jobs must be an iterable of samples to be drawn, got 3"):
        px.stream(EXACT, 3, sampler, solver, rows_per_round=2)
    for named in ("secants", "auto"):
        with pytest.raises(ValueError, match=f"there is no solver '{named}'"):
            px.stream(EXACT, NOISE, sampler, named, rows_per_round=2)
    for rows in ("8", 1.5, True):
        with pytest.raises(ValueError, match=r"rows_per_round must be an integer of at least 1, got"):
            px.sample(EXACT, NOISE, sampler, solver, rows_per_round=rows)
    with pytest.raises(
        TypeError, match=r"generator must be a torch.Generator, one for each sample, or None, got a list"
    ):
        list(px.stream(EXACT, [px.Job(NOISE[0], None, 0)], sampler, solver, rows_per_round=2))
