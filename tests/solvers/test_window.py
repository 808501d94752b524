"""What a window accepts, and what it shows of a sample that it has not reached."""

from __future__ import annotations

import pytest
import torch

import parataxis as px
import problems


def denoise_to(point):
    """Return the exact network of data that is one point: its data prediction is that point, everywhere."""

    def network(x, t):
        alpha, sigma = (torch.from_numpy(values)[:, None] for values in px.vp().alpha_sigma(t.numpy()))
        return (x - alpha * point) / sigma

    return network


def test_estimate_is_the_data_prediction_at_the_farthest_step():
    """While the window has not reached the sample."""
    point, estimates = torch.linspace(-1, 1, problems.DIM, dtype=torch.float64), []
    px.sample(
        denoise_to(point),
        problems.noise(2),
        px.samplers.ddim(steps=20),
        px.Picard(window=4),
        on_round=lambda runs: estimates.append([run.estimate for run in runs]),
    )
    for estimate in estimates[0]:  # of a narrow window that has not gone far
        assert estimate == pytest.approx(point, abs=1e-6)


@pytest.mark.parametrize("inner", [px.Secant(), px.Picard(rule="paradigms", threshold=1e3)], ids=["secant", "picard"])
def test_rounds_on_some_steps_accept_one_state(inner):
    """Outputs between them are interpolated, however well that seems to fit; only the first state is exact."""
    solver = px.CoarseToFine(inner, strides=(4, 4, 2))
    sampler = px.samplers.ddim(steps=24)
    rounds = px.sample(lambda x, t: 0.1 * x, problems.noise(1), sampler, solver, tolerance=0.1)[0].history
    assert [entry.accepted for entry in rounds[:5]] == [0, 1, 2, 3, 4]
    assert [entry.width for entry in rounds[:4]] == [7, 7, 12, 21]


@pytest.mark.parametrize("count", [1, 3])
def test_network_may_write_into_its_input(count):
    """The states are not what it is called with."""

    def network(x, t):
        outputs = 0.3 * torch.tanh(x)
        x.zero_()
        return outputs

    noise, sampler = problems.noise(count), px.samplers.ddim(steps=20)
    for solver in (px.Secant(window=4), px.Secant(), px.Sequential()):
        result = px.sample(network, noise, sampler, solver, tolerance=1e-6)
        expected = px.sample(lambda x, t: 0.3 * torch.tanh(x), noise, sampler, solver, tolerance=1e-6)
        assert torch.equal(result.x, expected.x)
