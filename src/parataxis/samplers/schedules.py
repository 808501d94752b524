r"""Schedules: how much signal and how much noise there is at a time.

A state is x = alpha x_clean + sigma n with n standard normal. A schedule maps a time t, as the network is
receives it, to (alpha, sigma), and lists the times that a sampler of N steps visits:

========  ==================================================  ===========================================
``vp``    alpha^2 = prod_{s<=t} (1 - beta_s), sigma^2 =        DDPM (Ho et al. 2020), Stable Diffusion
          1 - alpha^2, t = 0..T-1                              (``scaled_linear``)
``cosine``  the same with the squared-cosine betas             Nichol & Dhariwal 2021; robot policies
``flow``  alpha = 1 - sigma, t = T sigma                       Lipman et al. 2023; SD3, Flux
``karras``  alpha = 1, t = log(sigma) / 4                      EDM (Karras et al. 2022), 2206.00364
========  ==================================================  ===========================================

Everything here is float64 numpy on the CPU; nothing depends on a network or a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checks import is_finite, is_int

__all__ = ["Flow", "Grid", "Karras", "Schedule", "Spacing", "Variance", "cosine", "flow", "karras", "vp"]

Array = NDArray[np.float64]
Spacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True, eq=False)
class Grid:
    """The noise levels that a sampler visits.

    Attributes:
        times: (N,) timestep of each step.
        alpha: (N + 1,) signal at the start of each step and, last, of the sample.
        sigma: (N + 1,) noise level, in the same order.
    """

    times: Array
    alpha: Array
    sigma: Array

    def __repr__(self) -> str:
        """Return the length and the ends of the times, without the arrays."""
        return f"Grid({len(self.times)} steps, times {self.times[0]:g} to {self.times[-1]:g})"


class Schedule(Protocol):
    """What a sampler needs to know of a schedule."""

    def alpha_sigma(self, times: Array) -> tuple[Array, Array]:
        """Return (alpha, sigma) at ``times``, arrays of the same shape."""
        ...

    def grid(self, steps: int, spacing: Spacing = "trailing", offset: int = 0, *, whole: bool = True) -> Grid:
        """Return the noise levels of a sampler of ``steps`` steps, ending at (alpha, sigma) = (1, 0)."""
        ...


def _check_steps(steps: int, limit: int | None = None) -> None:
    if not is_int(steps):
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")
    if limit is not None and steps > limit:
        raise ValueError(
            f"steps must be at most the {limit} training steps of this schedule, got {steps}: choose fewer steps."
        )


@dataclass(frozen=True, eq=False)
class Variance:
    """A variance-preserving schedule over T training steps, t = 0..T-1.

    While sampling, time falls from about T - 1 to 0, and the network receives it in training steps. Between whole times
    sigma/alpha is interpolated linearly, as Euler samplers on such schedules do.

    Attributes:
        alphas_cumprod: (T,) alpha^2 at every training step, falling.
    """

    alphas_cumprod: Array

    def __repr__(self) -> str:
        """Return the number of training steps and the ends, without the array."""
        first, last = self.alphas_cumprod[[0, -1]]
        return f"Variance({self.training_steps} training steps, alpha^2 from {first:.3g} to {last:.3g})"

    @property
    def training_steps(self) -> int:
        """T, the number of steps that the network was trained on."""
        return len(self.alphas_cumprod)

    @property
    def ratios(self) -> Array:
        """(T,) sigma / alpha at every training step, rising."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def alpha_sigma(self, times: Array) -> tuple[Array, Array]:
        """Return (alpha, sigma) at ``times`` in [0, T - 1]."""
        ratio = np.interp(times, np.arange(self.training_steps), self.ratios)
        alpha = 1 / np.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def times_of(self, ratio: Array) -> Array:
        """Return the times at which sigma / alpha is ``ratio``, linear in log(sigma / alpha)."""
        return np.interp(np.log(ratio), np.log(self.ratios), np.arange(self.training_steps, dtype=np.float64))

    def grid(self, steps: int, spacing: Spacing = "trailing", offset: int = 0, *, whole: bool = True) -> Grid:
        """Return the noise levels of a sampler of ``steps`` steps.

        The names are those of Lin et al. 2024 (2305.08891), table 2:

        - ``trailing``: t_i = round(T - i T / N) - 1;
        - ``leading``: t_i = (N - 1 - i) floor(T / N) + offset;
        - ``linspace``: N times from T - 1 to 0.

        Args:
            steps: N, from 1 to the number of training steps.
            spacing: One of the three names.
            offset: Added to every time of ``leading``; Stable Diffusion uses 1.
            whole: Round the times of ``linspace``.

        Raises:
            ValueError: For another spacing, steps outside 1..T, or an offset that is not an integer or leaves 0..T - 1.
        """
        _check_steps(steps, self.training_steps)
        if isinstance(offset, bool) or not isinstance(offset, (int, np.integer)):
            raise ValueError(f"offset must be an integer number of training steps, got {offset!r}.")
        total = self.training_steps
        if spacing == "trailing":
            times = np.round(total - np.arange(steps) * (total / steps)) - 1
        elif spacing == "leading":
            times = np.arange(steps)[::-1] * float(total // steps) + offset
        elif spacing == "linspace":
            times = np.linspace(0, total - 1, steps)[::-1]
            times = np.round(times) if whole else times
        else:
            raise ValueError(f"spacing must be 'trailing', 'leading' or 'linspace', got {spacing!r}.")
        if times[0] > total - 1:
            raise ValueError(f"offset {offset} puts the first time at {times[0]:g}, beyond {total - 1}: lower it.")
        if times[-1] < 0:
            raise ValueError(f"offset {offset} puts the last time at {times[-1]:g}, before 0: raise it.")
        alpha, sigma = self.alpha_sigma(times)
        return Grid(times, np.append(alpha, 1.0), np.append(sigma, 0.0))


@dataclass(frozen=True, eq=False)
class Flow:
    """Flow matching: alpha = 1 - sigma, and the network receives t = T sigma, falling from T (noise) towards 0.

    Attributes:
        shift: c in sigma <- c sigma / (1 + (c - 1) sigma), which spends more steps at high noise (SD3).
        training_steps: T.
    """

    shift: float = 1.0
    training_steps: int = 1000

    def alpha_sigma(self, times: Array) -> tuple[Array, Array]:
        """Return (alpha, sigma) at ``times`` in [0, T]."""
        sigma = np.asarray(times, np.float64) / self.training_steps
        return 1 - sigma, sigma

    def grid(self, steps: int, spacing: Spacing = "trailing", offset: int = 0, *, whole: bool = True) -> Grid:
        """Return N noise levels: 1, 1 - 1/N, .. 1/N for ``trailing``; from 1 to 1/T for ``linspace``; then 0."""
        _check_steps(steps, self.training_steps)
        if spacing == "trailing":
            sigma = 1 - np.arange(steps) / steps
        elif spacing == "linspace":
            sigma = np.linspace(1, 1 / self.training_steps, steps)
        else:
            raise ValueError(f"spacing of a flow must be 'trailing' or 'linspace', got {spacing!r}.")
        sigma = np.append(self.shift * sigma / (1 + (self.shift - 1) * sigma), 0.0)
        return Grid(sigma[:-1] * self.training_steps, 1 - sigma, sigma)


@dataclass(frozen=True, eq=False)
class Karras:
    """EDM: alpha = 1, and the network receives t = log(sigma) / 4, falling from noise to sample.

    sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (2206.00364, eq. 5).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha_sigma(self, times: Array) -> tuple[Array, Array]:
        """Return (alpha, sigma) at ``times``."""
        sigma = np.exp(4 * np.asarray(times, np.float64))
        return np.ones_like(sigma), sigma

    def grid(self, steps: int, spacing: Spacing = "trailing", offset: int = 0, *, whole: bool = True) -> Grid:
        """Return the N noise levels of the formula above, then 0; ``spacing`` is ignored."""
        _check_steps(steps)
        sigma = np.append(karras_sigmas(self.sigma_max, self.sigma_min, steps, self.rho), 0.0)
        return Grid(np.log(sigma[:-1]) / 4, np.ones(steps + 1), sigma)


def karras_sigmas(largest: float, smallest: float, steps: int, rho: float = 7.0) -> Array:
    """Return ``steps`` noise levels from largest to smallest, evenly spaced in sigma^(1/rho)."""
    ends = largest ** (1 / rho), smallest ** (1 / rho)
    return np.linspace(*ends, steps) ** rho


def vp(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    shape: Literal["linear", "scaled_linear"] = "linear",
) -> Variance:
    """Return the schedule with betas linear in t, or (``scaled_linear``) with linear square roots.

    Args:
        steps: T, the number of training steps.
        beta_start: First beta, in (0, 1).
        beta_end: Last beta, in (0, 1).
        shape: ``linear`` (DDPM) or ``scaled_linear`` (Stable Diffusion: 0.00085 to 0.012).

    Raises:
        ValueError: For options out of range.
    """
    _check_steps(steps)
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not (is_finite(beta) and 0 < beta < 1):
            raise ValueError(f"{name} must be in (0, 1), got {beta!r}.")
    if shape == "linear":
        betas = np.linspace(beta_start, beta_end, steps)
    elif shape == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    else:
        raise ValueError(f"shape must be 'linear' or 'scaled_linear', got {shape!r}.")
    return Variance(np.cumprod(1 - betas, dtype=np.float64))


def cosine(steps: int = 1000) -> Variance:
    """Return the squared-cosine schedule, betas at most 0.999 (2102.09672, eq. 17; ``squaredcos_cap_v2``)."""
    _check_steps(steps)
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return Variance(np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999), dtype=np.float64))


def flow(shift: float = 1.0, steps: int = 1000) -> Flow:
    """Return the flow-matching schedule with the given shift; the network receives ``steps`` * sigma."""
    if not (is_finite(shift) and shift > 0):
        raise ValueError(f"shift must be positive, got {shift!r}.")
    _check_steps(steps)
    return Flow(shift, steps)


def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Karras:
    """Return the EDM schedule with noise levels from ``sigma_max`` down to ``sigma_min``."""
    if not (is_finite(sigma_min) and is_finite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < min < max, got {sigma_min!r} and {sigma_max!r}.")
    if not (is_finite(rho) and rho > 0):
        raise ValueError(f"rho must be positive, got {rho!r}.")
    return Karras(sigma_min, sigma_max, rho)
