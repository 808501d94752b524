r"""The noise levels that a sampler visits, with the coefficients that all one-step samplers share.

All one-step samplers are one formula. With x = alpha x_clean + sigma n, primes for the next level, the data
prediction xhat = p x + q f and the noise prediction eps = P x + Q f, P = (1 - alpha p)/sigma, Q = -alpha q/sigma,

    x' = alpha' xhat + sd eps + s z,   sd = sqrt(sigma'^2 - s^2)
    A = alpha' p + sd P,   B = alpha' q + sd Q,   C = s

and the samplers differ in s only: 0 for DDIM and Euler, the posterior's standard deviation for DDPM, something
between for DDIM with eta. Heun and DPM-Solver++ 2M use one earlier output as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checks import is_finite
from .coefficients import Coefficients
from .sampler import OutputTransform, data_prediction
from .schedules import Grid, Schedule, Spacing, Variance, karras_sigmas

__all__ = [
    "NetworkGrid",
    "check_clip",
    "checked_schedule",
    "network_grid",
    "one_step_coefficients",
    "variance_exploding",
]


Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NetworkGrid:
    """A grid with the conversion of its outputs, everything in the coordinates of x."""

    grid: Grid
    scale: Array
    x0_from_input: Array
    x0_from_output: Array

    @property
    def alpha(self) -> Array:
        """(N + 1,) signal."""
        return self.grid.alpha

    @property
    def sigma(self) -> Array:
        """(N + 1,) noise level."""
        return self.grid.sigma

    def coefficients(self, decay: Array, weight: Array, noise: Array, *, data: bool = False) -> Coefficients:
        """Convert coefficients for x to the network's input u = scale x; ``data``: outputs are data predictions."""
        p, q = self.x0_from_input / self.scale[:-1], self.x0_from_output
        if data:
            p, q = np.zeros_like(p), np.ones_like(q)
        after = self.scale[1:]
        return Coefficients(
            state_weight=decay * after / self.scale[:-1],
            output_weight=weight.reshape(len(decay), -1) * after[:, None],
            noise_std=noise * after,
            alpha=self.alpha,
            sigma=self.sigma,
            scale=self.scale,
            x0_from_input=p,
            x0_from_output=q,
        )

    def to_data(
        self, clip: float | None = None, quantile: float | None = None, gain: Array | None = None
    ) -> OutputTransform:
        """Return the transform from outputs to (clipped) data predictions."""
        gain = np.ones(len(self.x0_from_input)) if gain is None else gain
        return OutputTransform(self.x0_from_input / self.scale[:-1], self.x0_from_output, gain, clip, quantile)


def network_grid(grid: Grid, prediction: str, scale: Array | None = None) -> NetworkGrid:
    """Return the grid of a network of this prediction type, whose input is scale x."""
    scale = np.ones(len(grid.alpha)) if scale is None else scale
    return NetworkGrid(grid, scale, *data_prediction(prediction, grid.alpha[:-1], grid.sigma[:-1]))


def one_step_coefficients(levels: NetworkGrid, noise: Array, added: Array | None = None) -> tuple[Array, Array, Array]:
    """Return A, B, C of x' = alpha' xhat + sd eps + s z, with s = noise; ``added`` replaces C alone."""
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    alpha_next, sigma_next = levels.alpha[1:], levels.sigma[1:]
    direction = np.sqrt(np.maximum(sigma_next**2 - noise**2, 0.0))
    p, q = levels.x0_from_input, levels.x0_from_output
    decay = alpha_next * p + direction * (1 - alpha * p) / sigma
    weight = alpha_next * q - direction * alpha * q / sigma
    return decay, weight, noise if added is None else added


def checked_schedule(schedule: Schedule | None, default: Callable[[], Schedule]) -> Schedule:
    """Return the schedule, or the default one where there is none."""
    if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "grid")):
        raise TypeError(f"schedule must be a schedule, such as parataxis.vp(), got {schedule!r}.")
    return default() if schedule is None else schedule


def check_clip(clip: float | None, quantile: float | None) -> None:
    """Raise unless this is a clip or a quantile, or neither."""
    if clip is not None and quantile is not None:
        raise ValueError("pass clip or quantile, not both: thresholding replaces clipping.")
    if clip is not None and not (is_finite(clip) and clip > 0):
        raise ValueError(f"clip must be positive, got {clip!r}.")
    if quantile is not None and not (is_finite(quantile) and 0 < quantile <= 1):
        raise ValueError(f"quantile must be in (0, 1], got {quantile!r}.")


def variance_exploding(
    schedule: Schedule, steps: int, spacing: Spacing, offset: int, prediction: str, *, karras: bool
) -> tuple[NetworkGrid, float]:
    """Return the noise levels in coordinates alpha = 1 with the network's scale, and the first state over noise."""
    grid = schedule.grid(steps, spacing, offset, whole=False)
    ratio = grid.sigma / grid.alpha
    times = grid.times
    if karras:
        if not isinstance(schedule, Variance):
            raise ValueError("karras=True needs a schedule with training steps (vp, cosine): karras() has it already.")
        ratio = np.append(karras_sigmas(ratio[0], ratio[-2], steps), 0.0)
        times = schedule.times_of(ratio[:-1])
    grid = Grid(times, np.ones(steps + 1), ratio)
    data = 0.5 if prediction == "edm" else 1.0
    scale = np.append(1 / np.sqrt(ratio[:-1] ** 2 + data**2), 1.0)
    first = ratio[0] if spacing != "leading" else np.sqrt(ratio[0] ** 2 + 1)
    if prediction == "edm":
        first = np.sqrt(ratio[0] ** 2 + 1)
    return network_grid(grid, prediction, scale), float(first * scale[0])
