"""Laws over inputs that nobody chose: dtypes, shapes, numbers of steps, solvers, samplers, contexts.

``EXAMPLES`` in the environment asks for more of them than `make test` has time for; see benchmarks/properties.py.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import parataxis as px
import problems

EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
MOST_STEPS = 200 if EXAMPLES else 40
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (3, 4), (2, 4, 4), (2, 3, 4, 4), (1, 1, 1, 1, 1)]  # one element .. video
SAMPLERS = list(px.SAMPLERS)
SOLVERS = [
    px.Sequential(),
    *(kind(window=w) for kind in (px.Picard, px.Secant, px.Anderson) for w in (1, 5, None)),
    px.Parareal(),
    px.Parareal(blocks=2, pipelined=False),
    px.CoarseToFine(px.Secant(window=9), strides=(4, 2)),
    px.Speculative(window=4),
]


def examples(few: int):
    """Return settings: few examples, the same in every run; or as many as are asked for, others in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES or few, deadline=None, derandomize=not EXAMPLES, database=None, suppress_health_check=slow
    )


def network(x, t):
    """Return a smooth output of every row, whatever its shape and dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    t = t.to(wide).view(-1, *(1,) * (x.ndim - 1))
    return (0.4 * torch.tanh(wide) + 0.05 * torch.sin(wide + 0.01 * t)).to(x.dtype)


def draw(name, solver, noise, steps=12, **options):
    sampler = problems.sampler(name, steps)
    generators = [torch.Generator().manual_seed(b) for b in range(len(noise))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return px.sample(network, noise, sampler, solver, generator=generators, **options)


def noise_of(shape, count, dtype, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES = {
    "name": st.sampled_from(SAMPLERS),
    "solver": st.sampled_from(SOLVERS),
    "dtype": st.sampled_from(DTYPES),
    "shape": st.sampled_from(SHAPES),
    "steps": st.integers(1, MOST_STEPS),
    "count": st.integers(1, 3),
}


def supported(name, solver, steps):
    try:
        return solver.unsupported(problems.sampler(name, steps).coefficients) is None
    except ValueError:  # there is no such sampler with so few steps
        return False


@examples(20)
@given(**CASES, tolerance=st.sampled_from([0.0, 1e-4, 1e-2]))
def test_sample_has_its_shape_and_says_what_it_is_worth(name, solver, dtype, shape, steps, count, tolerance):
    """No crash, no warning: finite samples of the noise's shape, at most N rounds, an honest reason."""
    assume(supported(name, solver, steps))
    noise = noise_of(shape, count, dtype)
    solutions = draw(name, solver, noise, steps, tolerance=tolerance)
    assert solutions.x.shape == noise.shape
    assert solutions.x.dtype == torch.promote_types(dtype, torch.float32)
    for solution in solutions:
        assert torch.isfinite(solution.x).all()
        assert solution.rounds <= solution.steps
        assert solution.peak_width <= solution.evaluations
        assert sum(entry.width for entry in solution.history) == solution.evaluations
        assert solution.converged == (solution.reason == "converged")
        assert solution.converged or solution.reason.startswith("uncertain")
        if solution.converged and not isinstance(solver, px.Speculative):
            assert solution.error_estimate <= tolerance


@examples(15)
@given(**CASES)
def test_with_tolerance_zero_it_is_the_sequential_sample(name, solver, dtype, shape, steps, count):
    """Whatever the solver: tolerance 0 is the sequential loop, to the rounding of its dtype."""
    assume(supported(name, solver, steps) and not isinstance(solver, px.Speculative))
    noise = noise_of(shape, count, dtype)
    expected = draw(name, px.Sequential(), noise, steps).x.double().flatten(1)
    actual = draw(name, solver, noise, steps, tolerance=0).x.double().flatten(1)
    # Rounding to 16 bits is a step: states on either side of it differ by one unit, at some steps.
    bound = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    assert ((actual - expected).norm(dim=1) <= bound * expected.norm(dim=1) + 1e-12).all()


