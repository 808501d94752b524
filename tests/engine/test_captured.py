"""Rounds for CUDA graphs: the same fixed operations give the same solve, here without graphs."""

from __future__ import annotations

import pytest
import torch

import parataxis as px
import problems
from parataxis.engine import captured


def conditional(x, t, condition):
    """A network that looks at a condition."""
    return torch.tanh(x * (0.5 + t.view(-1, 1) / 2000) + 0.1 * condition)


@pytest.fixture
def without_graphs(monkeypatch):
    """Run what would be captured as it is, on the CPU."""
    monkeypatch.setattr(captured, "FAKE", True)


@pytest.mark.usefixtures("without_graphs")
@pytest.mark.parametrize("solver", [px.Secant(window=6), px.Secant(), px.Picard(window=6)], ids=repr)
@pytest.mark.parametrize(("name", "options"), [("ddim", {}), ("ddpm", {"clip": 1.0}), ("dpmpp_2m", {})], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_captured_rounds_solve_as_others_do(count, name, options, solver):
    """Rounds, evaluations and samples are the same, of a second solve too."""
    sampler, condition = px.SAMPLERS[name](steps=30, **options), problems.noise(count, torch.float32, seed=50)
    network = px.cuda_graph(conditional)
    for seed in (0, 7):
        noise = problems.noise(count, torch.float32, seed=seed)
        one, two = (
            px.sample(net, noise, sampler, solver, condition=condition, generator=problems.generators(count))
            for net in (conditional, network)
        )
        assert [run.rounds for run in one] == [run.rounds for run in two]
        assert one.evaluations == two.evaluations
        assert torch.allclose(one.x, two.x, atol=1e-6)
    assert repr(network) == "GraphedNetwork(1 captured)"


@pytest.mark.usefixtures("without_graphs")
def test_outputs_that_are_not_finite_are_left_to_ordinary_rounds():
    """A guess may meet them where the loop does not."""

    calls = []

    def network(x, t):
        calls.append(len(x))
        return torch.where((t[:, None] < 500) & (len(calls) == 1), torch.nan, 0.3 * x)

    sampler, noise = px.samplers.ddim(steps=20), problems.noise(2, torch.float32)
    graphed = px.sample(px.cuda_graph(network), noise, sampler, px.Secant(), tolerance=1e-6)
    loop = px.sample(lambda x, t: 0.3 * x, noise, sampler, px.Sequential())
    assert graphed.converged
    assert torch.allclose(graphed.x, loop.x, rtol=1e-5)


def test_elsewhere_than_on_cuda_the_network_is_called_as_it_is():
    """Nothing is captured on the CPU."""
    network = px.cuda_graph(lambda x, t: 0.3 * x)
    px.sample(network, problems.noise(1), px.samplers.ddim(steps=10), px.Secant())
    assert repr(network) == "GraphedNetwork(0 captured)"
