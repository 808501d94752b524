"""Loops that set some entries of the state before every call: solved with these entries in their places."""

from __future__ import annotations

import diffusers as df
import pytest
import torch

import parataxis as px
from loop_problems import Net, relative
from parataxis.parallel import parallel

from .zoo import DIM

OPTIONS = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULERS = {
    "ddim": lambda: df.DDIMScheduler(clip_sample=False, **OPTIONS),
    "ddim clipped": lambda: df.DDIMScheduler(**OPTIONS),
    "ddpm": lambda: df.DDPMScheduler(clip_sample=False, **OPTIONS),
    "ddpm clipped": lambda: df.DDPMScheduler(**OPTIONS),
    "flow": df.FlowMatchEulerDiscreteScheduler,
    "2M": lambda: df.DPMSolverMultistepScheduler(**OPTIONS),
    "v": lambda: df.DDPMScheduler(prediction_type="v_prediction", **OPTIONS),
}


def pinned_loop(net, steps, value, count=40):
    """A loop whose first entries are ``value(i)`` before call i."""

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        steps.set_timesteps(count)
        x = torch.randn(2, DIM, generator=generator)
        more = {"generator": generator} if isinstance(steps, df.DDPMScheduler) else {}
        for i, t in enumerate(steps.timesteps):
            x[:, :3] = value(i)
            x = steps.step(net(x, t), t, x, **more).prev_sample
        x[:, :3] = value(count)
        return x

    return run


@pytest.mark.parametrize("far", [0.5, 3.0], ids=["within the data", "beyond the clip"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pinned_entries_are_solved_in_one_pass(name, far):
    net, values = Net(DIM), far * torch.tensor([1.0, -0.5, 0.25])
    expected = pinned_loop(net, SCHEDULERS[name](), lambda i: values)(0)
    run = parallel(pinned_loop(net, SCHEDULERS[name](), lambda i: values), px.Secant(window=8), denoisers=[net])
    for _ in range(2):
        assert relative(run(0), expected) <= 1e-2
        assert run.report.mode == "one pass"
        assert not run.report.misses
        assert run.report.rounds < 30


@pytest.mark.parametrize("name", ["ddim", "ddpm clipped"])
@pytest.mark.parametrize("solver", [px.Secant(window=8), px.Secant(), px.Picard(window=8), px.Anderson()], ids=str)
def test_pins_follow_the_tolerance(name, solver):
    """At tolerance 0 the result is the loop's to rounding."""
    net = Net(DIM)
    expected = pinned_loop(net, SCHEDULERS[name](), lambda i: 0.5)(0)
    run = parallel(pinned_loop(net, SCHEDULERS[name](), lambda i: 0.5), solver, tolerance=0, denoisers=[net])
    assert relative(run(0), expected) <= 1e-5
    assert run.report.mode == "one pass"
    assert run.report.rounds <= 40


CHANGING = {
    "noisier": lambda i: float(torch.randn((), generator=torch.Generator().manual_seed(i))),
    "once": lambda i: 0.5 if i < 20 else -0.5,
    "slowly": lambda i: 0.5 + 1e-2 * i,
    "hardly": lambda i: 0.5 + 1e-4 * i,
}


@pytest.mark.filterwarnings("ignore:the rest of the loop runs sequentially")
@pytest.mark.parametrize("value", CHANGING.values(), ids=CHANGING)
@pytest.mark.parametrize("name", ["ddim", "ddpm clipped"])
def test_entries_that_are_set_to_other_values_give_the_loops_own_result(name, value):
    net = Net(DIM)
    expected = pinned_loop(net, SCHEDULERS[name](), value)(0)
    run = parallel(pinned_loop(net, SCHEDULERS[name](), value), px.Secant(window=8), denoisers=[net])
    for _ in range(3):
        error, report = relative(run(0), expected), run.report
        assert error <= 1e-2
        # Every miss adds to what may be wrong: where values drift, a run may not be able to tell.
        assert report.converged == (report.error_estimate <= 1e-2)
        assert report.rounds <= 40
