"""Networks made to hurt: a run is right, or it says that it cannot tell.

Ideal denoisers of data sets jump from one point to another, sign and saturated networks do not move at all and then
far, clipped loops with networks that do not denoise still grow when their windows end.
"""

from __future__ import annotations

import functools

import pytest
import torch

import parataxis as px
import problems
from parataxis.denoisers import empirical, mixture

SOLVERS = [
    px.Secant(window=8),
    px.Secant(window=16),
    px.Secant(),
    px.Picard(window=8),
    px.Picard(),
    px.Anderson(window=16),
    px.Anderson(),
]


@functools.cache
def ideal():
    """The ideal denoiser of a hundred points."""
    points = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    return empirical(points, 0.0).network(px.vp())


LOOPS = {
    "ideal, ddpm": (lambda: ideal(), lambda: px.samplers.ddpm(px.vp(), 60), 64, 1e-2),
    "ideal, ddim": (lambda: ideal(), lambda: px.samplers.ddim(px.vp(), 60), 64, 1e-2),
    "ideal, ddpm, strict": (lambda: ideal(), lambda: px.samplers.ddpm(px.vp(), 60), 64, 1e-6),
    "sign": (lambda: lambda x, t: torch.sign(x + 0.05), lambda: px.samplers.ddim(steps=40, prediction="v"), 16, 0.0),
    "one element": (lambda: lambda x, t: torch.sin(3 * x), lambda: px.samplers.ddpm(steps=40), 1, 0.0),
    "linear, clipped": (lambda: lambda x, t: 0.9 * x, lambda: px.samplers.ddim(steps=100, clip=1.0), 64, 1e-2),
    "tanh, clipped": (
        lambda: lambda x, t: 1.1 * torch.tanh(x),
        lambda: px.samplers.ddim(steps=100, clip=1.0),
        64,
        1e-2,
    ),
    "zero, clipped": (lambda: lambda x, t: torch.zeros_like(x), lambda: px.samplers.ddim(steps=41, clip=1.0), 96, 1e-2),
    "no signal at the start": (lambda: lambda x, t: 0.5 * x, lambda: px.samplers.flow_euler(steps=1), 16, 1e-2),
}


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", LOOPS)
def test_run_is_right_or_says_that_it_cannot_tell(name, solver):
    """No run is silently wrong."""
    network, sampler, dim, tolerance = LOOPS[name]
    network, sampler, count = network(), sampler(), 4
    dtype = torch.float64 if tolerance == 0 else torch.float32
    noise = problems.noise(count, dtype, seed=1, shape=(dim,))
    found, loop = (
        px.sample(network, noise, sampler, way, tolerance=tolerance, generator=problems.generators(count))
        for way in (solver, px.Sequential())
    )
    errors = (found.x - loop.x).norm(dim=1) / loop.x.norm(dim=1)
    for error, run in zip(errors.tolist(), found, strict=True):
        assert error <= max(3 * tolerance, 1e-6) or not run.converged, run
    if tolerance == 0 or "clipped" in name:  # it takes more rounds, but it comes to an end that is right
        assert found.converged


# Samples that come close to the border between two points late in the loop: where the first rounds see no slope at all.
NEAR_TIES = [(0.0, "ddpm", 10), (0.0, "ddpm", 1023), (0.01, "ddpm", 1194), (0.0, "ddim", 1162), (0.01, "flow", 5)]


@pytest.mark.parametrize(("blur", "name", "seed"), NEAR_TIES)
def test_a_jump_that_only_a_large_move_showed_is_not_forgotten(blur, name, seed):
    """Eight clusters of five close points: small moves on one side of a border measure a slope of 0."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, 64, generator=generator)
    points = centres[torch.arange(40) % 8] + 0.3 * torch.randn(40, 64, generator=generator)
    if name == "flow":
        network, sampler = empirical(points, blur).network(px.flow(), "flow"), px.SAMPLERS["flow_euler"](steps=50)
    else:
        network, sampler = empirical(points, blur).network(px.vp()), px.SAMPLERS[name](steps=100)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(seed))[None]
    loop, found = (
        px.sample(network, noise, sampler, solver, generator=[torch.Generator().manual_seed(10_000 + seed)])
        for solver in (px.Sequential(), px.Secant())
    )
    error = float((found.x - loop.x).norm() / loop.x.norm())
    assert found[0].error_estimate > 1e-2 or error <= 1e-2


@pytest.mark.parametrize("window", [20, 32, None])
def test_growth_at_a_tie_is_not_forgotten(window):
    """The trajectory leaves the tie on one side, but has multiplied by then what was accepted."""
    network, sampler = mixture(64).network(px.vp()), px.samplers.ddim(px.vp(), 100)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(124))[None]
    loop, found = (px.sample(network, noise, sampler, way) for way in (px.Sequential(), px.Secant(window=window)))
    error = float((found.x - loop.x).norm() / loop.x.norm())
    assert not found.converged or error <= 1e-2
