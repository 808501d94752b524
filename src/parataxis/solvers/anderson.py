r"""Fixed points of order k and Anderson acceleration: ParaTAA.

With the guess X, its order-k correction R (the correction with k terms kept) and N = X + R, the last differences dX_a,
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

Triangular Anderson acceleration lets a state depend only on noisier ones, as the recurrence does. The states that are
accepted in a round, among them always the first, take the plain update N: so at most N rounds are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, read
from ..checks import is_int
from ..samplers.coefficients import Coefficients
from .base import Answer
from .batch import Batch
from .picard import noise_variance
from .replayed import ReplayedWindow
from .tensors import WindowTensors
from .window import Measured, Window, check_window
from .windowed import Windowed

__all__ = ["Anderson"]


@dataclass(frozen=True)
class Anderson(Windowed):
    """Order-k fixed points with (triangular) Anderson acceleration: ParaTAA (2402.09970).

    The fixed point assumes that the noise prediction does not change: J_i = alpha'/alpha on variance-preserving
    schedules, A_i elsewhere.

    Attributes:
        window: Steps evaluated in a round; None for all.
        order: k, the terms kept of the correction; None for as many as the window has steps.
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
        if not is_int(self.history):
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

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """The published rule needs the variance of the noise."""
        if self.rule == "residual" and (coefficients.alpha is None or coefficients.sigma is None):
            return "rule='residual' compares with alpha and sigma, unknown for this sampler: use rule='error'."
        return None

    def open(self, batch: Batch) -> Window:
        """Return the windows of a batch."""
        history = 1 if self.acceleration == "none" else self.history
        if batch.recurrence.replays:
            if self.order is not None:
                raise ValueError(
                    "order= truncates the correction, and a loop without a recurrence has none: "
                    "choose Secant or Picard."
                )
            return _ReplayedAccelerated(batch, self.window, history=history)
        return _Accelerated(batch, self.window, history=history, order=self.order)

    def slopes(self, window: Window, measured: Measured | None) -> Array:
        """Return the slopes of a frozen noise prediction."""
        growth = _frozen_growth(window.problem.coefficients)
        slopes = window.problem.coefficients.slopes(growth)
        return np.append(slopes, np.zeros(2 * window.W))[window.steps]

    def passed(self, window: Window) -> NDArray[np.bool_] | None:
        """Return (S, W) which states pass the published test; NaN never does."""
        if self.rule == "error":
            return None
        floor = self.threshold**2 * window.problem.dim * np.maximum(1.0, noise_variance(window.problem.coefficients))
        state = np.minimum(window.steps + 1, window.problem.steps)
        return np.asarray(window.residuals**2 <= floor[state])

    def round(self, window: Window, answer: Answer) -> None:
        """Correct, measure, and mix the corrections of the last rounds."""
        assert isinstance(window, _Accelerated)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if window.batch.recurrence.replays:
                measured = window.measure(answer.take())
                window.correct(self.slopes(window, None), measured)
                corrections = window.measure_corrections()
            else:
                # The slopes do not depend on the outputs: the corrections can be measured with everything else.
                window.correct(self.slopes(window, None))
                measured = window.measure(answer.take())
                window.norms(measured)
                corrections = measured.corrections
            count = self.accept(window, measured)
            if window.history > 1:
                window.mix(self._factors(corrections, window, count))
        window.move(count, self.entry)

    def _factors(self, gram: Array, window: _Accelerated, count: Indices) -> Array:
        """Return (S, W, m) factors of the last rounds in the next states: plain up to ``count``, then accelerated."""
        state = window.steps[..., None] + 1
        low = np.concatenate([window.lo[:, None], window.spans[:, 0]], 1)[:, None]
        high = np.concatenate([window.hi[:, None], window.spans[:, 1]], 1)[:, None]
        # Difference a is valid for a state that was in the window in both of its rounds.
        inside = (state > low) & (state <= high)
        valid = np.logical_and.accumulate(inside[..., 1:] & inside[..., :-1], axis=2) & ~window.coarse[:, None, None]
        weights = self._weights(gram, valid)
        weights[np.arange(window.W) < count[:, None]] = 0.0
        factors = np.zeros((*weights.shape[:2], window.history))
        factors[..., 0] = 1.0
        # x = N_0 - sum_a gamma_a (N_a - N_{a+1})
        factors[..., :-1] -= weights
        factors[..., 1:] += weights
        return factors

    def _weights(self, gram: Array, valid: NDArray[np.bool_]) -> Array:
        """Return gamma (S, W, h) from the inner products of the last corrections, (S, W, h + 1, h + 1)."""
        size = valid.shape[2]
        difference = np.eye(size, size + 1) - np.eye(size, size + 1, 1)
        gram = np.where(np.isfinite(gram).all((2, 3), keepdims=True), gram, 0.0)
        left = np.where(valid[..., :, None] & valid[..., None, :], difference @ gram @ difference.T, 0.0)
        right = np.where(valid, (difference @ gram)[..., 0], 0.0)
        left_sum, right_sum = np.cumsum(left, axis=1), np.cumsum(right, axis=1)
        if self.acceleration in ("anderson", "prefix"):
            left_sum = np.broadcast_to(left_sum[:, -1:], left_sum.shape)
        if self.acceleration == "anderson":
            right_sum = np.broadcast_to(right_sum[:, -1:], right_sum.shape)
        diagonal = np.trace(left_sum, axis1=2, axis2=3)[..., None, None] / size
        ridge = self.ridge if self.absolute else self.ridge * diagonal
        system = left_sum + ridge * np.eye(size)
        # A slot without a valid difference gets the unit equation gamma = 0.
        empty = ~valid | (np.diagonal(system, axis1=2, axis2=3) <= 0)
        system = np.where(empty[..., :, None] | empty[..., None, :], np.eye(size), system)
        weights = np.linalg.solve(system, np.where(empty, 0.0, right_sum)[..., None])[..., 0]
        return np.where(np.isfinite(weights), weights, 0.0)