@examples(16)
@given(
    name=CASES["name"],
    solver=CASES["solver"],
    problem=st.sampled_from(list(problems.mixtures())),
    steps=st.integers(5, MOST_STEPS),
    tolerance=st.sampled_from([1e-2, 1e-3, 1e-5]),
)
def test_error_stays_below_its_estimate(name, solver, problem, steps, tolerance):
    """What a solver says of its error is true, on problems whose networks are known."""
    assume(supported(name, solver, steps) and not isinstance(solver, px.Speculative))
    result = problems.solve(problem, name, steps, solver, count=3, tolerance=tolerance)
    expected = problems.reference(problem, name, steps, count=3)
    for x, reference, solution in zip(result.x, expected, result, strict=True):
        assert float((x - reference).norm() / reference.norm()) <= solution.error_estimate + 1e-12
        assert solution.converged == (solution.error_estimate <= tolerance)


@examples(6)
@given(**{**CASES, "dtype": st.just(torch.float64)}, rows=st.integers(1, 9))
def test_stream_and_batch_draw_the_same_samples(name, solver, dtype, shape, steps, count, rows):
    """Rows that are limited, samples that come and go: what is drawn is the same, within the tolerance."""
    assume(supported(name, solver, steps) and not isinstance(solver, px.Speculative))
    noise = noise_of(shape, count, dtype)
    batch = draw(name, solver, noise, steps, tolerance=1e-6).x
    stream = draw(name, solver, noise, steps, tolerance=1e-6, rows_per_round=rows).x
    split = draw(name, solver, noise, steps, tolerance=1e-6, max_rows=rows).x
    torch.testing.assert_close(stream, batch, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split, batch, rtol=1e-8, atol=1e-9)


@examples(10)
@given(**{**CASES, "count": st.just(1)}, after=st.integers(0, 12))
def test_solve_goes_on_from_any_round_to_the_same_bits(name, solver, dtype, shape, steps, count, after):
    """A solve that is stopped and resumed is the solve that was not."""
    assume(supported(name, solver, steps))

    def begin():
        states = noise_of(shape, count, dtype).to(torch.promote_types(dtype, torch.float32))
        generator = [torch.Generator().manual_seed(3)]
        sampler = problems.sampler(name, steps)
        recurrence = sampler.recurrence(states, [torch.Generator().manual_seed(4)], dtype)
        return sampler, px.start(sampler, recurrence, solver, dtype=dtype, generator=generator)

    sampler, whole = begin()
    times = sampler.network_times(dtype)

    def finish(runs, most=10**9):
        for rounds in px.drive(runs, lambda rows: network(rows.x, times[rows.step])):
            if rounds >= most:
                break
        return runs[0]

    stopped, resumed = begin()[1], begin()[1]
    if after:
        finish(stopped, after)
    resumed[0].load_state_dict(stopped[0].state_dict())
    assert torch.equal(finish(resumed).solution.x, finish(whole).solution.x)
    assert resumed[0].rounds == whole[0].rounds


NOISE = noise_of((5,), 3, torch.float32)


def plain():
    return draw("ddpm", px.Secant(window=5), NOISE).x


def test_threads_draw_the_same_samples_side_by_side():
    """Solves share nothing that changes."""
    expected, drawn = plain(), [None] * 4

    def work(number):
        with torch.no_grad():
            drawn[number] = px.sample(
                network,
                NOISE,
                problems.sampler("ddpm", 12),
                px.Secant(window=5),
                generator=[torch.Generator().manual_seed(b) for b in range(3)],
            ).x

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, expected) for x in drawn)


def test_asyncio_draws_the_same_samples():
    """Solves in worker threads of an event loop."""

    async def several():
        return await asyncio.gather(*(asyncio.to_thread(solve) for _ in range(3)))

    def solve():
        generators = [torch.Generator().manual_seed(b) for b in range(3)]
        return px.sample(network, NOISE, problems.sampler("ddpm", 12), px.Secant(window=5), generator=generators).x

    expected = plain()
    assert all(torch.equal(x, expected) for x in asyncio.run(several()))


