"""Picard iteration over a sliding window: ParaDiGMS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..samplers.coefficients import Coefficients
from .window import Measured, Window, check_window
from .windowed import Windowed

__all__ = ["Picard", "noise_variance"]


@dataclass(frozen=True)
class Picard(Windowed):
    """Picard iteration (ParaDiGMS, 2305.16317): x_{j+1} = x_j + (increments of the present guess).

    In the coordinates in which the state keeps its rms, every step is assumed to carry an error on unchanged, J_i = 1.
    With ``rule="paradigms"`` and ``entry="copy"`` this is the published algorithm: state j is accepted while
    |new_j - old_j|^2 <= threshold^2 dim v_j, v_j the variance of DDPM's noise at that step, and the first state that
    fails is accepted too. By default states are accepted while their estimated effect on the sample fits in the
    tolerance, and states that enter the window continue the line of its outputs (where steps add noise, the last data
    prediction is frozen) instead of copying its end.

    Attributes:
        window: Steps evaluated in a round; None for all.
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

    def slopes(self, window: Window, measured: Measured) -> Array:
        """Return the slopes for which each step has the growth of the expected rms."""
        return window.slopes_for_growth(window.rms_ratio)

    def passed(self, window: Window) -> NDArray[np.bool_] | None:
        """Return (S, W) which states pass the published test; NaN never does."""
        if self.rule == "error":
            return None
        variance = noise_variance(window.problem.coefficients)
        state = np.minimum(window.steps + 1, window.problem.steps)
        return np.asarray(window.moves**2 <= self.threshold**2 * window.problem.dim * variance[state])

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """The published rule needs the variance of the noise."""
        if self.rule == "paradigms" and (coefficients.alpha is None or coefficients.sigma is None):
            return "rule='paradigms' compares with alpha and sigma, unknown for this sampler: use rule='error'."
        return None


def noise_variance(coefficients: Coefficients) -> Array:
    """Return (N + 1,) v_j: the variance of the noise with which DDPM reaches state j, in the network's input."""
    assert coefficients.alpha is not None
    assert coefficients.sigma is not None
    assert coefficients.scale is not None
    alpha, sigma = coefficients.alpha, coefficients.sigma
    frozen = sigma[1:] * alpha[:-1] / alpha[1:]
    deviation = sigma[1:] / sigma[:-1] * np.sqrt(np.maximum(sigma[:-1] ** 2 - frozen**2, 0))
    return np.append(0.0, (deviation * coefficients.scale[1:]) ** 2)
