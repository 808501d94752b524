"""On a CUDA device: the CPU's results, half precision, one wait a round, graphs, memory that ends, streams.

``make gpu`` runs these; without a device they are skipped. Only public names of the package are used, so that they hold
for whatever is inside.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import parataxis as px
from baselines import Coefficients, Graphed, GraphedLoop, cuda_graph, drawn, eager_loop

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS, SHAPE = 30, (4, 16)
SOLVERS = [
    px.Sequential(),
    px.Picard(window=8),
    px.Picard(window=8, rule="paradigms", entry="copy"),
    px.Secant(window=8),
    px.Secant(),
]
OTHERS = {"Anderson": {"window": 8}, "Parareal": {"blocks": 5}}
SOLVERS += [getattr(px, name)(**options) for name, options in OTHERS.items() if hasattr(px, name)]
SAMPLERS = ["ddim", "ddpm", "dpmpp_2m"]
PAIRS = [
    pytest.param(solver, name, id=f"{type(solver).__name__}-{i}-{name}")
    for (i, solver), name in itertools.product(enumerate(SOLVERS), SAMPLERS)
    if not (type(solver).__name__ == "Parareal" and name == "dpmpp_2m")
]


class Mixer(nn.Module):
    """A small network whose output depends on all of its row."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 16)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)

    def forward(self, x, t, condition=None):
        hidden = self.first(x) * (1 + t.to(x)[:, None, None] / 1000)
        if condition is not None:
            hidden = hidden + condition[:, None]
        return torch.tanh(self.second(torch.tanh(hidden)))


