"""Steps of one call are evaluated and answered without detours, as those of any form are."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

import parataxis as px
from loop_problems import relative

DIM = 8
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddpm clipped": DDPMScheduler,
    "2M": lambda: DPMSolverMultistepScheduler(beta_schedule="scaled_linear"),
}


class Network(torch.nn.Module):
    """Takes channels beside the state, and gives some beside the prediction."""

    beside = 0.0  # by which outputs depend on the rows of the batch

    def __init__(self):
        super().__init__()
        weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) / DIM**0.5
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x, t, condition=None):
        state, others = x[:, :DIM], x[:, DIM:]
        output = torch.tanh(state @ self.weight + torch.as_tensor(t).float().reshape(-1, 1) / 1000)
        if others.numel():
            output = output + 0.1 * others.mean(1, keepdim=True)
        if condition is not None:
            output = output + 0.2 * condition
        output = output * (1 + self.beside * torch.sin(1e4 * output + len(x)))
        return torch.cat([output, output.abs()], 1) if others.numel() else output


class Other(torch.nn.Module):
    """A second network, of which the loop takes nothing: its steps have two calls."""

    def forward(self, x, t):
        return torch.cos(x)


def plain(net, x, t):
    return net(x, t.expand(len(x)))


def guided(net, x, t):
    condition = torch.arange(2.0).repeat_interleave(len(x))[:, None]
    without, given = net(torch.cat([x, x]), t, condition=condition).chunk(2)
    return without + 2 * (given - without)


def in_two_calls(net, x, t):
    without, given = (net(x, t, condition=torch.full((len(x), 1), float(c))) for c in (0, 1))
    return without + 2 * (given - without)


def side_by_side(net, x, t):
    condition = torch.arange(2.0).repeat(len(x))[:, None]
    outputs = net(x.repeat_interleave(2, 0), t, condition=condition).view(len(x), 2, DIM)
    return 3 * outputs[:, 1] - 2 * outputs[:, 0]


def beside_others(net, x, t):
    mask = torch.linspace(-1, 1, 3).expand(len(x), 3)
    return net(torch.cat([x, mask], 1), t)[:, :DIM]


class Transposed(torch.nn.Module):
    """Its outputs are views of memory in another order, as those of networks over sequences are."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv1d(4, 4, 1, bias=False).requires_grad_(requires_grad=False)
        self.layer.weight.copy_(torch.eye(4)[:, :, None])

    def forward(self, x, t):
        x = x.view(-1, 2, 4).transpose(1, 2)
        return torch.tanh(self.layer(x) + torch.as_tensor(t).reshape(-1, 1, 1) / 1000).transpose(1, 2)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_outputs_may_have_any_strides(name, groups, samples):
    net = Transposed()

    def run(generator):
        steps = SCHEDULERS[name]()
        steps.set_timesteps(20)
        x = torch.randn(samples, 2, 4, generator=generator)
        for t in steps.timesteps:
            output = net(torch.cat([x] * groups), t)[-samples:]
            x = steps.step(output, t, x, generator=generator).prev_sample
        return x

    solved = px.parallel(run, px.Secant(window=8), denoisers=[net])
    expected = run(torch.Generator().manual_seed(0))
    assert relative(solved(torch.Generator().manual_seed(0)), expected) <= 1e-2
    assert (solved.report.mode, solved.report.misses) == ("one pass", 0)


