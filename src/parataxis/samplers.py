r"""Samplers: which recurrence defines the sample.

All one-step samplers are one formula. With x = alpha x_clean + sigma n, primes for the next level, the data
prediction xhat = p x + q f and the noise prediction eps = P x + Q f, P = (1 - alpha p)/sigma, Q = -alpha q/sigma,

    x' = alpha' xhat + sd eps + s z,   sd = sqrt(sigma'^2 - s^2)
    A = alpha' p + sd P,   B = alpha' q + sd Q,   C = s

and the samplers differ in s only: 0 for DDIM and Euler, the posterior's standard deviation for DDPM, something
between for DDIM with eta. Heun and DPM-Solver++ 2M use one earlier output as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checks import is_finite
from .schedules import Grid, Schedule, Spacing, Variance, flow, karras_sigmas, vp
from .table import LocalForm, Table, upload

__all__ = [
    "SAMPLERS",
    "OutputTransform",
    "Prediction",
    "Sampler",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "heun",
    "options",
]

Array = NDArray[np.float64]
Prediction = Literal["eps", "x0", "v", "flow", "edm"]
Final = Literal["zero", "first"]


@dataclass(frozen=True, eq=False)
class OutputTransform:
    """What becomes of an output before it enters the table: y = xhat + gain (clipped(xhat) - xhat), xhat = p u + q f.

    Attributes:
        data_input: (N,) p.
        data_output: (N,) q.
        gain: (N,) 1 where the table uses the clipped prediction alone.
        clip: c in clipping to [-c, c], or None.
        quantile: Dynamic thresholding instead (Imagen, 2205.11487): s = max(1, this quantile of |xhat|) of each sample,
            clip to [-s, s] and divide by s; or None.
        largest: Upper bound of s.
    """

    data_input: Array
    data_output: Array
    gain: Array
    clip: float | None = None
    quantile: float | None = None
    largest: float = float("inf")

    def __call__(self, point: Tensor, u: Tensor, f: Tensor) -> Tensor:
        """Transform outputs f (R, *shape) at inputs u (R, *shape) of the points (R,), on the CPU."""
        chosen = np.stack([self.data_input, self.data_output, self.gain])[:, point.numpy()]
        p, q, gain = upload(chosen, f).view(3, -1, *(1,) * (f.ndim - 1)).unbind()
        data = (q * f).addcmul_(p, u)
        if self.quantile is not None:
            limit = torch.quantile(data.flatten(1).abs(), self.quantile, dim=1).clamp(1.0, self.largest)
            limit = limit.view(-1, *(1,) * (f.ndim - 1))
            clipped = torch.minimum(torch.maximum(data, -limit), limit) / limit
        elif self.clip is not None:
            clipped = data.clamp(-self.clip, self.clip)
        else:
            return data
        return data + gain * (clipped - data)

    def told(self, local: LocalForm) -> LocalForm:
        """Return the local form without a data prediction if these outputs do not tell it, which takes a gain of 1."""
        return local if (self.gain == 1).all() else replace(local, data_input=None, data_output=None)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler with its grid: the equation that defines the sample.

    Attributes:
        name: Name of the function that made it.
        times: (N,) what the network is told.
        local: The coefficients.
        start_scale: First state over standard normal noise, in the coordinates of the network's input.
        transform: What becomes of an output before it enters the table, or None.
        draws: The steps that each draw of noise enters and its factors there, in the loop's order; None for one draw
            for each step that adds noise.
        draw_dtype: What the loop draws noise in, or None for the dtype of its states.
    """

    name: str
    times: Array
    local: LocalForm
    start_scale: float = 1.0
    transform: OutputTransform | None = None
    draws: tuple[tuple[tuple[int, float], ...], ...] | None = None
    draw_dtype: torch.dtype | None = None

    @property
    def steps(self) -> int:
        """N, the number of network evaluations of the sequential loop."""
        return self.local.steps

    def network_times(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``times`` as the network is given them: int64 if all are whole, else of at least float32."""
        times = torch.from_numpy(self.times.copy())
        whole = bool((times == times.round()).all())
        return times.long() if whole else times.to(torch.promote_types(dtype, torch.float32))

    def table(
        self,
        noise: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Table:
        """Draw the noise that the steps add and return the table of a batch.

        Args:
            noise: (B, *shape) standard normal; its dtype is the states'.
            generator: One for the batch: each step draws (B, *shape) in the order of the loop, as diffusers does; or
                one for each sample, which makes a sample independent of its batch.
            dtype: Of the states of the loop whose draws are wanted; default that of ``noise``.

        Raises:
            ValueError: If there are not as many generators as samples.
        """
        drawn = None
        if self.local.noise.any():
            draws = self.draws
            if draws is None:
                draws = tuple(((int(i), float(self.local.noise[i])),) for i in np.flatnonzero(self.local.noise))
            dtype = self.draw_dtype or dtype or noise.dtype
            drawn = noise.new_zeros(len(noise), self.steps, *noise.shape[1:])
            sources: list[tuple[slice, torch.Generator | None]] = [(slice(None), None)]
            if isinstance(generator, torch.Generator):
                sources = [(slice(None), generator)]
            elif generator is not None:
                if len(generator) != len(noise):
                    raise ValueError(f"pass one generator a sample: {len(noise)} samples, {len(generator)} generators.")
                sources = [(slice(b, b + 1), own) for b, own in enumerate(generator)]
            for rows, source in sources:
                for steps in draws:
                    normal = _normal(noise[rows].shape, noise, source, dtype)
                    for i, factor in steps:
                        drawn[rows, i] += factor * normal
        return Table(self.local, noise * self.start_scale, drawn)

    def output(self, point: Tensor, u: Tensor, f: Tensor) -> Tensor:
        """Return what enters the table for the network's outputs f at inputs u; the driver applies it."""
        return f if self.transform is None else self.transform(point, u, f)


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Draw where the generator lives, as diffusers does, and bring it to the states' device and dtype."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).to(like)


def data_prediction(kind: str, alpha: Array, sigma: Array, sigma_data: float = 0.5) -> tuple[Array, Array]:
    """Return p and q of xhat = p x + q f at levels alpha and sigma, all (N,).

    Args:
        kind: A :data:`Prediction`.
        alpha: Signal.
        sigma: Noise.
        sigma_data: Standard deviation of the data in EDM's preconditioning.

    Raises:
        ValueError: For an eps-prediction at alpha = 0, a flow with alpha + sigma != 1, or another kind.
    """
    size = np.sqrt(alpha**2 + sigma**2)
    if kind == "eps":
        if (alpha == 0).any():
            raise ValueError("an eps-prediction says nothing where alpha = 0: use flow or v prediction there.")
        return 1 / alpha, -sigma / alpha
    if kind == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "v":
        return alpha / size**2, -sigma / size
    if kind == "flow":
        if not np.allclose(alpha + sigma, 1):
            raise ValueError("flow prediction needs alpha + sigma = 1: use the schedule flow().")
        return np.ones_like(alpha), -sigma
    if kind == "edm":
        total = sigma**2 + sigma_data**2
        return sigma_data**2 / total, sigma * sigma_data / np.sqrt(total)
    raise ValueError(f"prediction must be 'eps', 'x0', 'v', 'flow' or 'edm', got {kind!r}.")


@dataclass(frozen=True, eq=False)
class _Levels:
    """A grid with the conversion of its outputs, everything in the coordinates of x."""

    grid: Grid
    scale: Array
    data_input: Array
    data_output: Array

    @property
    def alpha(self) -> Array:
        return self.grid.alpha

    @property
    def sigma(self) -> Array:
        return self.grid.sigma

    def local(self, decay: Array, weight: Array, noise: Array, *, data: bool = False) -> LocalForm:
        """Convert coefficients for x to the network's input u = scale x; ``data``: outputs are data predictions."""
        p, q = self.data_input / self.scale[:-1], self.data_output
        if data:
            p, q = np.zeros_like(p), np.ones_like(q)
        after = self.scale[1:]
        return LocalForm(
            decay=decay * after / self.scale[:-1],
            weight=weight.reshape(len(decay), -1) * after[:, None],
            noise=noise * after,
            alpha=self.alpha,
            sigma=self.sigma,
            scale=self.scale,
            data_input=p,
            data_output=q,
        )

    def to_data(
        self, clip: float | None = None, quantile: float | None = None, gain: Array | None = None
    ) -> OutputTransform:
        """Return the transform from outputs to (clipped) data predictions."""
        gain = np.ones(len(self.data_input)) if gain is None else gain
        return OutputTransform(self.data_input / self.scale[:-1], self.data_output, gain, clip, quantile)


def _levels(grid: Grid, prediction: str, scale: Array | None = None) -> _Levels:
    scale = np.ones(len(grid.alpha)) if scale is None else scale
    return _Levels(grid, scale, *data_prediction(prediction, grid.alpha[:-1], grid.sigma[:-1]))


def _one_step(levels: _Levels, noise: Array, added: Array | None = None) -> tuple[Array, Array, Array]:
    """Return A, B, C of x' = alpha' xhat + sd eps + s z, with s = noise; ``added`` replaces C alone."""
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    alpha_next, sigma_next = levels.alpha[1:], levels.sigma[1:]
    direction = np.sqrt(np.maximum(sigma_next**2 - noise**2, 0.0))
    p, q = levels.data_input, levels.data_output
    decay = alpha_next * p + direction * (1 - alpha * p) / sigma
    weight = alpha_next * q - direction * alpha * q / sigma
    return decay, weight, noise if added is None else added


def _posterior(levels: _Levels) -> Array:
    """Return (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2), the posterior's standard deviation; 0 into sigma' = 0."""
    ratio = np.maximum(1 - (levels.alpha[:-1] / levels.alpha[1:]) ** 2, 0.0)
    return levels.sigma[1:] / levels.sigma[:-1] * np.sqrt(ratio)


def _ending(grid: Grid, schedule: Schedule, final: str) -> Grid:
    """Replace the last level by the schedule's first training level."""
    if final == "zero":
        return grid
    if final != "first":
        raise ValueError(f"final must be 'zero' or 'first', got {final!r}.")
    alpha, sigma = schedule.levels(np.zeros(1))
    return Grid(grid.times, np.append(grid.alpha[:-1], alpha), np.append(grid.sigma[:-1], sigma))


def _schedule(schedule: Schedule | None, default: Callable[[], Schedule]) -> Schedule:
    """Return the schedule, or the default one where there is none."""
    if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "grid")):
        raise TypeError(f"schedule must be a schedule, such as parataxis.vp(), got {schedule!r}.")
    return default() if schedule is None else schedule