def noise(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def apart(x, y):
    x, y = x.double().cpu(), y.double().cpu()
    return float((x - y).norm() / y.norm())


def solve(network, start, name, solver, **options):
    sampler = px.SAMPLERS[name](steps=STEPS if name != "heun" else STEPS // 2)
    return px.sample(network, start, sampler, solver, generator=generators(len(start)), **options)


@pytest.fixture(autouse=True)
def _full_float32():
    """Matrix products in float32, not in TF32, so that rounding is the CPU's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.synchronize()


@pytest.mark.parametrize(("solver", "name"), PAIRS)
def test_samples_are_the_cpus_to_rounding(solver, name):
    network, start = Mixer(), noise(3)
    there = solve(network, start, name, solver, tolerance=1e-4)
    here = solve(network.cuda(), start.cuda(), name, solver, tolerance=1e-4)
    assert here.x.is_cuda
    assert apart(here.x, there.x) <= 1e-4
    assert abs(here.rounds - there.rounds) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_half_precision_network_with_float32_states_keeps_to_its_own_loop(dtype, name):
    network = Mixer().cuda().to(dtype)

    def denoise(x, t):
        return network(x.to(dtype), t).float()

    start = noise(2).cuda()
    loop = solve(denoise, start, name, px.Sequential())
    found = solve(denoise, start, name, px.Secant(window=8))
    assert found.x.dtype == torch.float32
    assert apart(found.x, loop.x) <= 3e-2  # the tolerance, and the rounding of calls with other numbers of rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_noise_in_half_precision_reaches_the_network_in_it(dtype):
    network, seen = Mixer().cuda().to(dtype), set()

    def denoise(x, t):
        seen.add(x.dtype)
        return network(x, t)

    found = solve(denoise, noise(2).cuda().to(dtype), "ddim", px.Secant(window=8))
    assert seen == {dtype}
    assert torch.isfinite(found.x.float()).all()


def waits(call):
    """Return what call returns, and how often the host waited for the device in it."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    with torch.profiler.profile(activities=kinds) as recorder:
        found = call()
        events = None
    events = recorder.key_averages()
    return found, sum(event.count for event in events if event.key in names)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("solver", [px.Picard(window=8), px.Secant(window=8), px.Secant()], ids=repr)
def test_the_host_waits_for_the_device_once_a_round(solver, count, captured):
    network = Mixer().cuda()
    denoise = cuda_graph(network) if captured else network
    start = noise(count).cuda()
    once = generators(count)[0]

    def run():
        sampler = px.SAMPLERS["ddim"](steps=STEPS)
        return px.sample(denoise, start, sampler, solver, generator=once, tolerance=1e-3)

    run()
    found, count_of_waits = waits(run)
    assert count_of_waits <= found.rounds + 6  # the check of the noise, the first upload, the profiler's own end


def test_rounds_raise_no_hidden_wait():
    """Torch itself says so where anything but the one read of a round waits: at most one warning a round."""
    import warnings

    network, start = Mixer().cuda(), noise(1).cuda()
    sampler = px.SAMPLERS["ddim"](steps=STEPS)
    px.sample(network, start, sampler, px.Secant(window=8))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = px.sample(network, start, sampler, px.Secant(window=8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    said = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert len(said) <= found.rounds + 3, said[:3]


@pytest.mark.parametrize("wrap", [Graphed, cuda_graph], ids=["graph of calls", "the package's"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("solver", [px.Picard(window=8), px.Secant(window=8), px.Secant()], ids=repr)
def test_graphs_with_static_outputs_change_nothing(solver, name, wrap):
    network, graphed = Mixer().cuda(), wrap(Mixer().cuda())
    for seed in range(3):  # the graphs of the first one serve the others
        start = noise(2, seed).cuda()
        plain = solve(network, start, name, solver, buckets=[16])
        found = solve(graphed, start, name, solver, buckets=[16])
        assert apart(found.x, plain.x) <= 1e-4


def test_a_graphed_network_sees_each_conditions_own_rows():
    network, graphed = Mixer().cuda(), cuda_graph(Mixer().cuda())
    for seed in range(3):
        condition = torch.randn(2, 64, generator=torch.Generator().manual_seed(9 + seed)).cuda()
        start = noise(2, seed).cuda()
        plain = solve(network, start, "ddim", px.Secant(window=8), condition=condition, buckets=[16])
        found = solve(graphed, start, "ddim", px.Secant(window=8), condition=condition, buckets=[16])
        assert apart(found.x, plain.x) <= 1e-4


def test_out_of_memory_halves_rows():
    network, sizes = Mixer().cuda(), []

    def cramped(x, t):
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return network(x, t)

    start = noise(2).cuda()
    plain = solve(network, start, "ddim", px.Secant(window=8))
    found = solve(cramped, start, "ddim", px.Secant(window=8))
    assert apart(found.x, plain.x) <= 1e-4
    assert max(sizes[3:]) <= 5


def test_memory_that_really_ends_halves_rows():
    network, failed = Mixer().cuda(), []
    free, _ = torch.cuda.mem_get_info()
    row = int(0.6 * free / 8)  # eight rows would take more than half of what is free, twice

    def hungry(x, t):
        try:
            held = [torch.empty(len(x), row, dtype=torch.uint8, device="cuda") for _ in range(2)]
        except torch.cuda.OutOfMemoryError:
            failed.append(len(x))
            raise
        output = network(x, t)
        del held
        return output

    start = noise(1).cuda()
    plain = solve(network, start, "ddim", px.Secant(window=8))
    found = solve(hungry, start, "ddim", px.Secant(window=8))
    torch.cuda.empty_cache()
    assert failed
    assert apart(found.x, plain.x) <= 1e-4


def test_a_row_that_does_not_fit_is_an_error():
    def full(x, t):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        solve(full, noise(1).cuda(), "ddim", px.Secant(window=8))


@pytest.mark.parametrize("captured", [False, True])
def test_a_side_stream_gives_the_same_sample(captured):
    network, start = Mixer().cuda(), noise(2).cuda()
    denoise = cuda_graph(network) if captured else network
    plain = solve(network, start, "ddpm", px.Secant(window=8))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = solve(denoise, start, "ddpm", px.Secant(window=8))
    torch.cuda.current_stream().wait_stream(side)
    assert apart(found.x, plain.x) <= 1e-4


@pytest.mark.parametrize("captured", [False, True])
def test_samples_that_come_and_go_are_those_of_a_batch(captured):
    network, start = Mixer().cuda(), noise(6).cuda()
    denoise = cuda_graph(network) if captured else network
    sampler = px.SAMPLERS["ddim"](steps=STEPS)
    plain = px.sample(network, start, sampler, px.Sequential())
    jobs = [px.Job(one) for one in start]
    stream = px.stream(denoise, jobs, sampler, px.Secant(window=8), rows_per_round=12, buckets=[12])
    found = dict(stream)
    assert sorted(found) == list(range(6))
    assert max(apart(found[b].x, plain[b].x) for b in range(6)) <= 1e-2


def test_a_compiled_network_is_solved():
    network = Mixer().cuda()
    compiled = torch.compile(network, dynamic=True)
    start = noise(2).cuda()
    plain = solve(network, start, "ddim", px.Secant(window=8))
    found = solve(compiled, start, "ddim", px.Secant(window=8), buckets=[16])
    assert apart(found.x, plain.x) <= 1e-4


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_loops_to_beat_give_the_sequential_sample(name, clip):
    """The baselines of the benchmarks are right: eager, one graph a step, one graph for all steps."""
    network = Mixer().cuda()

    def denoise(x, t, condition=None):
        return network(x, t)

    sampler = px.SAMPLERS[name](steps=STEPS, clip=clip)
    coefficients = Coefficients.of(sampler)
    graphed = GraphedLoop(denoise, SHAPE, None, "cuda", compiled=False)
    for seed in range(2):
        start, generator = noise(1, seed).cuda(), torch.Generator().manual_seed(seed)
        plain = px.sample(network, start, sampler, px.Sequential(), generator=torch.Generator().manual_seed(seed))
        begin, added = drawn(sampler, start, generator)
        assert apart(eager_loop(denoise, coefficients, begin, added, None), plain.x) <= 1e-4
        for whole in (False, True):
            assert apart(graphed(coefficients, begin, added, None, whole=whole), plain.x) <= 1e-4


def test_a_plan_is_made_on_the_device():
    network, start = Mixer().cuda(), noise(1).cuda()
    plan = px.plan(network, start, px.SAMPLERS["ddim"](steps=50))
    assert plan.loop_seconds > 0
    assert dataclasses.is_dataclass(plan)
