"""The coefficients of a loop as windows read them: made once for a sampler and a width."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..samplers.coefficients import Coefficients
from . import extrapolation
from .error_estimate import REACH, REACH_OF_NOISE, REACH_UNKNOWN

__all__ = ["Tables"]

SMALL = np.finfo(np.float32).eps
KEPT = 2**21  # numbers in the factors of entering states that are kept


class KeptFactors:
    """Arrays by their keys, in one piece of memory.

    Many small arrays that stay would lie between the large ones of states and outputs that come and go, whose memory
    glibc could then not use again: 10,000 steps of 64 KB took 600 MB more.
    """

    def __init__(self, count: int, size: int) -> None:
        self.known: dict[Any, Array] = {}
        self._memory = np.empty((count, size))
        self._free = list(range(count))

    def keep(self, key: Any, values: Array) -> bool:
        """Copy an array into its place, if there is room."""
        try:
            slot = self._memory[self._free.pop()]  # at once: several threads may draw from one sampler
        except IndexError:
            return False
        if values.size > len(slot):
            return False
        place = slot[: values.size].reshape(values.shape)
        place[:] = values
        self.known[key] = place
        return True


class Tables:
    """The coefficients of a loop, continued with zeros behind its end so that every window finds its entries.

    All have N + 2 W rows, or one more.

    Attributes:
        a, b, b_sum, b_inverse: A_i, B_{i,l}, sum_l B_{i,l} and one over it, 0 where no output enters the step.
        rms, rms_ratio: Expected rms of the states, 1 behind the end, and that of the state behind a step over that of
            the state before it.
        p, q: Of the data prediction p u + q f; 0 and 1 where it is unknown.
        alpha: Signal of every state, or None.
        signal: That over the size of the state: alpha where the schedule preserves variance; or None.
        share: Square root of the part of the loop up to the state behind a step.
        reach: What may become of an error of the state behind a step on the way to the sample; 1 at the sample.
        frozen: Slopes that freeze the prediction of a step.
        windows: (N + W + 1, columns, W) of every first step, what a round reads of the steps of a window: see
            :attr:`COLUMNS`, then B_{i,l} of each lag; a view of one table.
    """

    COLUMNS = (
        "b_inverse",
        "rms",
        "rms_ratio",
        "reach",
        "share",
        # The growth of a step for Gaussian data of variance v: mm_fixed + mm_slope v / (alpha_2 v + sigma_2); the
        # slope of its output: (target / (alpha_2 v + sigma_2) v - p) / q.
        "mm_fixed",
        "mm_slope",
        "alpha_2",
        "sigma_2",
        "target",
        "p_step",
        "q_step",
        "b_sum",
        "a",
    )

    def __init__(self, coefficients: Coefficients, width: int) -> None:
        steps, more = coefficients.steps, 2 * width
        self.steps, self.count = steps, steps + more

        def padded(values: Array, fill: float = 0.0) -> Array:
            return np.concatenate([values, np.full((more, *values.shape[1:]), fill)])

        self.a, self.b = padded(coefficients.state_weight), padded(coefficients.output_weight)
        self.b_sum, self.rms = self.b.sum(1), padded(coefficients.rms, 1.0)
        self.b_inverse = np.divide(1.0, self.b_sum, out=np.zeros_like(self.b_sum), where=self.b_sum != 0)
        self.rms_ratio = self.rms[1:] / self.rms[:-1]
        self.predicts = coefficients.x0_from_input is not None and coefficients.x0_from_output is not None
        self.p = padded(coefficients.x0_from_input if self.predicts else np.zeros(steps))  # type: ignore[arg-type]
        self.q = padded(coefficients.x0_from_output if self.predicts else np.ones(steps), 1.0)  # type: ignore[arg-type]
        self.p_step, self.q_step = self.p, self.q
        self.share = np.sqrt(np.arange(1, self.count + 1) / steps)
        levels = (coefficients.alpha, coefficients.sigma, coefficients.scale)
        self.alpha, self.sigma, self.scale = (None if values is None else padded(values, 1.0) for values in levels)
        self.gaussian = self.predicts and all(values is not None for values in levels)
        self.signal = None
        if self.alpha is not None and self.sigma is not None:
            self.signal = np.maximum(self.alpha / np.hypot(self.alpha, self.sigma), SMALL)
        self.mm_fixed, self.mm_slope = np.ones(self.count), np.zeros(self.count)
        self.alpha_2, self.sigma_2, self.target = np.ones(self.count), np.ones(self.count), np.zeros(self.count)
        if self.gaussian:
            self._add_gaussian()
        self.reach = self._reach(coefficients.stochastic)
        self.frozen = padded(coefficients.frozen_prediction_slopes())
        self.extrapolates = "frozen" if coefficients.stochastic or coefficients.alpha is None else "line"
        columns = [*(getattr(self, name)[: self.count] for name in self.COLUMNS), *self.b.T]
        self.windows = np.lib.stride_tricks.sliding_window_view(np.stack(columns, 1), width, 0)
        self.entering = KeptFactors(1, 0)  # of states that enter, by where: the same for every sample

    def _add_gaussian(self) -> None:
        """Add what follows from the schedule for Gaussian data."""
        assert self.alpha is not None
        assert self.sigma is not None
        assert self.scale is not None
        alpha, sigma, scale = (values[: self.count] for values in (self.alpha, self.sigma, self.scale))
        self.alpha_2, self.sigma_2, self.target = alpha**2, sigma**2, alpha / scale
        self.mm_fixed = self.a - self.b_sum * self.p / self.q
        self.mm_slope = self.b_sum / (self.q * scale) * alpha

    def _reach(self, stochastic: bool) -> Array:
        """Return what may become of an error of the state behind each step."""
        steps, reach = self.steps, np.full(self.count, REACH_UNKNOWN)
        if self.signal is not None:
            rms_of_sample = self.rms[steps] / self.rms[1:]
            reach = REACH * rms_of_sample / self.signal[1:]
            if stochastic and self.gaussian:
                # Noise makes a loop forget: what is left of an error for Gaussian data, beside a loop without noise.
                growth = np.abs(self.mm_fixed + self.mm_slope / (self.alpha_2 + self.sigma_2))
                growth[steps:] = 1.0
                left = np.append(np.multiply.accumulate(growth[:0:-1])[::-1], 1.0) / rms_of_sample
                reach = np.minimum(reach, np.maximum(REACH_OF_NOISE * rms_of_sample, left * reach))
            reach = np.maximum(1.0, reach)
        reach[steps - 1 :] = 1.0
        return reach

    @classmethod
    def of(cls, coefficients: Coefficients, width: int) -> Tables:
        """Return the tables of a sampler; they are kept with it, as small networks draw many samples of one."""
        known: dict[int, Tables] = coefficients.__dict__.setdefault("_tables", {})
        if width not in known:
            known[width] = cls(coefficients, width)
        return known[width]

    def factors(self, lo: int, origin: int, count: int, width: int, tail: int, entry: str) -> Array:
        """Return the factors (at least ``count``, tail) of states behind ``origin``; see :mod:`.extrapolation`."""
        size = min(1 << (count - 1).bit_length(), width)  # few sizes, so that many rounds find theirs
        key = (lo, origin, size, tail, entry)
        entering = self.entering  # other threads may put another in its place
        if key not in entering.known:
            hi = np.array([origin])
            if entry == "copy":
                factors = extrapolation.copied(self, hi, size, tail)
            elif entry == "bend":
                factors = extrapolation.bend(self, hi, width, size, tail)
            elif self.extrapolates == "frozen":
                factors = extrapolation.frozen(self, hi, size, tail)
            else:
                factors = extrapolation.line(self, np.array([lo]), hi, width, size, tail)
            if not entering.keep(key, factors[0]):
                entering = self.entering = KeptFactors(max(1, KEPT // (width * tail)), width * tail)
                entering.keep(key, factors[0])
        return entering.known[key]
