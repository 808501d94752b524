"""Networks that compute in few bits: moves do not fall below their rounding, and the estimate says what that costs."""

from __future__ import annotations

import functools

import pytest
import torch

import parataxis as px
import problems


def rounded(network, dtype):
    """Return the network with its input and its output rounded to a 16-bit type, as after .float()."""
    return lambda x, t: network(x.to(dtype).float(), t).to(dtype).float()


@functools.cache
def solved(name, dtype, window):
    network = problems.network("power law", name)
    network = network if dtype is None else rounded(network, dtype)
    noise = problems.noise(4, torch.float32)
    results = [
        px.sample(network, noise, problems.sampler(name, 60), solver, generator=problems.generators(4))
        for solver in (px.Secant(window=window), px.Sequential())
    ]
    errors = (results[0].x - results[1].x).norm(dim=1) / results[1].x.norm(dim=1)
    return results[0], errors.tolist()


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_euler"])
def test_rounding_costs_few_rounds_and_is_reported(name, dtype, window):
    """About as many rounds as in float32, an error below the estimate, and no claim above the tolerance."""
    exact, _ = solved(name, None, window)
    found, errors = solved(name, dtype, window)
    assert found.rounds <= 1.6 * exact.rounds + 2
    for error, run in zip(errors, found, strict=True):
        assert error <= run.error_estimate
        assert run.converged == (run.error_estimate <= 1e-2)


def test_rounding_is_part_of_the_estimate():
    """Asked for less than its rounding, a network says so."""
    network = rounded(problems.network("power law", "ddim"), torch.bfloat16)
    found = px.sample(network, problems.noise(4, torch.float32), problems.sampler("ddim", 60), tolerance=1e-4)
    assert not any(run.converged for run in found)
