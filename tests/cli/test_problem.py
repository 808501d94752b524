"""What the flags of a command name."""

from __future__ import annotations

import torch

from parataxis.cli.problem import Problem, Wanted


def test_each_sample_has_a_seed_of_its_own():
    """Sample i of seed s is the first one of seed s + i, whatever is drawn beside it; added noise is another noise."""
    wanted = Wanted(sampler="ddpm", steps=4, count=3, seed=7)
    three, third = Problem.load(wanted, {}), Problem.load(Wanted(sampler="ddpm", steps=4, seed=9), {})
    assert torch.equal(three.noise[2:], third.noise)
    assert len({float(noise.sum()) for noise in three.noise}) == 3
    added = [torch.randn(three.model.shape, generator=generator) for generator in three.generators()]
    assert torch.equal(added[2], torch.randn(three.model.shape, generator=third.generators()[0]))
    assert not torch.equal(added[0], added[1])
    for noise in added:
        assert not any(torch.equal(noise, first) for first in three.noise)