def loop(call, name, other=None):
    def run(net, samples, seed):
        steps, generator = SCHEDULERS[name](), torch.Generator().manual_seed(seed)
        steps.set_timesteps(20)
        x = torch.randn(samples, DIM, generator=generator)
        for t in steps.timesteps:
            output = call(net, x, t)
            if other is not None:
                other(x, t)
            x = steps.step(output, t, x, generator=generator).prev_sample
        return x

    return run


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("call", [plain, guided, side_by_side, beside_others])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_they_take_the_rounds_of_steps_of_any_form(name, call, samples):
    net, other = Network(), Other()
    equal = px.parallel(loop(call, name), px.Secant(window=8), denoisers=[net])
    general = px.parallel(loop(call, name, other), px.Secant(window=8), denoisers=[net, other])
    for seed in range(2):
        expected = loop(call, name)(net, samples, seed)
        first, second = equal(net, samples, seed), general(net, samples, seed)
        assert relative(first, expected) <= equal.report.error_estimate <= 1e-2
        assert relative(first, second) <= 1e-5
        for figure in ("mode", "rounds", "evaluations", "misses", "real_calls"):
            ours, theirs = getattr(equal.report, figure), getattr(general.report, figure)
            assert ours == (theirs // 2 if figure == "real_calls" else theirs)


@pytest.mark.parametrize("call", [plain, guided, in_two_calls])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_floor_is_about_what_the_batch_rounds(name, call):
    """The rounding of the observed call in a batch, carried to the sample: above the tolerance it warns."""
    net = Network()
    net.beside = 3e-4
    run = px.parallel(loop(call, name), px.Secant(window=8), tolerance=0, denoisers=[net])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = relative(run(net, 1, 0), loop(call, name)(net, 1, 0))
    assert any("rounding alone" in str(warning.message) for warning in caught)
    assert error / 16 <= run.report.floor <= 16 * error
    assert run.report.error_estimate >= run.report.floor
    assert not run.report.converged


def test_rows_are_split_when_memory_runs_out():
    class Small(Network):
        def forward(self, x, t, condition=None):
            if len(x) > 4:
                raise torch.cuda.OutOfMemoryError("no room")
            return super().forward(x, t, condition)

    net = Small()
    run = px.parallel(loop(plain, "ddim"), px.Secant(window=8), denoisers=[net])
    for _ in range(2):
        assert relative(run(net, 1, 0), loop(plain, "ddim")(net, 1, 0)) <= 1e-2
    assert run.report.mode == "one pass"
    assert run.report.peak_rows <= 4


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("call", [plain, guided, in_two_calls])
def test_calls_have_the_numbers_of_rows_that_are_allowed(call, name, samples):
    """With buckets, calls that hold several steps are padded to them or split; the sample stays the same."""
    single = {samples, 2 * samples}  # rows of the loop's own calls

    class Counting(Network):
        def forward(self, x, t, condition=None):
            self.seen.append(len(x))
            return super().forward(x, t, condition)

    net = Counting()
    net.seen = []
    run = loop(call, name)
    expected = run(net, samples, 0)
    parallel = px.parallel(run, px.Secant(window=8), denoisers=[net], buckets=(12, 6))
    free = px.parallel(run, px.Secant(window=8), denoisers=[net])
    plain_result = free(net, samples, 0)
    for _ in range(2):  # the first one tries how calls can be batched
        net.seen = []
        assert relative(parallel(net, samples, 0), expected) < 1e-2
    assert set(net.seen) <= {6, 12} | single
    assert {6, 12} & set(net.seen)
    assert parallel.report.peak_rows <= 12
    assert parallel.report.evaluations == free.report.evaluations  # padding is none
    assert relative(parallel(net, samples, 0), plain_result) < 1e-4


def test_network_that_changes_between_calls_gets_another_layout():
    """Once it takes a time for every row, then one for all: the observed call shows that the batch is wrong."""

    class Moody(Network):
        alone = False

        def forward(self, x, t, condition=None):
            t = torch.as_tensor(t).reshape(-1)
            return super().forward(x, t[:1] if self.alone else t, condition)

    net = Moody()
    run = px.parallel(loop(plain, "ddim"), px.Secant(window=8), denoisers=[net])
    run(net, 1, 0)
    assert run.report.mode == "one pass"
    net.alone = True
    assert relative(run(net, 1, 0), loop(plain, "ddim")(net, 1, 0)) <= 1e-2
    assert run.report.mode == "one pass"
    assert run.report.rounds < run.report.steps


def test_large_states_are_made_ready_one_by_one():
    class Large(torch.nn.Module):
        def forward(self, x, t):
            return 0.5 * x + 0.1 * torch.tanh(0.5 * x * torch.as_tensor(t).view(-1, 1) / 1000)

    net, steps = Large(), DDIMScheduler(clip_sample=False)

    def loop(x):
        steps.set_timesteps(16)
        for t in steps.timesteps:
            x = steps.step(net(x.clone(), t), t, x).prev_sample
        return x

    x = torch.randn(1, 1 << 18, generator=torch.Generator().manual_seed(0))
    run = px.parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(x), loop(x)) <= run.report.error_estimate <= 1e-2
    assert run.report.mode == "one pass"
    assert run.report.rounds < 16


def test_number_of_tensors_does_not_grow_with_the_number_of_steps():
    """Not even of small ones: between large ones that come and go they split the heap, which was a gigabyte then."""
    net, steps, counts = Network(), DDIMScheduler(clip_sample=False), {}

    def loop(count):
        steps.set_timesteps(count)
        x = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(steps.timesteps):
            x = steps.step(net(x, t), t, x).prev_sample
            if i in (count // 3, count - 8):
                counts[count, i] = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        return x

    run = px.parallel(loop, px.Secant(window=4), denoisers=[net])
    run(90)
    assert run.report.mode == "one pass"
    early, late = counts[90, 30], counts[90, 82]
    assert late <= early + 16  # up to four steps are ready to be answered; 52 have been answered in between


def test_states_enter_a_window_of_a_loop_whose_recurrence_holds_earlier_outputs():
    """One pass begins behind a step that multistep schedulers remember: it enters like noise."""
    net, scheduler = Network(), DPMSolverMultistepScheduler()

    def loop(x):
        scheduler.set_timesteps(24)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x).prev_sample
        return x

    x = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0))
    run = px.parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(x), loop(x)) <= 1e-2
    assert run.report.mode == "one pass"
    assert run.report.rounds < 20
    assert not run.report.reason
