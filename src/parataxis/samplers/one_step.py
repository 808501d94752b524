"""DDIM, DDPM and Euler steps of a flow."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..checks import is_finite
from .grids import NetworkGrid, check_clip, checked_schedule, network_grid, one_step_coefficients
from .sampler import Prediction, Sampler
from .schedules import Grid, Schedule, Spacing, flow, vp

__all__ = ["ddim", "ddpm", "flow_euler"]


Array = NDArray[np.float64]


Final = Literal["zero", "first"]


def _posterior(levels: NetworkGrid) -> Array:
    """Return (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2), the posterior's standard deviation; 0 into sigma' = 0."""
    ratio = np.maximum(1 - (levels.alpha[:-1] / levels.alpha[1:]) ** 2, 0.0)
    return levels.sigma[1:] / levels.sigma[:-1] * np.sqrt(ratio)


def _ending(grid: Grid, schedule: Schedule, final: str) -> Grid:
    """Replace the last noise level by the schedule's first training level."""
    if final == "zero":
        return grid
    if final != "first":
        raise ValueError(f"final must be 'zero' or 'first', got {final!r}.")
    alpha, sigma = schedule.alpha_sigma(np.zeros(1))
    return Grid(grid.times, np.append(grid.alpha[:-1], alpha), np.append(grid.sigma[:-1], sigma))


def _sampled(
    name: str,
    levels: NetworkGrid,
    noise: Array,
    added: Array | None,
    clip: float | None,
    quantile: float | None,
    clipped_eps: bool,
) -> Sampler:
    """Build a one-step sampler, with an output transform if it clips."""
    check_clip(clip, quantile)
    decay, weight, drawn = one_step_coefficients(levels, noise, added)
    if clip is None and quantile is None:
        return Sampler(name, levels.grid.times, levels.coefficients(decay, weight, drawn))
    alpha, sigma, after = levels.alpha[:-1], levels.sigma[:-1], levels.alpha[1:]
    direction = np.sqrt(np.maximum(levels.sigma[1:] ** 2 - noise**2, 0.0))
    data_weight = after - direction * alpha / sigma
    # The clipped prediction enters with alpha', the unclipped one through eps: one output carries both.
    gain = np.ones(len(alpha)) if clipped_eps else after / data_weight
    transform = levels.to_data(clip, quantile, gain)
    local = transform.coefficients(levels.coefficients(direction / sigma, data_weight, drawn, data=True))
    return Sampler(name, levels.grid.times, local, transform=transform)


def ddim(
    schedule: Schedule | None = None,
    steps: int = 50,
    *,
    eta: float = 0.0,
    prediction: Prediction = "eps",
    spacing: Spacing = "trailing",
    offset: int = 0,
    final: Final = "zero",
    clip: float | None = None,
    quantile: float | None = None,
    clipped_eps: bool = False,
) -> Sampler:
    """DDIM (2010.02502, eq. 12): s = eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2).

    Args:
        schedule: A variance-preserving schedule; default :func:`parataxis.vp`.
        steps: N.
        eta: 0 deterministic, 1 as much noise as DDPM.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        offset: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        final: The level after the last step: ``zero`` noise, or the ``first`` training level (diffusers:
            ``set_alpha_to_one=False``).
        clip: Clip the data prediction to [-clip, clip].
        quantile: Threshold it dynamically instead, at this quantile of |xhat| (0.995 is common).
        clipped_eps: Compute the noise prediction from the clipped data prediction (diffusers:
            ``use_clipped_model_output``).

    Raises:
        ValueError: For options out of range.
    """
    if not (is_finite(eta) and 0 <= eta <= 1):
        raise ValueError(f"eta must be in [0, 1], got {eta!r}.")
    schedule = checked_schedule(schedule, vp)
    grid = _ending(schedule.grid(steps, spacing, offset), schedule, final)
    levels = network_grid(grid, prediction)
    return _sampled("ddim", levels, eta * _posterior(levels), None, clip, quantile, clipped_eps)


def ddpm(
    schedule: Schedule | None = None,
    steps: int = 100,
    *,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    prediction: Prediction = "eps",
    spacing: Spacing = "trailing",
    offset: int = 0,
    clip: float | None = None,
    quantile: float | None = None,
) -> Sampler:
    """DDPM ancestral sampling (2006.11239, eq. 7); the last step adds no noise.

    Args:
        schedule: A variance-preserving schedule; default :func:`parataxis.vp`.
        steps: N.
        variance: s^2 is the posterior's (``fixed_small``) or 1 - alpha^2/alpha'^2 (``fixed_large``). A learned variance
            is a function of the output, so it is not linear and not supported.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        offset: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        clip: Clip the data prediction to [-clip, clip].
        quantile: Threshold it dynamically instead, at this quantile of |xhat| (0.995 is common).

    Raises:
        ValueError: For options out of range, or a learned variance.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(
            f"variance must be 'fixed_small' or 'fixed_large', got {variance!r}: a learned variance scales the noise "
            "by a function of the output, which is not linear; run such a loop without this library."
        )
    schedule = checked_schedule(schedule, vp)
    levels = network_grid(schedule.grid(steps, spacing, offset), prediction)
    small = _posterior(levels)
    added = None
    if variance == "fixed_large":
        added = np.sqrt(np.maximum(1 - (levels.alpha[:-1] / levels.alpha[1:]) ** 2, 0.0))
        added[-1] = 0.0
    return _sampled("ddpm", levels, small, added, clip, quantile, clipped_eps=True)


def flow_euler(
    schedule: Schedule | None = None,
    steps: int = 50,
    *,
    prediction: Prediction = "flow",
    spacing: Spacing = "trailing",
) -> Sampler:
    """Euler steps along the velocity of a flow: x' = x + (sigma' - sigma) f (2210.02747).

    Args:
        schedule: Default :func:`parataxis.flow`.
        steps: N.
        prediction: What the network returns.
        spacing: ``trailing`` (1, 1 - 1/N, ..) or ``linspace``; see :meth:`parataxis.samplers.schedules.Flow.grid`.
    """
    levels = network_grid(checked_schedule(schedule, flow).grid(steps, spacing), prediction)
    return Sampler(
        "flow_euler", levels.grid.times, levels.coefficients(*one_step_coefficients(levels, np.zeros(steps)))
    )
