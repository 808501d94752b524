"""One sample's fault stays its own: it ends with a reason, and the others are what they would have been."""

import pytest
import torch

import parataxis as px
import problems
from parataxis import samplers

SOLVERS = {**px.SOLVERS, **px.EXACT_IN_DISTRIBUTION}
COUNT, STEPS = 3, 24


def network(broken=-1, below=0):
    """Return a network that gives NaN for one condition at small times."""

    def denoise(x, t, c):
        return torch.where(((c == broken) & (t < below))[:, None], torch.nan, 0.3 * torch.tanh(x))

    return denoise


def draw(solver, denoise, **options):
    noise = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(b) for b in range(COUNT)]
    return px.sample(
        denoise,
        noise,
        samplers.ddpm(steps=STEPS),
        solver,
        condition=torch.arange(float(COUNT)),
        generator=generators,
        **options,
    )


@pytest.mark.parametrize(("broken", "below", "rows"), [(0, 400, None), (2, 2000, None), (1, 400, 7)])
@pytest.mark.parametrize("name", SOLVERS)
def test_nan_of_one_sample_ends_that_sample_only(name, broken, below, rows):
    """The sample that meets NaN fails with its step and a finite estimate; the others are what they are without."""
    good = draw(SOLVERS[name](), network(), rows_per_round=rows)
    solutions = draw(SOLVERS[name](), network(broken, below), rows_per_round=rows, errors="return")
    failed = solutions[broken]
    assert failed.failed
    assert f"of {STEPS}, sample {broken}" in failed.reason
    assert torch.isfinite(failed.x).all()
    assert not failed.converged
    assert failed.error_estimate == float("inf")
    assert not solutions.converged
    for b in set(range(COUNT)) - {broken}:
        assert solutions[b].converged
        # What is batched with what differs in a stream, and with it the rounding of a kernel.
        bound = 1e-2 if rows else 1e-5 if name == "speculative" else 0
        torch.testing.assert_close(solutions[b].x, good[b].x, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", SOLVERS)
def test_estimate_of_a_failed_sample_is_that_of_the_round_before(name):
    """What is returned of a failed sample is what a preview showed before the output that is not finite."""
    previews = []
    denoise = network(1, 400)
    solutions = draw(
        SOLVERS[name](), denoise, errors="return", on_round=lambda runs: previews.append(runs[1].estimate.clone())
    )
    assert torch.equal(solutions[1].x, previews[solutions[1].rounds - 2])


def test_all_samples_may_fail():
    """A solve whose samples all fail ends, and says of each why."""
    for name, solver in SOLVERS.items():
        solutions = draw(solver(), lambda x, t, c: torch.full_like(x, torch.nan), errors="return")
        assert [f"step 0 of {STEPS}, sample {b}" in s.reason for b, s in enumerate(solutions)] == [True] * COUNT, name


def test_stream_goes_on_behind_a_failed_job():
    """A failed job is yielded as such, and its place is taken by the next one."""
    noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    jobs = [px.Job(noise[b], torch.tensor(float(b))) for b in range(12)]
    options = {"rows_per_round": 6, "errors": "return"}
    for solver in (px.Sequential(), px.Secant(window=4), px.Parareal(blocks=4)):
        drawn = dict(px.stream(network(3, 500), jobs, samplers.ddim(steps=20), solver, **options))
        assert sorted(drawn) == list(range(12))
        assert [number for number in sorted(drawn) if drawn[number].failed] == [3]


def test_stream_raises_its_error_again():
    """A stream that an error ended is not at its end: the next call raises the error again."""
    stream = px.stream(
        lambda x, t: x * float("nan"),
        torch.randn(3, 4).unbind(),
        samplers.ddim(steps=9),
        px.Picard(),
        rows_per_round=9,
    )
    for _ in range(3):
        with pytest.raises(px.OutputError, match="step 0 of 9"):
            next(stream)


@pytest.mark.parametrize("name", px.SOLVERS)
def test_states_that_overflow(name):
    """Outputs that are finite but too large for the states are no success, nor called NaN outputs."""
    noise, sampler = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), samplers.ddim(steps=12)
    large = lambda x, t: torch.full_like(x, 3e38)  # noqa: E731
    with pytest.raises(px.OutputError, match="sample 0 is NaN or Inf though every output was finite"):
        px.sample(large, noise, sampler, px.SOLVERS[name]())
    assert [s.failed for s in px.sample(large, noise, sampler, px.SOLVERS[name](), errors="return")] == [True, True]


@pytest.mark.parametrize("name", px.SOLVERS)
def test_outputs_whose_sum_overflows_are_finite(name):
    """Only single values that are not finite are called NaN or Inf: sums of large ones may overflow."""
    sampler = samplers.ddim(steps=12)
    late = lambda x, t: torch.where(t[:, None] < 150, 1e35, 0.0).expand_as(x)  # noqa: E731
    solution = px.sample(late, torch.randn(1, 5000), sampler, px.SOLVERS[name]())[0]
    assert solution.converged
    assert torch.isfinite(solution.x).all()


def test_errors_is_checked():
    """Another word is refused."""
    with pytest.raises(ValueError, match="errors must be 'raise'"):
        draw(px.Sequential(), network(), errors="ignore")


def test_run_whose_error_is_above_the_tolerance_is_not_called_converged():
    """Every step is accepted, but a network that jumps leaves an error: the run says how large it may be."""
    solutions = px.sample(
        problems.pointwise("sign", 0.5),
        problems.noise(2),
        problems.sampler("ddpm", 40),
        px.Secant(window=16),
        tolerance=1e-2,
        generator=problems.generators(2),
    )
    for solution in solutions:
        assert not solution.converged
        assert solution.reason.startswith("uncertain")
        assert 1e-2 < solution.error_estimate < 1
    assert not solutions.converged
