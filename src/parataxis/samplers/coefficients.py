"""The coefficients of a sampling loop, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Coefficients"]


Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients of a table, step by step, in the coordinates of the network's input.

    Attributes:
        state_weight: (N,) A_i.
        output_weight: (N, L) B_{i,l}; L = 1 for one-step samplers.
        noise_std: (N,) C_i, the standard deviation of the noise that step i adds.
        alpha: (N + 1,) signal level of every state, or None where it is not known.
        sigma: (N + 1,) noise level, likewise.
        scale: (N + 1,) network input over state: u_i = scale_i x_i; the last is 1.
        x0_from_input: (N,) p in the data prediction xhat = p u + q f, or None.
        x0_from_output: (N,) q, likewise.
    """

    state_weight: Array
    output_weight: Array
    noise_std: Array
    alpha: Array | None = None
    sigma: Array | None = None
    scale: Array | None = None
    x0_from_input: Array | None = None
    x0_from_output: Array | None = None

    def __post_init__(self) -> None:
        steps = len(self.state_weight)
        if self.output_weight.ndim != 2 or len(self.output_weight) != steps or len(self.noise_std) != steps:
            raise ValueError(
                f"state_weight {self.state_weight.shape}, output_weight {self.output_weight.shape} and noise_std "
                f"{self.noise_std.shape} must be (N,), (N, L) and (N,) with one N."
            )
        for name in ("state_weight", "output_weight", "noise_std"):
            finite = np.isfinite(getattr(self, name)).reshape(steps, -1).all(1)
            if not finite.all():
                raise ValueError(
                    f"{name} of step {int(np.argmin(finite))} is not finite: this sampler divides by zero there; "
                    "choose another prediction type, spacing or number of steps."
                )

    @property
    def steps(self) -> int:
        """N, the number of evaluations."""
        return len(self.state_weight)

    @property
    def lags(self) -> int:
        """How many earlier outputs a step uses: 0 for one-step samplers."""
        return self.output_weight.shape[1] - 1

    @cached_property
    def rms(self) -> Array:
        """(N + 1,) expected root mean square of every state for data of unit variance; ones if unknown."""
        if self.alpha is None or self.sigma is None or self.scale is None:
            return np.ones(self.steps + 1)
        return self.scale * np.sqrt(self.alpha**2 + self.sigma**2)

    def growth(self, slopes: Array, start: int = 0) -> Array:
        """Return J_i = A_i + sum_l B_{i,l} d_i for points start, start + 1, ..: the slope of each step."""
        chosen = slice(start, start + len(slopes))
        return self.state_weight[chosen] + self.output_weight[chosen].sum(1) * slopes

    def slopes(self, growth: Array, start: int = 0) -> Array:
        """Return the d_i for which :meth:`growth` is ``growth``; 0 where no output enters the step."""
        chosen = slice(start, start + len(growth))
        total = self.output_weight[chosen].sum(1)
        return np.divide(growth - self.state_weight[chosen], total, out=np.zeros(len(growth)), where=total != 0)

    def gaussian_slopes(self, variance: float) -> Array:
        """Return the (N,) output slopes of a network for Gaussian data of this variance v.

        The data prediction then has slope alpha v / (alpha^2 v + sigma^2) in x. Where
        alpha and sigma are unknown the growth is taken as 1.
        """
        if self.alpha is None or self.sigma is None or self.scale is None or self.x0_from_output is None:
            return self.slopes(np.ones(self.steps))
        assert self.x0_from_input is not None
        alpha, sigma, scale = self.alpha[:-1], self.sigma[:-1], self.scale[:-1]
        target = alpha * variance / (alpha**2 * variance + sigma**2) / scale
        return (target - self.x0_from_input) / self.x0_from_output

    def frozen_prediction_slopes(self) -> Array:
        """Return the (N,) slopes with which later points hold the output of a point.

        0 holds the output itself, which changes least along deterministic samplers; where steps add noise, -p/q holds
        the data prediction p u + q f.
        """
        if not self.noise_std.any() or self.x0_from_input is None or self.x0_from_output is None:
            return np.zeros(self.steps)
        return -self.x0_from_input / self.x0_from_output

    def gain(self, slopes: Array) -> Array:
        """Return the (N,) effect on the sample of a change of each point's output, later outputs moving with d."""
        gains = np.zeros(self.steps)
        carried = np.zeros(self.steps + 1)  # effect on the sample of a change of each state
        carried[-1] = 1.0
        for i in range(self.steps - 1, -1, -1):
            for lag in range(min(self.lags, i) + 1):
                gains[i - lag] += carried[i + 1] * self.output_weight[i, lag]
            carried[i] = carried[i + 1] * self.state_weight[i] + gains[i] * slopes[i]
        return gains

    def dense(self) -> tuple[Array, Array]:
        """Return (start, weight): u_p = start_p u_0 + sum_q weight[p, q] f_q + noise; (N + 1,) and (N + 1, N)."""
        start = np.cumprod(np.append(1.0, self.state_weight))
        weight = np.zeros((self.steps + 1, self.steps))
        for i in range(self.steps):
            weight[i + 1] = self.state_weight[i] * weight[i]
            for lag in range(min(self.lags, i) + 1):
                weight[i + 1, i - lag] += self.output_weight[i, lag]
        return start, weight

    @classmethod
    def from_dense(cls, weight: Array) -> Coefficients:
        """Derive the local form of a dense table.

        A_i = <w_{i+1}, w_i> / <w_i, w_i> over the columns before i, and B the rest of the row; entries below 1e-12
        of the row's largest are dropped. A_0 has no meaning and is 0: the first state is in ``base``.

        Args:
            weight: (N + 1, N), strictly lower triangular; row p holds the weights of the outputs in u_p.

        Raises:
            ValueError: If ``weight`` is not of that form.
        """
        weight = np.asarray(weight, np.float64)
        steps = weight.shape[-1]
        if weight.shape != (steps + 1, steps) or np.triu(weight).any():
            raise ValueError(f"weight must be (N + 1, N) and strictly lower triangular, got shape {weight.shape}.")
        decay = np.zeros(steps)
        rest = np.zeros((steps, steps))  # rest[i, l] belongs to output i - l
        for i in range(steps):
            energy = weight[i, :i] @ weight[i, :i]
            decay[i] = weight[i + 1, :i] @ weight[i, :i] / energy if energy > 0 else 0.0
            row = weight[i + 1] - decay[i] * weight[i]
            row[np.abs(row) < 1e-12 * max(np.abs(weight[i + 1]).max(), 1e-300)] = 0.0
            rest[i, : i + 1] = row[i::-1]
        used = np.flatnonzero(rest.any(0))
        return cls(decay, rest[:, : (used[-1] + 1 if len(used) else 1)].copy(), np.zeros(steps))

    def propagation(self, start: int, count: int, slopes: Array, order: int | None = None, before: int = 0) -> Array:
        """Return how changes spread: (count, before + count), row k for state start + 1 + k.

        The first columns are the effects of changes of the states start - before .. start, the others of the residuals
        of the states start + 1, ..: the rows and columns of (I - K)^{-1} - I that are wanted; with ``order`` k, of
        K + .. + K^{k-1}. ``slopes`` begin at point start - before.
        """
        if self.lags == 0:
            ratio = self.growth(slopes, start)
            below = np.tri(count, dtype=bool)
            spread = np.where(below, np.cumprod(np.where(below, ratio[:, None], 1.0), axis=0), 0.0)
            return spread if order is None else spread - np.tril(spread, 1 - order)
        if order is not None and order <= count:
            step = np.zeros((count + 1, count + 1))
            for k in range(count):
                step[k + 1, k] = self.state_weight[start + k]
                for lag in range(min(self.lags, k) + 1):
                    step[k + 1, k - lag] += self.output_weight[start + k, lag] * slopes[k - lag]
            total = np.zeros_like(step)
            for _ in range(order - 1):
                total = step + step @ total
            return total[1:, :count]
        inverse = np.eye(before + count + 1)
        for k in range(count):
            row = before + k
            inverse[row + 1] += self.state_weight[start + k] * inverse[row]
            for lag in range(min(self.lags, row) + 1):
                inverse[row + 1] += self.output_weight[start + k, lag] * slopes[row - lag] * inverse[row - lag]
        return (inverse - np.eye(before + count + 1))[before + 1 :, : before + count]

    def carried(self, residuals: Array, slopes: Array, start: int = 0) -> Array:
        """Return (R,) what residuals of the states start + 1, .. can amount to in them: |(I - K)^{-1}| |r|."""
        if self.lags:
            spread = np.abs(self.propagation(start, len(residuals), slopes))
            return np.asarray(residuals + spread[:, 1:] @ residuals[:-1])
        total, found = 0.0, []
        for growth, own in zip(np.abs(self.growth(slopes, start)).tolist(), residuals.tolist(), strict=True):
            total = own + growth * total
            found.append(total)
        return np.array(found)
