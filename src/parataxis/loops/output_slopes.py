"""How the outputs of a network are to move with its input, so that what enters the recurrence moves along its slopes.

What enters it, y = xhat + g (clipped(xhat) - xhat) with xhat = p u + q w f, is to move by d (u - u_k), where f is an
output and w the weight by which outputs are combined. The derivative D of y by xhat is not the same for all elements,
so xhat has to move by d / D, or not at all where D is 0, and outputs by

    e = (d / D - p) / (q w)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, upload
from ..samplers.sampler import Sampler
from .floor import CLEAR_MOVE
from .rows import SMALLEST

__all__ = ["ErrorGrowth", "OutputSlopes", "carried_rounding", "relative_floor"]

FLAT = 1e-3  # derivative of a clipped prediction below which no output moves it


class OutputSlopes:
    """The slopes e of outputs from those of what enters the recurrence, d.

    Args:
        sampler: Its steps are numbered from 0.
        weight: w, by which outputs are combined, in all.

    Attributes:
        by_element: Whether they are not the same for all elements of a state: where predictions are clipped.
    """

    def __init__(self, sampler: Sampler, weight: float) -> None:
        transform = self._transform = sampler.transform
        self.by_element = transform is not None and (transform.clip is not None or transform.quantile is not None)
        p, q, gain = np.zeros(sampler.steps), np.ones(sampler.steps), np.zeros(sampler.steps)
        if transform is not None:
            p, q, gain = transform.columns
        flat = np.abs(1 - gain) <= FLAT
        self._factor, self._still = 1 / (q * weight), -p / (q * weight)
        self._factor_beyond = np.where(flat, 0.0, self._factor / np.where(flat, 1.0, 1 - gain))
        self._columns = np.stack([p, q, self._still, gain])
        self._uploaded: Tensor | None = None

    def scalar(self, steps: slice | Indices, slopes: Array) -> Array:
        """Return e (M, S) from d (M, S) where nothing is clipped."""
        return slopes * self._factor[steps, None] + self._still[steps, None]

    def slopes(self, scalar: Array, steps: slice | Indices) -> Array:
        """Return d (M, S) from e (M, S) where nothing is clipped."""
        return (scalar - self._still[steps, None]) / self._factor[steps, None]

    def __call__(self, steps: slice | Indices, inputs: Tensor, combined: Tensor, slopes: Array) -> Tensor:
        """Return e: (M, S, 1), or (M, S, dim) where predictions are clipped.

        Args:
            steps: Which, M of them.
            inputs: (M, S, dim) u_k.
            combined: (M, S, dim) the combined outputs w f there.
            slopes: (M, S) d.
        """
        transform, within = self._transform, self.scalar(steps, slopes)
        if transform is None or not self.by_element:
            return upload(within, inputs).unsqueeze(2)
        if self._uploaded is None:
            self._uploaded = upload(self._columns, inputs)[:, :, None, None]
        p, q, still, gain = self._uploaded[:, steps].unbind()
        numbers = np.empty((2, *slopes.shape, 1))
        numbers[0, :, :, 0] = within
        numbers[1, :, :, 0] = slopes * self._factor_beyond[steps, None] + self._still[steps, None]
        inside, outside = upload(numbers, inputs).unbind()
        data = (p * inputs).addcmul_(q, combined).abs_()
        if transform.quantile is None:
            return torch.where(data > (transform.clip or 0.0), outside, inside)
        limit = torch.quantile(data, transform.quantile, dim=2, keepdim=True).clamp(1.0, transform.largest)
        derivative = 1 + gain * (1 / limit - 1)
        divided = torch.where(derivative.abs() > FLAT, still + (inside - still) / derivative, still)
        return torch.where(data > limit, outside, divided)


class ErrorGrowth:
    """The largest growth of an error, from step to step, that the rounds have shown.

    Args:
        steps: N.
        samples: S.
        joint: Whether one run stands for all samples.
    """

    def __init__(self, steps: int, samples: int, *, joint: bool = False) -> None:
        self._known, self._joint = np.zeros((2, steps, samples)), joint  # growth, and the size of moves

    def note(self, sample: Indices, first: Indices, counts: Indices, growth: Array, size: Array) -> None:
        """Note what a round knows; see :meth:`Recurrence.note_growth`."""
        rows = np.stack([growth, size], 1)
        for s, start, count, row in zip(sample.tolist(), first.tolist(), counts.tolist(), rows, strict=True):
            known = self._known[:, start : start + count, slice(None) if self._joint else slice(s, s + 1)]
            np.fmax(known, row[:, :count, None], out=known)

    def beyond(self, rounding: float) -> Array:
        """Return (N, S) |du_{i+1}| / |du_i| of moves that are far more than rounding; 0 where there were none."""
        growth, size = self._known
        return np.where(size > CLEAR_MOVE * rounding, growth, 0.0)


def carried_rounding(sampler: Sampler, slopes: Array, rounding: Array, measured: Array | None = None) -> Array:
    """Return (S,) the norm of the error of the last states, when outputs err independently at every step.

    An error is carried on by J_i = A_i + B_i d_i. A slope that is measured means nothing where it was rounding that
    moved, so J_i lies between A_i, of an output that stays, and the growth of the states' expected size, unless moves
    have shown that errors grow more. Errors of different steps add up as their squares do.

    Args:
        sampler: Its recurrence, u_{i+1} = A_i u_i + sum_l B_{i,l} y_{i-l}, of N steps.
        slopes: (N, S) d.
        rounding: (n, S) norm of the error of the combined outputs of the first steps; y has q times as much.
        measured: (N, S) growth of errors, see :class:`ErrorGrowth`.
    """
    local, steps = sampler.coefficients, len(rounding)
    if sampler.transform is not None:
        rounding = rounding * np.abs(sampler.transform.x0_from_output)[:steps, None]
    weights = np.abs(local.output_weight[:steps])
    entering = weights[:, :1] * rounding
    for lag in range(1, min(local.lags, steps - 1) + 1):
        entering[lag:] += weights[lag:, lag, None] * rounding[:-lag]
    still = np.abs(local.state_weight[:steps, None])
    usual = np.ones_like(still) if local.rms is None else (local.rms[1 : steps + 1] / local.rms[:steps])[:, None]
    # Of several outputs a slope does not say what the earlier ones carry on.
    growth = np.full_like(rounding, np.inf)
    if not local.lags:
        growth = np.abs(local.state_weight[:steps, None] + local.output_weight[:steps, 0, None] * slopes[:steps])
    growth = np.clip(growth, np.minimum(still, usual), np.maximum(still, usual))
    squares = (growth if measured is None else np.fmax(growth, measured[:steps])) ** 2
    variance = np.zeros(rounding.shape[1])
    for square, added in zip(squares, entering**2, strict=True):
        variance = square * variance + added
    return np.asarray(np.sqrt(variance))


def relative_floor(sampler: Sampler, slopes: Array, rounding: Array, sizes: Array, measured: Array) -> float:
    """Return the largest error of :func:`carried_rounding`, relative to the norms (S,) of the states.

    Infinite for states that are not finite.
    """
    with np.errstate(invalid="ignore"):
        floors = carried_rounding(sampler, slopes, rounding, measured) / sizes.clip(min=SMALLEST)
    return float(np.where(np.isnan(floors), np.inf, floors).max())