def _frozen_growth(coefficients: Coefficients) -> Array:
    """Return J of a frozen noise prediction in the network's input: alpha'/alpha, or A where alpha may be 0."""
    if coefficients.alpha is None or coefficients.sigma is None or coefficients.scale is None:
        return coefficients.state_weight
    if not np.allclose(coefficients.alpha**2 + coefficients.sigma**2, 1):
        return coefficients.state_weight
    alpha = coefficients.alpha * coefficients.scale
    return np.asarray(alpha[1:] / alpha[:-1])


class _AcceleratedTensors(WindowTensors):
    """Tensors of windows that keep guess and correction of the last rounds, moved along: old1, new1, old2, .."""

    def regions(self) -> dict[str, int]:
        # The corrections of earlier rounds lie behind the residuals, whose place those of this round take.
        earlier = {f"{kind}{age}": self.width for kind in ("correction", "new") for age in range(1, self.history)}
        return super().regions() | earlier

    def numbers(self) -> dict[str, tuple[int, ...]]:
        return {**super().numbers(), **{f"mix{age}": (self.count, self.width, 1) for age in range(self.history)}}

    def indices(self) -> dict[str, tuple[int, ...]]:
        return {**super().indices(), "shift_history": (self.count, self.width)}

    def measured_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.count, self.width, self.history, self.history) if self.history > 1 else (0,)
        return {**super().measured_shapes(), "corrections": shape}

    def look(self) -> None:
        super().look()
        length, dim, m = self.count * self.width, self.all.shape[1], self.history
        first = self.first["r"]
        self.corrections = self.all[first : first + m * length].view(m, length, dim).transpose(0, 1)
        self.corrections_transposed = self.corrections.mT
        self.older = [self.view(f"new{age}") for age in range(1, m)]
        if m > 1:
            self.correction_products = self.pieces["corrections"].view(-1, m, m)

    def measure_residuals(self) -> None:
        """Measure the residuals, and the corrections that follow from them."""
        super().measure_residuals()
        self.r.nan_to_num_(0.0, 0.0, 0.0)  # an overflow must not reach the states before it
        super().correct()
        self.measure_corrections()

    def correct(self) -> None:
        """Do nothing: the corrected states are there since they were measured."""

    def measure_corrections(self) -> None:
        """Take the inner products of the corrections of the last rounds, (S, W, m, m)."""
        if self.history > 1:
            torch.sub(self.step, self.targets, out=self.r)
            torch.bmm(self.corrections, self.corrections_transposed, out=self.correction_products)

    def move(self, *, enter: bool) -> Tensor | None:
        """Mix the corrections, and move what is kept of them."""
        if self.history > 1:
            sent = self.pack.tensors
            for age in range(self.history - 1, 0, -1):
                self._shift("r" if age == 1 else f"correction{age - 1}", f"correction{age}")
            # The corrections of this round are kept now: their place is free.
            mixed = torch.mul(self.step, sent["mix0"], out=self.r)
            for age, states in enumerate(self.older, 1):
                mixed.addcmul_(states, sent[f"mix{age}"])
            for age in range(self.history - 1, 0, -1):
                self._shift("step" if age == 1 else f"new{age - 1}", f"new{age}")
            self.step.copy_(mixed)
        return super().move(enter=enter)

    def _shift(self, source: str, target: str) -> None:
        """Move states lo + 1 .. lo + W with their windows into the place of older ones."""
        index = self.pack.tensors["shift_history"]
        torch.index_select(self.flat[source], 0, index, out=self.flat[target])


