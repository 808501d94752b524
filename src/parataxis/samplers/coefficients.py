r"""The coefficients of a sampling loop, step by step.

    u_{i+1} = A_i u_i + sum_{l=0..L} B_{i,l} f_{i-l} + C_i z_i,          f_i = network(u_i, t_i)

u_i is what the network is given at step i, in the coordinates of its input, and u_N is the sample. Where the sampler
knows its noise schedule, u_i = scale_i x_i with x_i = alpha_i x_clean + sigma_i n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..arrays import Array

__all__ = ["Coefficients"]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The numbers of the recurrence, float64 on the CPU.

    Attributes:
        state_weight: (N,) A_i.
        output_weight: (N, L + 1) B_{i,l}; one column for one-step samplers.
        noise_std: (N,) C_i, the standard deviation of the noise that step i adds.
        alpha: (N + 1,) signal of every state, or None where it is not known.
        sigma: (N + 1,) noise level, likewise.
        scale: (N + 1,) network input over state: u_i = scale_i x_i; the last is 1.
        x0_from_input: (N,) p in the data prediction x0 = p u + q f, or None.
        x0_from_output: (N,) q, likewise.

    Raises:
        ValueError: If shapes do not fit together or a coefficient is not finite.
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
                f"{self.noise_std.shape} must be (N,), (N, L + 1) and (N,) with one N."
            )
        for name in ("state_weight", "output_weight", "noise_std"):
            finite = np.isfinite(getattr(self, name)).reshape(steps, -1).all(1)
            if not finite.all():
                raise ValueError(
                    f"{name} of step {int(np.argmin(finite))} is not finite: this sampler divides by zero there; "
                    "choose another prediction type, spacing or number of steps."
                )

    def __repr__(self) -> str:
        """Return the sizes, without the arrays."""
        noise = "stochastic" if self.noise_std.any() else "deterministic"
        return f"Coefficients(steps={self.steps}, lags={self.lags}, {noise})"

    @property
    def steps(self) -> int:
        """N, the number of evaluations."""
        return len(self.state_weight)

    @property
    def lags(self) -> int:
        """L: how many earlier outputs a step uses, 0 for one-step samplers."""
        return self.output_weight.shape[1] - 1

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.noise_std.any())

    @cached_property
    def rms(self) -> Array:
        """(N + 1,) expected root mean square of every state for data of unit variance; ones if unknown."""
        if self.alpha is None or self.sigma is None or self.scale is None:
            return np.ones(self.steps + 1)
        return self.scale * np.sqrt(self.alpha**2 + self.sigma**2)

    def growth(self, slopes: Array, start: int = 0) -> Array:
        """Return J_i = A_i + sum_l B_{i,l} d_i of the steps start, start + 1, ..: how a change of u_i is carried on."""
        steps = slice(start, start + len(slopes))
        return self.state_weight[steps] + self.output_weight[steps].sum(1) * slopes

    def slopes(self, growth: Array, start: int = 0) -> Array:
        """Return the d_i for which :meth:`growth` is ``growth``; 0 where no output enters the step."""
        steps = slice(start, start + len(growth))
        total = self.output_weight[steps].sum(1)
        return np.divide(growth - self.state_weight[steps], total, out=np.zeros(len(growth)), where=total != 0)

    def frozen_prediction_slopes(self) -> Array:
        """Return (N,) d_i with which later steps freeze the prediction of a step.

        0 freezes the output itself, which changes least along deterministic samplers. Where steps add noise, -p/q
        freezes the data prediction p u + q f.
        """
        if not self.stochastic or self.x0_from_input is None or self.x0_from_output is None:
            return np.zeros(self.steps)
        return -self.x0_from_input / self.x0_from_output

    def gain(self, slopes: Array) -> Array:
        """Return (N,) the effect on the sample of a change of each output, where later outputs move with d."""
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
        """Derive the coefficients of a dense recurrence u_p = base_p + sum_q weight[p, q] f_q.

        A_i = <w_{i+1}, w_i> / <w_i, w_i> over the columns before i, and B is the rest of the row; entries below 1e-12
        of the row's largest are dropped. A_0 has no meaning and is 0: the first state is part of ``base``.

        Args:
            weight: (N + 1, N), strictly lower triangular; row p holds the weights of the outputs in u_p.

        Raises:
            ValueError: If ``weight`` is not of that form.
        """
        weight = np.asarray(weight, np.float64)
        steps = weight.shape[-1]
        if weight.shape != (steps + 1, steps) or np.triu(weight).any():
            raise ValueError(f"weight must be (N + 1, N) and strictly lower triangular, got shape {weight.shape}.")
        state_weight = np.zeros(steps)
        weights = np.zeros((steps, steps))  # rest[i, l] belongs to output i - l
        for i in range(steps):
            energy = weight[i, :i] @ weight[i, :i]
            state_weight[i] = weight[i + 1, :i] @ weight[i, :i] / energy if energy > 0 else 0.0
            row = weight[i + 1] - state_weight[i] * weight[i]
            row[np.abs(row) < 1e-12 * max(np.abs(weight[i + 1]).max(), 1e-300)] = 0.0
            weights[i, : i + 1] = row[i::-1]
        used = np.flatnonzero(weights.any(0))
        return cls(state_weight, weights[:, : (used[-1] + 1 if len(used) else 1)].copy(), np.zeros(steps))
