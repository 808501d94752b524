"""A loop that has no recurrence: one pass of its Python says which trajectory follows."""

from __future__ import annotations

import pytest
import torch

import parataxis as px
from loop_problems import Mixture, Noise, relative, steps
from parataxis.parallel import parallel


class Velocity(Mixture):
    def forward(self, x, t):
        t = torch.as_tensor(t).reshape(-1, 1)
        return (x - self.data(x, 1 - t, t)) / t


@pytest.mark.parametrize("solver", [px.Picard(window=8), px.Secant()])
def test_output_that_enters_a_later_state_than_the_next_is_no_free_one(solver):
    """Guidance by calls at two inputs: the first one's output has no effect on the second one's input."""
    net = Noise(192)

    def loop(x):
        for t, a, s, b, r in steps(20):
            without, with_ = net(x, t), net(x + 0.05, t)
            clean = (x - s * (without + 3 * (with_ - without))) / a
            limit = torch.quantile(clean.abs(), 0.95, dim=1, keepdim=True).clamp_min(1)
            clean = clean.clamp(-limit, limit) / limit
            x = b * clean + r * (x - a * clean) / s
        return x

    run = parallel(loop, solver, denoisers=[net])
    for seed in range(100, 103):
        x = torch.randn(2, 192, generator=torch.Generator().manual_seed(seed))
        error = relative(run(x), loop(x))
        assert run.report.mode == "replay"
        assert error <= max(1e-3, run.report.error_estimate)
        assert run.report.rounds < run.report.steps == 40


def test_error_grows_where_a_loop_goes_one_way_or_another():
    """CFG-Zero*: large moves on one side of the decision say nothing of what becomes of a small error at it."""
    net = Velocity(32)

    def loop(x):
        for i in range(20):
            without = net(x, 1 - i / 20)
            with_ = without + 0.2 * torch.tanh(x)
            if i == 0:
                continue
            scaled = (without * with_).sum(1, keepdim=True) / without.square().sum(1, keepdim=True) * without
            x = x - (scaled + 2 * (with_ - scaled)) / 20
        return x

    run = parallel(loop, px.Secant(), denoisers=[net])
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(102))
    assert relative(run(x), loop(x)) <= min(1e-2, run.report.error_estimate)
