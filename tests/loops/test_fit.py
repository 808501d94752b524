"""What the fit makes of recordings: nothing, where they are not finite."""

import warnings
from itertools import pairwise

import pytest
import torch

import parataxis as px


class Net(torch.nn.Module):
    """A small network whose outputs keep the loops of these tests finite."""

    def forward(self, x, t):
        return torch.tanh(x + t[:, None] / 40)


def loop_of(net, step, steps=12):
    def loop(x):
        for i in range(steps):
            x = step(x, net(x, torch.full((len(x),), float(i))))
        return x

    return loop


@pytest.mark.parametrize(
    "step",
    [
        lambda x, f: f**2,
        lambda x, f: torch.exp(f),
        lambda x, f: 0.9 * x + 1e-9 * torch.exp(40 * f),
    ],
    ids=["square", "exp", "overflow"],
)
def test_recording_that_overflows_runs_sequentially(step, capfd):
    """Trial outputs overflow where the network's own do not: the loop runs sequentially, and that is said once."""
    net, x = Net().eval(), torch.linspace(-1, 1, 8).view(2, 4)
    loop = loop_of(net, step)
    expected, fast = loop(x), px.parallel(loop, px.Secant(window=8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(fast(x), expected)
    assert len(caught) == 1
    assert "not finite" in str(caught[0].message)
    assert fast.report.mode == "sequential"
    assert capfd.readouterr() == ("", "")  # nor does LAPACK complain


def test_result_that_is_not_finite_for_trial_outputs():
    """A logarithm behind the last step is no state: the loop is solved without it."""
    net, x = Net().eval(), torch.linspace(5, 6, 8).view(2, 4)
    steps = loop_of(net, lambda x, f: x - 0.1 * f)
    loop = lambda x: torch.log(steps(x))  # noqa: E731
    fast = px.parallel(loop, px.Secant(window=8))
    torch.testing.assert_close(fast(x), loop(x), rtol=1e-3, atol=1e-3)
    assert fast.report.mode != "sequential"


class Score(torch.nn.Module):
    """The score of nearly Gaussian data behind noise of this size."""

    def forward(self, x, sigma):
        return (torch.sin(3 * x) / 10 - x) / (sigma[:, None] ** 2 + 0.05)


def test_states_that_shrink_on_the_way_keep_their_recurrence():
    """With outputs at random a variance-exploding loop keeps large states: their rounding is no difference."""
    sigmas, net = torch.logspace(1, -2, 50), Score()

    def loop():
        generator = torch.Generator().manual_seed(1)
        x = sigmas[0] * torch.randn(1, 2, generator=generator)
        for a, b in pairwise(sigmas):
            change = a**2 - b**2
            x = x + change * net(x, a.expand(1)) + change.sqrt() * torch.randn(1, 2, generator=generator)
        return x

    run = px.parallel(loop, "secant", denoisers=[net])
    assert (run() - loop()).norm() <= 1e-2 * loop().norm()
    assert "recurrence" in str(run.report)
    assert run.report.rounds < 40
