"""A solver of your own in ten lines: it says how outputs move with their inputs, the rest is there.

A windowed solver assumes a slope for each output of its window. This one takes the slope that the exact network would
have for Gaussian data, and beyond that only listens: where a step has been evaluated twice, it takes the mean with the
secant of :class:`parataxis.Secant`. What is done with the slopes, which states are accepted and which enter the window
is the same for all windowed solvers, so a new one is exact after at most N rounds, whatever it assumes.
"""

from dataclasses import dataclass

import torch

import parataxis as px
from parataxis.arrays import Array
from parataxis.denoisers import mixture
from parataxis.solvers import Measured, Window, Windowed


@dataclass(frozen=True)
class HalfSecant(Windowed):
    """The mean of the slope for Gaussian data and of the secant."""

    window: int | None = 8

    def slopes(self, window: Window, measured: Measured) -> Array:
        """Return d (S, W) of S samples and the W steps of their windows."""
        secant = px.Secant(self.window).slopes(window, measured)
        return (secant + window.gaussian_slopes()) / 2


if __name__ == "__main__":
    network = mixture(dim=64).network(px.vp())
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    sampler = px.samplers.ddim(px.vp(), steps=100)
    loop = px.sample(network, noise, sampler, px.Sequential())
    for solver in (HalfSecant(), px.Secant(window=8), px.Picard(window=8)):
        result = px.sample(network, noise, sampler, solver)
        error = ((result.x - loop.x).norm(dim=1) / loop.x.norm(dim=1)).max()
        print(f"{solver}: {result.rounds} rounds for {sampler.steps} steps, error {error:.0e}")
