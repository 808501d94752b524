"""What the rounding of a network in few bits does to the result of its loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import parataxis as px
from loop_problems import LOOPS, Net, Noise, both, relative
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


def decide(net, x, limit=9.0):
    """Go to one of two points, by velocity, in 40 steps: a start in between is chaotic."""
    for i in range(40):
        x = (x - net(x, torch.full((len(x),), 1 - i / 40)) / 40).clamp(-limit, limit)
    return x


class TwoPoints(nn.Module):
    """The exact velocity of data near two points."""

    def __init__(self):
        super().__init__()
        self.points = torch.stack([torch.ones(DIM), -torch.ones(DIM)])

    def forward(self, x, t):
        t = t[:, None].clamp(min=0.02)
        variance = (0.05 * (1 - t)) ** 2 + t**2
        weights = torch.softmax(-((x[:, None] - (1 - t)[:, None] * self.points) ** 2).sum(2) / (2 * variance), 1)
        mean = weights @ self.points
        return (x - mean - (1 - t) * 0.0025 / variance * (x - (1 - t) * mean)) / t


def runs_of_decide(window, means):
    """Yield the report of one call behind the other, from starts of these means, and the error of each."""
    net, noise = TwoPoints(), torch.randn(1, DIM, generator=torch.Generator().manual_seed(0))
    run = parallel(decide, px.Secant(window=window), denoisers=[net])
    for mean in means:
        start = noise - noise.mean() + mean
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield relative(run(net, start), decide(net, start)), run.report


def test_floor_is_that_of_the_present_call():
    """An input near a decision moves by rounding as no other does."""
    floors = []
    for error, report in runs_of_decide(8, (0.5, 1e-5)):
        assert error <= report.error_estimate <= 1e-2
        floors.append(report.floor)
    assert floors[1] >= 10 * floors[0]


def test_chaotic_call_is_sequential_and_the_next_one_is_not():
    for number, (error, report) in enumerate(runs_of_decide(None, (0.5, 1e-6, 0.6))):
        assert error <= 1e-5
        if number == 1:
            assert report.mode == "sequential"
            assert "errors of its outputs grow" in report.reason
        else:
            assert report.mode == "recurrence"
            assert report.passes == 2 or not number  # the last one was not recorded anew


@pytest.mark.parametrize("name", ["guided", "second order", "heun", "guided by two calls", "clipped"])
def test_floor_is_what_moved_outputs_show(name):
    expected, _, run = both(LOOPS[name], Net())
    generator, moved = torch.Generator().manual_seed(1), []

    class Moved(Net):
        def forward(self, x, t, condition=None):
            output = super().forward(x, t, condition)
            noise = torch.randn(output.shape, generator=generator)
            return output + 1e-5 * output.square().mean(1, keepdim=True).sqrt() * noise

    for _ in range(4):
        torch.manual_seed(0)
        moved.append(relative(LOOPS[name](Moved()), expected) / 1e-5)
    assert run.report.mode == ("replay" if name == "clipped" else "recurrence")
    rounding = torch.finfo(torch.float32).eps
    assert max(moved) / 3 <= run.report.floor / rounding <= 4 * max(moved)


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
def test_chaotic_guidance_in_one_pass_is_not_said_to_be_exact():
    """Some samples are near a decision, which strong guidance makes of much more than their rounding."""
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(25)
    fine, coarse = Noise(32, count=5), Noise(32, count=2, std=0.6)

    def loop(x):
        for t in scheduler.timesteps:
            guide = coarse(x, t)
            x = scheduler.step(guide + 3 * (fine(x, t) - guide), t, x).prev_sample
        return x

    run, exact, moved = parallel(loop, px.Secant(window=8), denoisers=[fine, coarse], tolerance=0), 0, 0
    for seed in range(6):
        noise = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
        error = relative(run(noise), loop(noise))
        assert run.report.mode == "one pass"
        assert error <= 1e-5 or not run.report.converged
        assert error <= 30 * max(run.report.error_estimate, run.report.floor)
        exact, moved = exact + run.report.converged, moved + (error > 1e-5)
    assert exact >= 1
    assert moved >= 1
