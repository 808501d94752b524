"""What the rounding of a network in few bits does to the result of its loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import parataxis as px
from loop_problems import relative
from parataxis.parallel import parallel

DIM = 32


class Chaotic(nn.Module):
    """A network of float32 that makes much of a small change of its input, in all directions."""

    def __init__(self, strength):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(DIM, 256), nn.Linear(256, DIM)
        self.strength = strength
        self.requires_grad_(False)

    def forward(self, x, t):
        hidden = torch.sin(3 * self.inner(x) + torch.as_tensor(t) / 300)
        return x + self.strength * self.outer(hidden)


def autocast_loop(strength):
    """Return a loop that enters autocast by itself, around its network."""
    net, steps = Chaotic(strength), DDIMScheduler(clip_sample=False)
    steps.set_timesteps(25)

    def loop(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for t in steps.timesteps:
                x = steps.step(net(x, t).float(), t, x).prev_sample
        return x

    return loop


@pytest.mark.parametrize("window", [8, None])
def test_autocast_within_a_chaotic_loop_is_no_reason_to_claim_convergence(window):
    """The rounding of one step is small, but the steps behind it make much more of it."""
    run = parallel(autocast_loop(2.0), px.Secant(window=window))
    for call in range(2):
        noise = torch.randn(2, DIM, generator=torch.Generator().manual_seed(call))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result, report = run(noise), run.report
        error = relative(result, autocast_loop(2.0)(noise))
        assert error <= 1e-2 if report.converged else error <= 4 * report.floor
        assert report.rounds <= 25
        assert "bits" in report.reason or "rounding of outputs" in report.reason


def test_autocast_within_a_gentle_loop_converges():
    run = parallel(autocast_loop(0.1), px.Secant(window=None), tolerance=3e-2)
    noise = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    assert relative(run(noise), autocast_loop(0.1)(noise)) <= 3e-2
    assert run.report.mode == "recurrence"
    assert run.report.converged
    assert run.report.rounds < 25
