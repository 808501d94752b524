"""Second-order samplers: Heun and DPM-Solver++ 2M; both use one earlier output."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .grids import check_clip, checked_schedule, network_grid, variance_exploding
from .sampler import Prediction, Sampler
from .schedules import Grid, Schedule, Spacing, Variance, karras_sigmas, vp

__all__ = ["dpmpp_2m", "heun"]


Array = NDArray[np.float64]


def heun(
    schedule: Schedule | None = None,
    steps: int = 25,
    *,
    prediction: Prediction = "eps",
    spacing: Spacing = "linspace",
    offset: int = 0,
    karras: bool = False,
) -> Sampler:
    """Heun's second-order steps (EDM, 2206.00364, algorithm 1 without churn): N = 2 steps - 1 evaluations.

    With h = sigma' - sigma and alpha = 1, state k is x and state k + 1 the trial x + h eps_k; then
    x' = x + h/2 (eps_k + eps_{k+1}). The last interval, into sigma' = 0, is a plain Euler step.

    Args:
        schedule: Default :func:`parataxis.vp`.
        steps: Number of intervals.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        offset: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        karras: Space the noise levels evenly in sigma^(1/7).
    """
    single, first = variance_exploding(
        checked_schedule(schedule, vp), steps, spacing, offset, prediction, karras=karras
    )
    twice = np.repeat(np.arange(steps), 2)[1:]  # 0, 1, 1, 2, 2, ..: the noise level of every step
    sigma = np.append(single.sigma[twice], 0.0)
    grid = Grid(single.grid.times[twice], np.ones(len(sigma)), sigma)
    levels = network_grid(grid, prediction, np.append(single.scale[twice], 1.0))
    # eps = (x - xhat) / sigma = P x + Q f
    level = sigma[:-1]
    eps_input, eps_output = (1 - levels.x0_from_input) / level, -levels.x0_from_output / level
    count = len(level)
    decay, weight = np.ones(count), np.zeros((count, 2))
    for k in range(0, count - 1, 2):
        h = sigma[k + 1] - sigma[k]
        decay[k] = 1 + h * eps_input[k]
        weight[k, 0] = h * eps_output[k]
        # The trial state is xe = (1 + h P_k) x + h Q_k f_k, hence x = (xe - h Q_k f_k) / (1 + h P_k).
        half = 1 + h / 2 * eps_input[k]
        decay[k + 1] = half / decay[k] + h / 2 * eps_input[k + 1]
        weight[k + 1, 0] = h / 2 * eps_output[k + 1]
        weight[k + 1, 1] = h / 2 * eps_output[k] - half / decay[k] * h * eps_output[k]
    h = -sigma[count - 1]
    decay[-1], weight[-1, 0] = 1 + h * eps_input[-1], h * eps_output[-1]
    return Sampler("heun", grid.times, levels.coefficients(decay, weight, np.zeros(count)), first)


def dpmpp_2m(
    schedule: Schedule | None = None,
    steps: int = 25,
    *,
    prediction: Prediction = "eps",
    spacing: Spacing = "linspace",
    offset: int = 0,
    karras: bool = False,
    clip: float | None = None,
    quantile: float | None = None,
) -> Sampler:
    """DPM-Solver++ 2M (2211.01095, algorithm 2), on data predictions.

    With h = lambda' - lambda, lambda = log(alpha/sigma), and rho = h_before / h,

        x' = (sigma'/sigma) x - alpha' (e^{-h} - 1) [(1 + 1/(2 rho)) xhat_i - 1/(2 rho) xhat_{i-1}]

    first order on the first step and into sigma' = 0.

    Args:
        schedule: Default :func:`parataxis.vp`.
        steps: N.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        offset: See :meth:`parataxis.samplers.schedules.Variance.grid`.
        karras: Space the noise levels evenly in (sigma/alpha)^(1/7) over all training levels; ``spacing`` is unused.
        clip: Clip the data prediction to [-clip, clip].
        quantile: Threshold it dynamically instead, at this quantile of |xhat| (0.995 is common).
    """
    check_clip(clip, quantile)
    schedule = checked_schedule(schedule, vp)
    grid = schedule.grid(steps, spacing, offset)
    if karras:
        if not isinstance(schedule, Variance):
            raise ValueError("karras=True needs a schedule with training steps (vp, cosine).")
        ratio = karras_sigmas(schedule.ratios[-1], schedule.ratios[0], steps)
        times = np.round(schedule.times_of(ratio))
        alpha = 1 / np.sqrt(1 + ratio**2)
        grid = Grid(times, np.append(alpha, 1.0), np.append(ratio * alpha, 0.0))
    levels = network_grid(grid, prediction)
    alpha, sigma = grid.alpha, grid.sigma
    decay = sigma[1:] / sigma[:-1]
    weight = np.zeros((steps, 2))
    # alpha' (1 - e^{-h}) with e^{-h} = (alpha sigma') / (alpha' sigma)
    total = alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]
    weight[:, 0] = total
    with np.errstate(divide="ignore"):
        log_ratio = np.log(alpha) - np.log(sigma)
    for i in range(1, steps - 1 if sigma[-1] == 0 else steps):
        half = (log_ratio[i + 1] - log_ratio[i]) / (log_ratio[i] - log_ratio[i - 1]) / 2
        weight[i] = total[i] * (1 + half), -total[i] * half
    if not np.isfinite(weight).all():
        raise ValueError(
            "dpmpp_2m divides by log(alpha) = -inf at a first noise level with alpha = 0: choose another spacing."
        )
    local = levels.coefficients(decay, weight, np.zeros(steps), data=True)
    return Sampler("dpmpp_2m", grid.times, local, transform=levels.to_data(clip, quantile))
