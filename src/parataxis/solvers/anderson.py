r"""Fixed points of order k and Anderson acceleration: ParaTAA.

With the guess X, its order-k correction R (the response with k terms kept) and N = X + R, the last differences dX_a,
dR_a = dN_a - dX_a between rounds give, for every state j of the window,

    x_j <- N_j - sum_a dN_{a,j} gamma_{j,a},   gamma_j = (sum_n dR_n^T dR_n + lam I)^{-1} sum_n dR_n^T R_n

with sums over the states n of the window:

===============  =============================  ==========================
acceleration     left sum (Gram matrix)         right sum
===============  =============================  ==========================
``none``         no acceleration: the fixed point of order k
``anderson``     all states                     all states
``prefix``       all states                     states up to j
``triangular``   states up to j                 states up to j
===============  =============================  ==========================

Triangular Anderson acceleration lets a state depend only on noisier ones, as the table does. The states that are
settled in a round, among them always the first, take the plain update N: so at most N rounds are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..engine.solve import Asking, Combine, Inner, Problem
from ..samplers.coefficients import Coefficients
from .picard import noise_variance
from .window import Window, check_window

__all__ = ["Anderson"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Anderson:
    """Order-k fixed points with (triangular) Anderson acceleration: ParaTAA (2402.09970).

    The fixed point assumes that the noise prediction does not change: J_i = alpha'/alpha on variance-preserving
    schedules, A_i elsewhere.

    Attributes:
        window: Levels evaluated in a round; None for all.
        order: k, the terms kept of the response; None for as many as the window has levels.
        history: m, rounds kept: m - 1 differences.
        acceleration: ``triangular``, ``prefix``, ``anderson`` or ``none``.
        ridge: lam; relative to the mean diagonal of the Gram matrix, or as it is with ``absolute``.
        absolute: Whether ``ridge`` is absolute, as published (1e-3).
        rule: ``error`` (the tolerance bounds the relative error of the sample) or ``residual`` (as published: a state
            is finished when the root mean square of its one-step residual is at most ``threshold``, or at most
            ``threshold`` times the noise that DDPM adds there).
        threshold: Of the published rule; the tolerance is then not used.
        entry: How states enter the window: ``extrapolate`` (on from its end) or ``copy``.
    """

    window: int | None = None
    order: int | None = None
    history: int = 2
    acceleration: Literal["triangular", "prefix", "anderson", "none"] = "triangular"
    ridge: float = 1e-8
    absolute: bool = False
    rule: Literal["error", "residual"] = "error"
    threshold: float = 1e-3
    entry: Literal["extrapolate", "copy"] = "extrapolate"

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.order is not None and (isinstance(self.order, bool) or not self.order >= 1):
            raise ValueError(f"order must be at least 1, or None for the whole window, got {self.order!r}.")
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 1:
            raise ValueError(f"history must be a whole number of rounds, at least 1, got {self.history!r}.")
        if self.acceleration not in ("triangular", "prefix", "anderson", "none"):
            raise ValueError(
                f"acceleration must be 'triangular', 'prefix', 'anderson' or 'none', got {self.acceleration!r}."
            )
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge!r}.")
        if self.rule not in ("error", "residual"):
            raise ValueError(f"rule must be 'error' or 'residual', got {self.rule!r}.")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold!r}.")
        if self.entry not in ("extrapolate", "copy"):
            raise ValueError(f"entry must be 'extrapolate' or 'copy', got {self.entry!r}.")

    def refuses(self, local: Coefficients) -> str | None:
        """Refuse the published rule where the variance of the noise is unknown."""
        if self.rule == "residual" and (local.alpha is None or local.sigma is None):
            return "rule='residual' compares with alpha and sigma, unknown for this table: use rule='error'."
        return None

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory."""
        local = problem.coefficients
        history = 1 if self.acceleration == "none" else self.history
        window = Window(problem, self.window, history=history)
        slopes = local.slopes(_frozen_growth(local))
        floor = None
        if self.rule == "residual":
            floor = self.threshold**2 * problem.dim * np.maximum(1.0, noise_variance(local))
        spans: list[tuple[int, int]] = []  # (lo, hi) of the last rounds, the present one first
        yield from window.open()
        while not window.done:
            lo, hi = window.lo, window.hi
            spans = [(lo, hi)] if window.coarse else [(lo, hi), *spans][:history]
            ages = range(len(spans))
            news = tuple(window.news(lo + 1, hi, age) for age in ages)
            states = tuple(window.states(lo + 1, hi, age) for age in ages)
            corrections = [Inner(news, states)] if len(spans) > 1 else []
            response = window.response(slopes[lo:hi], order=self.order)
            norms, *grams = yield from window.evaluate(response, *corrections)
            norms = yield from window.checked(norms)
            errors = window.errors(norms, local.gaussian_slopes(window.variance)[lo:hi])
            count = window.accept(errors, None if floor is None else norms[:, 1] <= floor[lo + 1 : hi + 1])
            if history > 1:
                yield Combine(news, self._factors(grams, spans, count), window.states(lo + 1, hi, -1))
            window.turn()
            yield from window.settle(count, float(errors[count - 1]))
            yield from window.enter(roll=self.entry == "extrapolate")
        return window.sample()

    def _factors(self, grams: list[Array], spans: list[tuple[int, int]], count: int) -> Array:
        """Return the factors of the last rounds in the next states: plain up to the ``count``-th, then accelerated."""
        lo, hi = spans[0]
        factors = np.zeros((hi - lo, len(spans)))
        factors[:, 0] = 1.0
        for gram in grams:
            level = np.arange(lo + 1, hi + 1)
            # Difference a is valid for a state that was in the window in both of its rounds.
            inside = np.stack([(level > low) & (level <= high) for low, high in spans], 1)
            valid = np.logical_and.accumulate(inside[:, 1:] & inside[:, :-1], axis=1)
            weights = self._weights(gram, valid, count)
            # x = N_0 - sum_a gamma_a (N_a - N_{a+1})
            factors[:, :-1] -= weights
            factors[:, 1:] += weights
            # What is not valid has factor 0, and what it holds must be finite: it is a row of this run.
        return factors

    def _weights(self, gram: Array, valid: NDArray[np.bool_], count: int) -> Array:
        """Return gamma, (R, h), from the inner products of the corrections of the last rounds, (R, h + 1, h + 1)."""
        size = valid.shape[1]
        difference = np.zeros((size, size + 1))
        difference[np.arange(size), np.arange(size)] = 1.0
        difference[np.arange(size), np.arange(size) + 1] = -1.0
        gram = np.where(np.isfinite(gram).all((1, 2), keepdims=True), gram, 0.0)
        left = difference @ gram @ difference.T
        right = (difference @ gram)[:, :, 0]
        left = np.where(valid[:, :, None] & valid[:, None, :], left, 0.0)
        right = np.where(valid, right, 0.0)
        left_sum, right_sum = np.cumsum(left, axis=0), np.cumsum(right, axis=0)
        if self.acceleration in ("anderson", "prefix"):
            left_sum = np.broadcast_to(left_sum[-1], left_sum.shape)
        if self.acceleration == "anderson":
            right_sum = np.broadcast_to(right_sum[-1], right_sum.shape)
        diagonal = np.trace(left_sum, axis1=1, axis2=2)[:, None, None] / size
        ridge = self.ridge if self.absolute else self.ridge * diagonal
        system = left_sum + ridge * np.eye(size)
        # A slot without a valid difference gets the unit equation gamma = 0.
        empty = ~valid | (np.diagonal(system, axis1=1, axis2=2) <= 0)
        system = np.where(empty[:, :, None] | empty[:, None, :], np.eye(size), system)
        weights = np.linalg.solve(system, np.where(empty, 0.0, right_sum)[..., None])[..., 0]
        weights[:count] = 0.0
        return np.where(np.isfinite(weights), weights, 0.0)


def _frozen_growth(local: Coefficients) -> Array:
    """Return J of a frozen noise prediction in the network's input: alpha'/alpha, or A where alpha may be 0."""
    if local.alpha is None or local.sigma is None or local.scale is None:
        return local.state_weight
    if not np.allclose(local.alpha**2 + local.sigma**2, 1):
        return local.state_weight
    alpha = local.alpha * local.scale
    return alpha[1:] / alpha[:-1]