def _check_clip(clip: float | None, quantile: float | None) -> None:
    if clip is not None and quantile is not None:
        raise ValueError("pass clip or quantile, not both: thresholding replaces clipping.")
    if clip is not None and not (is_finite(clip) and clip > 0):
        raise ValueError(f"clip must be positive, got {clip!r}.")
    if quantile is not None and not (is_finite(quantile) and 0 < quantile <= 1):
        raise ValueError(f"quantile must be in (0, 1], got {quantile!r}.")


def _sampled(
    name: str,
    levels: _Levels,
    noise: Array,
    added: Array | None,
    clip: float | None,
    quantile: float | None,
    clipped_eps: bool,
) -> Sampler:
    """Build a one-step sampler, with an output transform if it clips."""
    _check_clip(clip, quantile)
    decay, weight, drawn = _one_step(levels, noise, added)
    if clip is None and quantile is None:
        return Sampler(name, levels.grid.times, levels.local(decay, weight, drawn))
    alpha, sigma, after = levels.alpha[:-1], levels.sigma[:-1], levels.alpha[1:]
    direction = np.sqrt(np.maximum(levels.sigma[1:] ** 2 - noise**2, 0.0))
    data_weight = after - direction * alpha / sigma
    # The clipped prediction enters with alpha', the unclipped one through eps: one output carries both.
    gain = np.ones(len(alpha)) if clipped_eps else after / data_weight
    transform = levels.to_data(clip, quantile, gain)
    local = transform.told(levels.local(direction / sigma, data_weight, drawn, data=True))
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
        spacing: See :meth:`parataxis.schedules.Variance.grid`.
        offset: Likewise.
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
    schedule = _schedule(schedule, vp)
    grid = _ending(schedule.grid(steps, spacing, offset), schedule, final)
    levels = _levels(grid, prediction)
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
            is a function of the output, so not linear, and is refused.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.schedules.Variance.grid`.
        offset: Likewise.
        clip: Clip the data prediction to [-clip, clip].
        quantile: Threshold it dynamically instead, at this quantile of |xhat| (0.995 is common).

    Raises:
        ValueError: For options out of range, or a learned variance.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(
            f"variance must be 'fixed_small' or 'fixed_large', got {variance!r}: a learned variance scales the noise "
            "by a function of the output, which no table can hold; run such a loop as it is."
        )
    schedule = _schedule(schedule, vp)
    levels = _levels(schedule.grid(steps, spacing, offset), prediction)
    small = _posterior(levels)
    added = None
    if variance == "fixed_large":
        added = np.sqrt(np.maximum(1 - (levels.alpha[:-1] / levels.alpha[1:]) ** 2, 0.0))
        added[-1] = 0.0
    return _sampled("ddpm", levels, small, added, clip, quantile, clipped_eps=True)


def _exploding(
    schedule: Schedule, steps: int, spacing: Spacing, offset: int, prediction: str, *, karras: bool
) -> tuple[_Levels, float]:
    """Return the levels in coordinates alpha = 1 with the network's scale, and the first state over noise."""
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
    return _levels(grid, prediction, scale), float(first * scale[0])


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
        spacing: See :meth:`parataxis.schedules.Variance.grid`.
        offset: Likewise.
        karras: Space the noise levels evenly in sigma^(1/7) between the ends of the grid.
    """
    levels, first = _exploding(_schedule(schedule, vp), steps, spacing, offset, prediction, karras=karras)
    local = levels.local(*_one_step(levels, np.zeros(steps)))
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
        spacing: See :meth:`parataxis.schedules.Variance.grid`.
        offset: Likewise.
        karras: Space the noise levels evenly in sigma^(1/7).
    """
    if not (is_finite(eta) and eta >= 0):
        raise ValueError(f"eta must be at least 0, got {eta!r}.")
    levels, first = _exploding(_schedule(schedule, vp), steps, spacing, offset, prediction, karras=karras)
    sigma, after = levels.sigma[:-1], levels.sigma[1:]
    added = np.minimum(after, eta * after / sigma * np.sqrt(np.maximum(sigma**2 - after**2, 0.0)))
    local = levels.local(*_one_step(levels, added))
    return Sampler("euler_ancestral", levels.grid.times, local, first)


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
        spacing: ``trailing`` (1, 1 - 1/N, ..) or ``linspace``; see :meth:`parataxis.schedules.Flow.grid`.
    """
    levels = _levels(_schedule(schedule, flow).grid(steps, spacing), prediction)
    return Sampler("flow_euler", levels.grid.times, levels.local(*_one_step(levels, np.zeros(steps))))


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

    With h = sigma' - sigma and alpha = 1, point k is x and point k + 1 the trial state x + h eps_k; then
    x' = x + h/2 (eps_k + eps_{k+1}). The last interval, into sigma' = 0, is a plain Euler step.

    Args:
        schedule: Default :func:`parataxis.vp`.
        steps: Number of intervals.
        prediction: What the network returns.
        spacing: See :meth:`parataxis.schedules.Variance.grid`.
        offset: Likewise.
        karras: Space the noise levels evenly in sigma^(1/7).
    """
    single, first = _exploding(_schedule(schedule, vp), steps, spacing, offset, prediction, karras=karras)
    twice = np.repeat(np.arange(steps), 2)[1:]  # 0, 1, 1, 2, 2, ..: the level of every point
    sigma = np.append(single.sigma[twice], 0.0)
    grid = Grid(single.grid.times[twice], np.ones(len(sigma)), sigma)
    levels = _levels(grid, prediction, np.append(single.scale[twice], 1.0))
    # eps = (x - xhat) / sigma = P x + Q f
    level = sigma[:-1]
    eps_input, eps_output = (1 - levels.data_input) / level, -levels.data_output / level
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
    return Sampler("heun", grid.times, levels.local(decay, weight, np.zeros(count)), first)


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
        spacing: See :meth:`parataxis.schedules.Variance.grid`.
        offset: Likewise.
        karras: Space the noise levels evenly in (sigma/alpha)^(1/7) over all training levels; ``spacing`` is unused.
        clip: Clip the data prediction to [-clip, clip].
        quantile: Threshold it dynamically instead, at this quantile of |xhat| (0.995 is common).
    """
    _check_clip(clip, quantile)
    schedule = _schedule(schedule, vp)
    grid = schedule.grid(steps, spacing, offset)
    if karras:
        if not isinstance(schedule, Variance):
            raise ValueError("karras=True needs a schedule with training steps (vp, cosine).")
        ratio = karras_sigmas(schedule.ratios[-1], schedule.ratios[0], steps)
        times = np.round(schedule.times_of(ratio))
        alpha = 1 / np.sqrt(1 + ratio**2)
        grid = Grid(times, np.append(alpha, 1.0), np.append(ratio * alpha, 0.0))
    levels = _levels(grid, prediction)
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
            "dpmpp_2m divides by log(alpha) = -inf at a first level with alpha = 0: choose another spacing."
        )
    local = levels.local(decay, weight, np.zeros(steps), data=True)
    return Sampler("dpmpp_2m", grid.times, local, transform=levels.to_data(clip, quantile))


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "flow_euler": flow_euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def options(sampler: str) -> dict[str, inspect.Parameter]:
    """Return the options of a registered sampler by name, without schedule and steps."""
    parameters = inspect.signature(SAMPLERS[sampler], eval_str=True).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("schedule", "steps")}