def send(connection):
    connection.send(plain().tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", *(["spawn"] if EXAMPLES else [])])
def test_processes_draw_the_same_samples(method):
    """A process that was forked or spawned draws what its parent does."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=send, args=(theirs,))
    process.start()
    drawn = ours.recv()
    process.join()
    assert torch.equal(torch.tensor(drawn), plain())


def test_contexts_of_torch_change_nothing():
    """Inference mode, gradients, another default dtype: the same bits."""
    expected = plain()
    with torch.inference_mode():
        assert torch.equal(plain(), expected)
    with torch.enable_grad():
        assert torch.equal(plain(), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(plain(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(), expected)  # this network has no matrix product


@pytest.mark.parametrize("kind", ["script", "compile", *(["export"] if EXAMPLES else [])])
def test_networks_of_other_kinds_draw_the_same_samples(kind):
    """TorchScript, torch.export and torch.compile give callables like any other."""

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 0.4 * torch.tanh(x) + 0.05 * torch.sin(x + 0.01 * t.view(-1, 1))

    net, x, t = Net().eval(), NOISE[:2], torch.zeros(2)
    if kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch discourage it
            other = torch.jit.script(net)
    elif kind == "export":
        rows = torch.export.Dim("rows", min=2, max=64)
        other = torch.export.export(net, (x, t), dynamic_shapes=({0: rows}, {0: rows})).module()
    else:
        other = torch.compile(net, backend="eager", dynamic=True)
    sampler = problems.sampler("ddim", 12)
    expected = px.sample(net, NOISE, sampler, px.Secant(window=5), buckets=(2, 4, 8, 16))
    actual = px.sample(other, NOISE, sampler, px.Secant(window=5), buckets=(2, 4, 8, 16))
    torch.testing.assert_close(actual.x, expected.x, rtol=1e-5, atol=1e-5)


class Mixing(torch.nn.Module):
    """Rounds its input to eight bits, with one scale for all rows of a call, as dynamic quantization does."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / 127
        return network((x / scale).round() * scale, t)


def test_outputs_that_depend_on_other_rows_are_said():
    """One row of a round is evaluated once more, in other company."""
    sampler = problems.sampler("ddim", 12)
    with pytest.warns(RuntimeWarning, match="changes by .* with the other rows of its call"):
        px.sample(Mixing(), NOISE, sampler, px.Secant(window=5))


def test_rows_are_compared_at_the_price_of_one():
    """No call is larger for it, and none is added; where a call has no room for a row, nothing is compared."""
    sizes, sampler = [], problems.sampler("ddim", 12)

    def counting(x, t):
        sizes.append(len(x))
        return network(x, t)

    runs = px.start(sampler, sampler.recurrence(NOISE), px.Secant(window=5))
    for _ in px.drive(runs, lambda rows: counting(rows.x, sampler.network_times()[rows.step])):
        pass
    expected = sizes.copy()
    for options, extra in (({}, 1), ({"max_rows": 15}, 1), ({"max_rows": 1}, 0), ({"buckets": (15,)}, 0)):
        sizes.clear()
        px.sample(counting, NOISE, sampler, px.Secant(window=5), **options)
        assert max(sizes) <= max(expected)
        if "buckets" not in options:
            assert sum(sizes) - sum(expected) == extra
        assert len(sizes) == len(expected) or options == {"max_rows": 1}


@pytest.mark.filterwarnings("ignore:.*quantiz:")  # torch is about to move it into a package of its own
def test_dynamic_quantization_is_said():
    """Its scale is that of all rows of a call."""
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 5)
    quantized = quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})
    with pytest.warns(RuntimeWarning, match="with the other rows of its call"):
        px.sample(lambda x, t: 0.3 * quantized(x), NOISE, problems.sampler("ddim", 12), px.Secant(window=5))


def dual(solve, x):
    with torch.autograd.forward_ad.dual_level():
        return solve(torch.autograd.forward_ad.make_dual(x, x))


TRANSFORMS = {
    "vmap": lambda solve, x: torch.vmap(solve)(x[:, None]),
    "jvp": lambda solve, x: torch.func.jvp(solve, (x,), (x,)),
    "grad": lambda solve, x: torch.func.grad(lambda x: solve(x).sum())(x),
    "dual": dual,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform):
    """What cannot be followed is refused, not followed wrongly."""
    solve = lambda x: px.sample(network, x, problems.sampler("ddim", 5), px.Picard()).x  # noqa: E731
    with pytest.raises(ValueError, match="noise is inside a transform"):
        TRANSFORMS[transform](solve, NOISE)
