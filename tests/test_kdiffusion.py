"""k-diffusion's sampler functions, against their sequential loops written out."""

from __future__ import annotations

import math

import pytest
import torch

import parataxis as px
import problems
from ksamplers import SIGMAS, dpmpp_2m, euler, euler_ancestral, heun, model, state
from parataxis import kdiffusion

CHURN = {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.1}
CASES = [
    (kdiffusion.sample_euler, euler, {}),
    (kdiffusion.sample_euler, euler, CHURN),
    (kdiffusion.sample_euler_ancestral, euler_ancestral, {}),
    (kdiffusion.sample_euler_ancestral, euler_ancestral, {"eta": 0.5, "s_noise": 0.9}),
    (kdiffusion.sample_heun, heun, {}),
    (kdiffusion.sample_heun, heun, {**CHURN, "s_tmax": math.inf}),
    (kdiffusion.sample_dpmpp_2m, dpmpp_2m, {}),
]


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[3:-2]], ids=["to zero", "partial"])
@pytest.mark.parametrize(
    ("parallel", "loop", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_sample_is_the_loops_with_its_noise(parallel, loop, options, sigmas):
    """The sample is the loops with its noise."""
    torch.manual_seed(2)
    expected = loop(model, state(), sigmas, **options)
    for solver, tolerance, bound in [
        (px.Sequential(), 0, 1e-10),
        (px.Secant(), 0, 1e-10),
        (px.Secant(window=5), 1e-4, 1e-4),
        (px.Parareal(), 0, 1e-10),
    ]:
        torch.manual_seed(2)
        x = parallel(model, state(), sigmas, disable=True, solver=solver, tolerance=tolerance, **options)
        assert problems.relative(x, expected) <= bound
        assert x.dtype == torch.float64


@pytest.mark.parametrize("solver", [px.Sequential(), px.Secant(), px.Secant(window=5), px.Parareal()], ids=repr)
@pytest.mark.parametrize(
    ("parallel", "loop", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_callback_is_told_each_step_once_in_order(parallel, loop, options, solver):
    """The callback is told each step once in order."""
    theirs, ours = [], []
    torch.manual_seed(2)
    loop(model, state(), SIGMAS, callback=theirs.append, **options)
    torch.manual_seed(2)
    parallel(model, state(), SIGMAS, callback=ours.append, disable=True, solver=solver, tolerance=1e-4, **options)
    assert [told["i"] for told in ours] == list(range(len(SIGMAS) - 1))
    for told, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(told["sigma"], expected["sigma"])
        assert torch.allclose(told["sigma_hat"], expected["sigma_hat"])
        assert problems.relative(told["x"], expected["x"]) <= 1e-3
        assert problems.relative(told["denoised"], expected["denoised"]) <= 1e-2


def test_exception_in_the_callback_ends_the_loop_when_its_step_is_settled():
    """An exception in the callback ends the loop when its step is settled."""
    seen = []

    def interrupt(told):
        seen.append(told["i"])
        if told["i"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        kdiffusion.sample_euler(model, state(), SIGMAS, callback=interrupt, disable=True)
    assert seen == [0, 1, 2, 3]


def test_extra_args_follow_their_samples():
    shift = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    expected = dpmpp_2m(model, state(), SIGMAS, {"shift": shift})
    x = kdiffusion.sample_dpmpp_2m(model, state(), SIGMAS, {"shift": shift}, disable=True, tolerance=1e-6)
    assert problems.relative(x, expected) <= 1e-6

    def nested(x, sigma, options):
        assert options["scale"].shape == ()
        return model(x, sigma, options["conditions"][0])

    options = {"conditions": [shift], "scale": torch.tensor(2.0), "name": "any"}
    x = kdiffusion.sample_dpmpp_2m(nested, state(), SIGMAS, {"options": options}, disable=True, tolerance=1e-6)
    assert problems.relative(x, expected) <= 1e-6


def test_noise_sampler_is_asked_in_the_loops_order():
    """A noise sampler is asked in the loops order."""

    def sampler(log):
        generator = torch.Generator().manual_seed(4)

        def draw(sigma, after):
            log.append((float(sigma), float(after)))
            return torch.randn(state().shape, generator=generator, dtype=torch.float64)

        return draw

    ours, theirs = [], []
    expected = euler_ancestral(model, state(), SIGMAS, noise_sampler=sampler(theirs))
    x = kdiffusion.sample_euler_ancestral(
        model, state(), SIGMAS, disable=True, noise_sampler=sampler(ours), solver=px.Sequential()
    )
    assert ours == theirs
    assert problems.relative(x, expected) <= 1e-10


def test_rounds_are_fewer_and_half_precision_stays():
    """The rounds are fewer and half precision stays."""
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        assert x.dtype == sigma.dtype == torch.bfloat16
        return model(x.double(), sigma.double()).to(x)

    sigmas = torch.from_numpy(px.karras(0.03, 14.0).grid(50).sigma).float()
    x = kdiffusion.sample_euler(counted, state(torch.bfloat16), sigmas, disable=True)
    assert x.dtype == torch.bfloat16
    assert len(calls) <= 20


@pytest.mark.parametrize("sigmas", [SIGMAS.flip(0), SIGMAS[:1], SIGMAS[None], torch.tensor([1.0, 0.0, -1.0])])
def test_noise_levels_that_do_not_fall_raise(sigmas):
    """Noise levels that do not fall are refused."""
    with pytest.raises(ValueError, match="falling noise levels"):
        kdiffusion.sample_euler(model, state(), sigmas, disable=True)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (
            torch.ones(3, 4, dtype=torch.int64),
            {},
            r"x must be a floating-point tensor \(B, \*shape\) .* got torch.int64",
        ),
        (torch.ones(0, 4), {}, r"at least one sample, got torch.float32 \(0, 4\)"),
        ([[1.0]], {}, "got list"),
        (state(), {"s_churn": -1.0}, "s_churn must be at least 0, got -1.0"),
        (state(), {"tolerance": -1.0}, "tolerance must be"),
        (state(), {"max_rows": 0}, "max_rows must be"),
    ],
)
def test_what_does_not_fit_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        kdiffusion.sample_euler(model, x, SIGMAS, disable=True, **options)
    with pytest.raises(ValueError, match="eta must be at least 0, got -1"):
        kdiffusion.sample_euler_ancestral(model, state(), SIGMAS, disable=True, eta=-1)
    with pytest.raises(ValueError, match="sigmas must be a tensor"):
        kdiffusion.sample_euler(model, state(), SIGMAS.tolist(), disable=True)


def test_calls_are_bounded_and_halved_when_memory_runs_out():
    rows = []

    def small(x, sigma):
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(len(x))
        return model(x, sigma)

    expected = euler(model, state(), SIGMAS)
    for options in ({}, {"max_rows": 5}, {"solver": px.Secant()}):
        rows.clear()
        x = kdiffusion.sample_euler(small, state(), SIGMAS, disable=True, **options)
        assert problems.relative(x, expected) <= 1e-2
        assert max(rows) == options.get("max_rows", max(rows))


def test_callback_is_told_outputs_that_the_models_next_call_writes_over():
    """The callback is told outputs that the models next call writes over."""
    memory, told = {}, {}

    def replayed(x, sigma):
        return memory.setdefault(len(x), torch.empty_like(x)).copy_(model(x, sigma))

    for net in (model, replayed):
        told[net] = []
        kdiffusion.sample_euler(net, state(), SIGMAS, callback=lambda one, net=net: told[net].append(one), disable=True)
    for one, expected in zip(told[replayed], told[model], strict=True):
        assert torch.equal(one["denoised"], expected["denoised"])


def other(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return euler(model, x, sigmas, extra_args, callback, disable)


def test_what_is_known_of_one_model_is_not_taken_for_another_of_its_class():
    class Net(torch.nn.Module):
        def __init__(self, mixed):
            super().__init__()
            self.mixed = mixed

        def forward(self, x, sigma):
            away = torch.tanh(x) / (1 + sigma.view(-1, 1, 1) ** 2)
            return away + self.mixed * torch.tanh(x.mean(0, keepdim=True))

    def wrapped(net):
        return lambda x, sigma: net(x, sigma)

    run = kdiffusion.parallel(other)
    rowwise, mixing = wrapped(Net(0.0)), wrapped(Net(0.5))
    x = run(rowwise, state(), SIGMAS, disable=True)
    assert problems.relative(x, other(rowwise, state(), SIGMAS)) <= 1e-2
    calls = run.report.calls
    x = run(mixing, state(), SIGMAS, disable=True)
    assert problems.relative(x, other(mixing, state(), SIGMAS)) <= 1e-2
    run(rowwise, state(), SIGMAS, disable=True)
    assert run.report.calls < calls


def test_nan_of_a_model_is_said_by_its_step_and_the_sampler_itself_runs():
    def broken(x, sigma):
        return torch.where(sigma.view(-1, 1, 1) < 1, torch.nan, model(x, sigma))

    run = kdiffusion.parallel(other)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"returned NaN or Inf at step \d+ of 14"):
            result = run(broken, state(), SIGMAS, disable=True)
        assert torch.equal(result.isnan(), other(broken, state(), SIGMAS, disable=True).isnan())
