"""Which arguments of a network are states, and what answers them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parataxis as px
from loop_problems import relative, steps
from parataxis.parallel import parallel


class Conditioned(nn.Module):
    """A convolution of a state beside other channels, (n, 6, 4, 4) to (n, 3, 4, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x, t):
        time = torch.sin(torch.as_tensor(t).float() / 100).reshape(-1, 1, 1, 1)
        return torch.tanh(self.outer(torch.tanh(self.inner(x) + time)))


def conditioned_on_its_last_prediction(net, x):
    """Self-conditioning: the prediction of the step before lies behind the state, along its channels."""
    clean = torch.zeros_like(x)
    for t, a, s, b, r in steps(20):
        clean = net(torch.cat([x, clean], 1), t)
        x = b * clean + r * (x - a * clean) / s
    return x


def frame_by_frame(net, frame):
    """A video whose frames are drawn one by one, each conditioned on the one before."""
    frames = [frame]
    for seed in range(3):
        x = torch.randn(frame.shape, generator=torch.Generator().manual_seed(seed))
        for t, a, s, b, r in steps(10):
            clean = net(torch.cat([x, frames[-1]], 1), t)
            x = b * clean + r * (x - a * clean) / s
        frames.append(x)
    return torch.stack(frames, 1)


@pytest.mark.parametrize("loop", [conditioned_on_its_last_prediction, frame_by_frame])
def test_channels_behind_the_state_that_depend_on_outputs_are_states_too(loop):
    net, noise = Conditioned(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    run = parallel(loop, px.Secant(window=8), tolerance=1e-3, denoisers=[net])
    assert relative(run(net, noise), loop(net, noise)) <= 1e-3
    assert run.report.mode == "replay"
    assert run.report.rounds < run.report.steps


def test_output_may_have_one_more_dimension_than_the_state():
    """A vocoder takes sound, (n, length), and returns channels of it, (n, 1, length)."""

    class Vocoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv1d(1, 1, 5, padding=2).requires_grad_(False)

        def forward(self, sound, t):
            return torch.tanh(self.layer(sound[:, None])) + 0.5 * sound[:, None]

    def loop(net, x):
        for t, a, s, b, r in steps(20):
            f = net(x, t).squeeze(1)
            x = b * (x - s * f) / a + r * f
        return x

    net, noise = Vocoder(), torch.randn(2, 48, generator=torch.Generator().manual_seed(9))
    run = parallel(loop, px.Secant(window=8), denoisers=[net])
    assert relative(run(net, noise), loop(net, noise)) <= 1e-2
    assert run.report.mode == "recurrence"
    assert run.report.rounds < run.report.steps / 2
