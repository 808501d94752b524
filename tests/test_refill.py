"""Samples come and go, the rows of a round stay full, and each sample is what it would be alone."""

from __future__ import annotations

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
    found = px.sample(network, NOISE, sampler, solver, generator=seeded(1), tolerance=1e-4, rows=ROWS)
    # Rounding may decide whether a run is within its tolerance.
    assert ((found.x - batch.x).norm(dim=1) <= 2e-4 * batch.x.norm(dim=1)).all()
    assert found.evaluations == pytest.approx(batch.evaluations, rel=0.01)
    assert found.rounds == len(network.sizes)
    assert max(network.sizes) == ROWS
    # Only the last samples leave rows empty.
    assert set(network.sizes[: -3 * STEPS]) == {ROWS}
    assert found.evaluations <= ROWS * found.rounds <= 1.05 * found.evaluations + ROWS * STEPS / 2


def test_a_stream_asks_for_jobs_when_there_is_room_and_yields_samples_as_they_are_finished():
    sampler, network, asked = px.SAMPLERS["ddpm"](steps=STEPS), Counted(), []

    def jobs():
        for number in range(1000):
            asked.append(number)
            yield px.Job(NOISE[number], {"shift": torch.tensor(0.1 * number)}, seeded(number))

    stream, found = px.stream(network, jobs(), sampler, px.Secant(window=4), rows=ROWS), {}
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
    found = px.sample(EXACT, iter(NOISE[:5]), sampler, px.Secant(window=4), rows=3, keep=True)
    batch = px.sample(EXACT, NOISE[:5], sampler, px.Secant(window=4), keep=True)
    torch.testing.assert_close(found.x, batch.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.trajectory, batch.trajectory, rtol=1e-4, atol=1e-5)
    assert found.converged


def test_law_exact_solvers_stream_with_a_random_stream_for_each_sample():
    sampler, solver = px.SAMPLERS["ddpm"](steps=STEPS), px.Speculative(window=8)
    jobs = [px.Job(NOISE[0], None, seeded(number % 3)) for number in range(6)]
    found = px.sample(EXACT, jobs, sampler, solver, rows=ROWS)
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

    found = px.sample(late, NOISE, sampler, px.Sequential(), rows=ROWS)
    assert len(found) == 2 * ROWS  # 25 rounds for the first eight, and 15 for the next
    assert {one.reason for one in found} == {"converged", "interrupted"}
    assert found.x.isfinite().all()


def test_what_does_not_fit_is_named():
    sampler, solver = px.SAMPLERS["ddim"](steps=STEPS), px.Sequential()
    with pytest.raises(ValueError, match=r"job 1 is torch.float32 \(5,\) on cpu, and that of job 0 .* \(64,\)"):
        list(px.stream(EXACT, [NOISE[0], NOISE[0, :5]], sampler, solver, rows=2))
    with pytest.raises(ValueError, match="job 1 and job 0 differ in having a condition"):
        list(px.stream(EXACT, [NOISE[0], px.Job(NOISE[1], torch.ones(1))], sampler, solver, rows=2))
    with pytest.raises(ValueError, match="may differ in tensors only, got 'a'"):
        list(px.stream(Counted(), [px.Job(NOISE[0], "a"), px.Job(NOISE[1], "b")], sampler, solver, rows=2))
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        px.stream(EXACT, NOISE, sampler, solver, rows=0)
    with pytest.raises(ValueError, match=r"need rows=.* got rows=None"):
        px.sample(EXACT, iter(NOISE), sampler, solver)
    with pytest.raises(ValueError, match="solver='auto'"):
        px.sample(EXACT, NOISE, sampler, "auto", rows=8)
    with pytest.raises(ValueError, match="admit none of guess"):
        px.sample(EXACT, NOISE, sampler, solver, rows=8, stop=lambda run: True)
    with pytest.raises(ValueError, match="jobs bring their own"):
        px.sample(EXACT, iter(NOISE), sampler, solver, rows=8, condition=torch.ones(COUNT))
    with pytest.raises(ValueError, match="jobs bring their own"):
        px.sample(EXACT, iter(NOISE), sampler, solver, rows=8, generator=seeded(1))
    with pytest.raises(ValueError, match="jobs are empty"):
        px.sample(EXACT, [], sampler, solver, rows=8)
    with pytest.raises(ValueError, match=r"noise must be a floating-point tensor .* got int"):
        list(px.stream(EXACT, [3], sampler, solver, rows=2))
