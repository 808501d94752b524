"""Noise that is drawn again when a solver comes to it has the bits of noise that is held."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import parataxis as px
from parataxis import samplers

STEPS, COUNT = 60, 3
SOLVERS = {
    "sequential": px.Sequential(),
    "secant": px.Secant(window=7),
    "picard": px.Picard(window=4),
    "anderson": px.Anderson(window=5, history=3),
    "one": px.Secant(window=1),
    "coarse": px.CoarseToFine(px.Secant(window=8), strides=(4, 2)),
    "whole": px.Secant(),
    "parareal": px.Parareal(blocks=4),
    "speculative": px.Speculative(window=6),
}
SAMPLERS = {
    "ddpm": samplers.ddpm(steps=STEPS),
    "some steps": px.Sampler(
        "some steps",
        np.arange(STEPS) + 0.5,
        px.Coefficients(
            np.full(STEPS, 0.9), np.stack([np.full(STEPS, 0.2), np.full(STEPS, -0.1)], 1), np.arange(STEPS) % 3 / 4
        ),
    ),
}


def network(x, step):
    return 0.3 * torch.tanh(x * (1 + step[:, None] / STEPS)) + 0.1 * torch.sin(2 * x)


def generator_of(kind):
    if kind == "torch":
        torch.manual_seed(11)
        return None
    if kind == "batch":
        return torch.Generator().manual_seed(11)
    return [torch.Generator().manual_seed(11 + b) for b in range(COUNT)]


def solve(sampler, solver, kind, block, **options):
    noise = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(0))
    generator = generator_of(kind)
    recurrence = sampler.recurrence(noise, generator, block=block)
    assert (recurrence.redrawn is None) == (block is None)
    left = torch.get_rng_state() if kind == "torch" else [g.get_state() for g in np.atleast_1d(np.array(generator))]
    seeds = [torch.Generator().manual_seed(90 + b) for b in range(COUNT)]
    runs = px.start(sampler, recurrence, solver, generator=seeds, **options)
    estimates = [runs[1].estimate.clone() for _ in px.drive(runs, lambda rows: network(rows.x, rows.step))]
    return left, [run.solution for run in runs], estimates


@pytest.mark.parametrize("kind", ["torch", "batch", "sample"])
@pytest.mark.parametrize("name", SOLVERS)
def test_redrawn_noise_gives_the_same_bits(name, kind):
    """Whatever the solver, the generators, and where blocks end; the generators are left as they were."""
    sampler = SAMPLERS["ddpm" if name in ("parareal", "speculative") or kind == "batch" else "some steps"]
    left, expected, estimates = solve(sampler, SOLVERS[name], kind, None)
    left_again, solutions, estimates_again = solve(sampler, SOLVERS[name], kind, 7)
    assert all(torch.equal(a, b) for a, b in zip(left, left_again, strict=True))
    assert all(torch.equal(a.x, b.x) for a, b in zip(solutions, expected, strict=True))
    assert [solution.history for solution in solutions] == [solution.history for solution in expected]
    assert all(torch.equal(a, b) for a, b in zip(estimates_again, estimates, strict=True))


def test_recurrence_of_redrawn_noise_is_that_of_held_noise():
    sampler, noise = SAMPLERS["ddpm"], torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(0))
    held, redrawn = (sampler.recurrence(noise, generator_of("batch"), block=block) for block in (None, 8))
    assert torch.equal(redrawn.stored().noise, held.noise)
    assert torch.equal(redrawn.base(), held.base())
    states = torch.randn(COUNT, STEPS + 1, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(redrawn.step(states, states[:, 1:]), held.step(states, states[:, 1:]))
    assert torch.equal(redrawn.coarse_step(3, 40, noise, noise), held.coarse_step(3, 40, noise, noise))
    assert "size=8" in repr(redrawn.redrawn)


def test_long_chain_holds_some_of_its_noise_only():
    """Of 1,000 steps whose noise would take 160 MB only some blocks are held."""
    steps, width = 1000, 40000
    local = px.Coefficients(np.full(steps, 0.9), np.full((steps, 1), 0.1), np.full(steps, 0.1))
    sampler = px.Sampler("chain", np.arange(steps) + 0.5, local)
    rounds, held = [], []

    def storages():
        tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
        tensors = [value for value in tensors if value.layout == torch.strided and value.device.type == "cpu"]
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}

    def on_round(runs):
        rounds.append(runs[0].accepted)
        if len(rounds) == 5:
            held.append(sum(size for place, size in storages().items() if place not in before) / (4 * width))

    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    before = storages()  # of other tests
    px.sample(
        lambda x, t: 0.1 * x,
        noise,
        sampler,
        px.Secant(window=8),
        generator=torch.Generator().manual_seed(4),
        on_round=on_round,
        stop=lambda run: run.accepted > 100,
    )
    assert held[0] < 500  # states of the window among them
