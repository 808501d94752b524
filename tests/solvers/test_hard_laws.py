"""The laws over networks made to hurt, with examples that hypothesis picks.

`PARATAXIS_EXAMPLES=20000 pytest tests/solvers/test_hard_laws.py` takes more of them than `make test` has time for.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parataxis as px
import problems

# Each example of hypothesis is a loop with so many solvers and samples: most of its time is spent once for all of them.
SOLVED, SAMPLES = 3, 2
GROUP = SOLVED * SAMPLES
SAFETY = 3.0  # of estimates: what is measured is reported three times
EXAMPLES = int(os.environ.get("PARATAXIS_EXAMPLES", "2000"))
# The same examples in every run: what is new is looked for by `make matrix`.
COMMON = settings(
    deadline=None,
    derandomize=EXAMPLES <= 2000,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SOLVERS = [kind(window=window) for kind in (px.Secant, px.Picard, px.Anderson) for window in (2, 5, None)]
SOLVERS += [px.CoarseToFine(), px.Parareal(), px.Parareal(blocks=2), px.Parareal(coarse="two-step")]
LAW_EXACT = [px.Speculative(window=window, verification=v) for window in (2, None) for v in ("reflection", "block")]

groups = st.lists(st.sampled_from(SOLVERS), min_size=SOLVED, max_size=SOLVED)
loops = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(problems.HARD),
        "strength": st.sampled_from((0.3, 0.9, 0.97, 1.1, 2.0)),
        "name": st.sampled_from(problems.HARD_SAMPLERS),
        "dim": st.sampled_from((1, 2, 6)),
        "steps": st.integers(2, 6),
        "seed": st.integers(0, 99),
    }
)


def solved(solvers, tolerance, kind, strength, name, dim, steps, seed):
    """Yield solver, run and its error to the loop, relative to the sample where that is not 0."""
    sampler, network = problems.hard_sampler(name, steps), problems.hard_network(kind, strength, dim, name)
    solvers = [way for way in solvers if way.unsupported(sampler.coefficients) is None]
    noise = problems.noise(SAMPLES, seed=seed, shape=(dim,))
    loop, *found = (
        px.sample(network, noise, sampler, way, tolerance=tolerance, generator=problems.generators(SAMPLES, seed))
        for way in (px.Sequential(), *solvers)
    )
    for solver, solution in zip(solvers, found, strict=True):
        for run, exact in zip(solution, loop.x, strict=True):
            size = float(exact.norm())
            yield solver, run, float((run.x - exact).norm()) / (size if size > 0 else 1.0)


@settings(COMMON, max_examples=EXAMPLES // 5 // GROUP)
@given(solvers=groups, loop=loops)
def test_tolerance_zero_is_the_loop(solvers, loop):
    """Whatever the network: to rounding, and in at most N rounds."""
    for solver, run, error in solved(solvers, 0.0, **loop):
        assert error <= 1e-9
        assert run.converged
        assert run.rounds <= loop["steps"] + (isinstance(solver, px.CoarseToFine))


def test_a_run_is_right_or_says_that_it_cannot_tell():
    """A run that converged is within its tolerance; one that did not reports more than the tolerance.

    An estimate is a measurement: of a hundred errors one may be above it, and of two hundred runs one above a tolerance
    that it seemed to keep. Of a thousand, one may be above it by more than the safety factor: near ties of an ideal
    denoiser show in a large move only, and a loose tolerance may accept the state before that move.
    """
    above, silent, far = [], [], []

    @settings(COMMON, max_examples=(EXAMPLES - EXAMPLES // 5) // GROUP)
    @given(solvers=groups, tolerance=st.sampled_from((1e-6, 1e-3, 1e-2, 1e-1)), loop=loops)
    def law(solvers, tolerance, loop):
        for _, run, error in solved(solvers, tolerance, **loop):
            assert run.converged == (run.error_estimate <= tolerance)
            far.append(error > max(SAFETY * run.error_estimate, 1e-9))
            above.append(error > max(run.error_estimate, 1e-9))
            silent.append(run.converged and error > max(tolerance, 1e-9))

    law()
    assert sum(above) <= len(above) / 100
    assert sum(silent) <= len(silent) / 200
    assert sum(far) <= len(far) / 1000


@settings(COMMON, max_examples=40)
@given(solver=st.sampled_from(LAW_EXACT), loop=loops, name=st.sampled_from(("ddpm", "clipped ddpm", "sigma 25")))
def test_another_sample_of_the_same_law_takes_no_more_rounds_than_steps(solver, loop, name):
    """Solvers that are exact in distribution have no error to estimate, and end whatever the network does."""
    for _, run, _ in solved([solver], 1e-2, **{**loop, "name": name}):
        assert run.converged
        assert run.error_estimate == 0
        assert run.rounds <= loop["steps"]
        assert run.x.isfinite().all()


@settings(COMMON, max_examples=30)
@given(solver=st.sampled_from(SOLVERS), loop=loops, step=st.integers(0, 5))
def test_nan_never_converges(solver, loop, step):
    """A network that breaks at a step is named, and nothing is returned."""
    name, steps = loop["name"], loop["steps"]
    sampler = problems.hard_sampler(name, steps)
    network = problems.hard_network(loop["kind"], loop["strength"], loop["dim"], name)
    broken = sampler.network_times(torch.float64)[step % steps]
    noise = problems.noise(1, seed=loop["seed"], shape=(loop["dim"],))

    def breaks(x, t):
        return torch.where((t == broken)[:, None], math.nan, network(x, t))

    with pytest.raises(px.OutputError, match="NaN"):
        px.sample(breaks, noise, sampler, solver, generator=problems.generators(1))
