"""Euler steps in coordinates alpha = 1, plain and ancestral."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..checks import is_finite
from .grids import checked_schedule, one_step_coefficients, variance_exploding
from .sampler import Prediction, Sampler
from .schedules import Schedule, Spacing, vp

__all__ = ["euler", "euler_ancestral"]


Array = NDArray[np.float64]


def euler(
    schedule: Schedule | None = None,
    steps: int = 50,
    *,
    prediction: Prediction = "eps",
    spacing: Spacing = "linspace",
    offset: int = 0,
    karras: bool = False,
) -> Sampler:
    """Euler steps on the probability flow in coordinates alpha = 1 (EDM, 2206.00364, algorithm 1 without churn).

    The network is given x / sqrt(sigma^2 + 1) (EDM networks: c_in x); the first state is noise at the first sigma.

    Args:
        schedule: Default :func:`parataxis.vp`; :func:`parataxis.karras` for EDM networks.
        steps: N.
        prediction: What the network returns; ``edm`` for its own preconditioning with sigma_data = 0.5.
        spacing: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        offset: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        karras: Space the noise levels evenly in sigma^(1/7) between the ends of the grid.
    """
    levels, first = variance_exploding(
        checked_schedule(schedule, vp), steps, spacing, offset, prediction, karras=karras
    )
    local = levels.coefficients(*one_step_coefficients(levels, np.zeros(steps)))
    return Sampler("euler", levels.grid.times, local, first)


def euler_ancestral(
    schedule: Schedule | None = None,
    steps: int = 50,
    *,
    eta: float = 1.0,
    prediction: Prediction = "eps",
    spacing: Spacing = "linspace",
    offset: int = 0,
    karras: bool = False,
) -> Sampler:
    """Euler steps with fresh noise: s = min(sigma', eta (sigma'/sigma) sqrt(sigma^2 - sigma'^2)) in alpha = 1.

    Args:
        schedule: Default :func:`parataxis.vp`.
        steps: N.
        eta: How much noise; 0 is :func:`euler`.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        offset: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        karras: Space the noise levels evenly in sigma^(1/7).
    """
    if not (is_finite(eta) and eta >= 0):
        raise ValueError(f"eta must be at least 0, got {eta!r}.")
    levels, first = variance_exploding(
        checked_schedule(schedule, vp), steps, spacing, offset, prediction, karras=karras
    )
    sigma, after = levels.sigma[:-1], levels.sigma[1:]
    added = np.minimum(after, eta * after / sigma * np.sqrt(np.maximum(sigma**2 - after**2, 0.0)))
    local = levels.coefficients(*one_step_coefficients(levels, added))
    return Sampler("euler_ancestral", levels.grid.times, local, first)
