"""Picard iteration over a sliding window: ParaDiGMS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..engine.solve import Asking, Problem
from ..samplers.coefficients import Coefficients
from .window import Window, check_window

__all__ = ["Picard", "noise_variance"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Picard:
    """Picard iteration (ParaDiGMS, 2305.16317): x_{j+1} = x_j + (increments of the present guess).

    In the coordinates in which the state keeps its size, every step is assumed to carry an error on unchanged,
    J_i = 1. With ``rule="paradigms"`` and ``entry="copy"`` this is the published algorithm: state j is accepted while
    |new_j - old_j|^2 <= threshold^2 dim v_j, v_j the variance of DDPM's noise at that step, and the first state that
    fails is taken too. By default states are accepted while their estimated effect on the sample fits in the
    tolerance, and states that enter the window roll on from its end, along the line of its outputs (where steps add
    noise, with the last data prediction held), instead of copying it.

    Attributes:
        window: Levels evaluated in a round; None for all.
        rule: ``error`` (the tolerance bounds the relative error of the sample) or ``paradigms``.
        threshold: tau of the published rule; the tolerance is then not used.
        entry: How states enter the window: ``extrapolate`` or ``copy``.
    """

    window: int | None = None
    rule: Literal["error", "paradigms"] = "error"
    threshold: float = 0.1
    entry: Literal["extrapolate", "copy"] = "extrapolate"

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.rule not in ("error", "paradigms"):
            raise ValueError(f"rule must be 'error' or 'paradigms', got {self.rule!r}.")
        if self.entry not in ("extrapolate", "copy"):
            raise ValueError(f"entry must be 'extrapolate' or 'copy', got {self.entry!r}.")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold!r}.")

    def refuses(self, local: Coefficients) -> str | None:
        """Refuse the published rule where the variance of the noise is unknown."""
        if self.rule == "paradigms" and (local.alpha is None or local.sigma is None):
            return "rule='paradigms' compares with alpha and sigma, unknown for this table: use rule='error'."
        return None

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory."""
        local = problem.coefficients
        window = Window(problem, self.window)
        slopes = local.slopes(local.rms[1:] / local.rms[:-1])
        variance = noise_variance(local) if self.rule == "paradigms" else None
        yield from window.open()
        while not window.done:
            lo, hi = window.lo, window.hi
            [norms] = yield from window.evaluate(window.response(slopes[lo:hi]))
            norms = yield from window.checked(norms)
            window.turn()
            errors = window.errors(norms, slopes[lo:hi])
            passed = None
            if variance is not None:  # NaN never passes
                passed = norms[:, 0] <= self.threshold**2 * problem.dim * variance[lo + 1 : hi + 1]
            count = window.accept(errors, passed)
            yield from window.settle(count, float(errors[count - 1]))
            yield from window.enter(roll=self.entry == "extrapolate")
        return window.sample()


def noise_variance(local: Coefficients) -> Array:
    """Return (N + 1,) v_j: the variance of the noise with which DDPM reaches state j, in the network's input."""
    assert local.alpha is not None
    assert local.sigma is not None
    assert local.scale is not None
    alpha, sigma = local.alpha, local.sigma
    kept = sigma[1:] * alpha[:-1] / alpha[1:]
    deviation = sigma[1:] / sigma[:-1] * np.sqrt(np.maximum(sigma[:-1] ** 2 - kept**2, 0))
    return np.append(0.0, (deviation * local.scale[1:]) ** 2)
