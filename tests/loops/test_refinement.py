"""What is tried where a replay is not good enough: never more rounds than the loop has steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parataxis as px
from loop_problems import DIM, LEVELS, Net, Noise, ddim, relative, steps
from parataxis.parallel import parallel


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
@pytest.mark.filterwarnings("ignore:the loop runs sequentially")
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("tolerance", [3e-2, 1e-3])
def test_loop_in_16_bits_takes_no_more_rounds_than_steps(eta, window, tolerance):
    """Behind its first solve, all steps are evaluated once more, and not until a window has passed its own test."""
    net = Net()
    torch.manual_seed(0)
    expected = ddim(net, eta=eta, dtype=torch.bfloat16)
    run = parallel(ddim, px.Secant(window=window), tolerance=tolerance, denoisers=[net])
    for _ in range(2):
        torch.manual_seed(0)
        result, report = run(net, eta=eta, dtype=torch.bfloat16), run.report
        assert report.rounds <= report.steps
        assert relative(result, expected) <= max(report.error_estimate, report.floor)


class Towards(nn.Module):
    """A network that leads every element to about a given value."""

    def forward(self, x, t, value):
        a = LEVELS[t].float()
        s = (1 - a**2).sqrt()
        return s * (x - a * value) / (0.1 * a**2 + s**2) + 0.1 * torch.tanh(x.roll(1, 1))


def test_loop_that_turns_out_not_to_be_linear_goes_on_from_its_first_solve():
    """Only the second call goes where the loop has a branch; recorded anew, it shows the same recurrence as before."""
    net = Towards()

    def loop(x, value):
        for t, a, s, b, r in steps(25):
            clean = (x - s * net(x, t, value)) / a
            x = b * clean + r * (x - a * clean) / s
            if float(x.mean()) > 0.7 > float(x.std()):
                x = 0.98 * x
        return x

    run = parallel(loop, px.Secant(window=8), tolerance=1e-4, denoisers=[net])
    modes = []
    for value in (-1, 1, 1):
        arguments = torch.randn(1, DIM, generator=torch.Generator().manual_seed(3)), torch.full((1, 1), float(value))
        assert relative(run(*arguments), loop(*arguments)) <= 1e-4
        assert run.report.converged
        assert run.report.rounds <= 18
        modes.append(run.report.mode)
    assert modes == ["recurrence", "replay", "replay"]


def test_replay_of_overlapping_tiles_shows_that_it_has_converged():
    """Windows that end within a step estimate too much; evaluating all steps once more shows what the error is."""
    net = Noise(32)

    def loop(x):
        for t, a, s, b, r in steps(20):
            total, count = torch.zeros_like(x), torch.zeros_like(x)
            for first in range(0, 7, 2):
                tile = x[..., first : first + 4]
                total[..., first : first + 4] += net(tile.flatten(1), t).view_as(tile)
                count[..., first : first + 4] += 1
            f = total / count
            x = b * (x - s * f) / a + r * f
        return x

    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    x = torch.randn(1, 2, 4, 10, generator=torch.Generator().manual_seed(100))
    assert relative(run(x), loop(x)) <= run.report.error_estimate <= 1e-2
    assert run.report.converged
    assert run.report.rounds <= 30 < run.report.steps == 80


class Data(Noise):
    """The data prediction at a noise level, as variance-exploding loops ask for it."""

    def forward(self, x, sigma):
        return self.data(x, torch.ones(1, 1), torch.as_tensor(sigma).reshape(-1, 1))


def heun_with_churn(net, x):
    """EDM's sampler: large states shrink on the way, so what is added carries the rounding of large ones."""
    sigmas = [40.0 * 0.6**i for i in range(16)]
    x = x * sigmas[0]
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        higher = 1.2 * sigma
        x = x + (higher**2 - sigma**2) ** 0.5 * torch.randn_like(x)
        slope = (x - net(x, higher)) / higher
        guess = x + (after - higher) * slope
        if after:
            slope = (slope + (guess - net(guess, after)) / after) / 2
        x = x + (after - higher) * slope
    return x


@pytest.mark.parametrize("solver", [px.Secant(window=8), px.Secant(), px.Picard()])
def test_replay_that_is_off_by_rounding_is_evaluated_once_more(solver):
    """A solver would take its rounds anew, until there are as many as steps; Picard's slopes would not get nearer."""
    net = Data(DIM, std=0.5)
    run = parallel(heun_with_churn, solver, tolerance=0, denoisers=[net])
    for seed in range(2):
        noise = torch.randn(2, DIM, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        expected = heun_with_churn(net, noise)
        torch.manual_seed(seed)
        assert relative(run(net, noise), expected) <= 5e-6
        assert run.report.mode == "recurrence"
        assert run.report.converged
        assert run.report.rounds < run.report.steps