class _Accelerated(Window):
    """Windows that combine the corrections of the last rounds."""

    tensors_type: type[WindowTensors] = _AcceleratedTensors
    STATES: ClassVar[dict[str, Any]] = {**Window.STATES, "spans": 0.0}

    def correct(self, slopes: Array, measured: Measured | None = None) -> None:
        """Take the slopes, which are known before anything is measured."""
        super().correct(slopes, measured)
        self.frame_sent = False  # they are sent with what the measurement needs

    def seat(self, places: Indices, tensors: WindowTensors) -> None:
        """Begin anew with the samples at these places."""
        super().seat(places, tensors)
        self.spans = np.zeros((len(places), 2, self.history - 1))  # lo and hi of the rounds kept, the latest first

    def measure_corrections(self) -> Array:
        """Return the inner products of the corrections by a read of their own."""
        self.tensors.measure_corrections()  # type: ignore[attr-defined]
        return read(self.tensors.pieces["corrections"])

    def mix(self, factors: Array) -> None:
        """Take the factors (S, W, m) of the last rounds in the next states."""
        for age in range(self.history):
            self.pack.numbers[f"mix{age}"][..., 0] = factors[..., age]

    def move(self, count: Indices, entry: str) -> None:
        """Accept states and move, with what is kept of the last rounds."""
        # State lo + 1 + j of the window comes from what lies count further on; behind the end it has no history.
        source = np.minimum(count[:, None] + self.offset[:-1], np.maximum(self.width - 1, 0)[:, None])
        np.add(self.rows[:, None] * self.W, source, out=self.pack.indices["shift_history"])
        # Rounds on interpolated outputs begin a new history.
        now = np.stack([self.lo, self.hi], 1)[..., None]
        before = np.where(self.coarse[:, None, None], 0, self.spans)
        self.spans = np.concatenate([now, before], 2)[..., : self.history - 1]
        super().move(count, entry)


class _ReplayedTensors(_AcceleratedTensors):
    """The same where a pass of the loop puts the corrected states in place."""

    def measure_residuals(self) -> None:
        """Do nothing: residuals are not known."""


class _ReplayedAccelerated(_Accelerated, ReplayedWindow):
    """The same over a loop that has no recurrence."""

    tensors_type = _ReplayedTensors

    def correct(self, slopes: Array, measured: Measured | None = None) -> None:
        """Run one pass of the loop."""
        ReplayedWindow.correct(self, slopes, measured)
