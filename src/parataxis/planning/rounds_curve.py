r"""How many rounds a windowed solver takes, as fitted to runs on the shipped models and on exact mixtures.

Forecasts of the rounds R and of the evaluations n_k of round k are good enough to choose by (``benchmarks/curves.py``).
With N steps and a window of W of them,

    ln R = c0 + c1 x + c2 x^2 + c3 t + c4 x t + c5 n,   x = ln(W/N), t = log10(100 tolerance), n = ln(N/100)
    n_k = min(W, N - accepted_k),   accepted_k = N (k/R)^g
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..samplers.coefficients import Coefficients
from ..solvers.base import Solver

__all__ = ["CURVES", "RoundsCurve", "features", "fitted", "kind_of"]

Array = NDArray[np.float64]
CURVES = Path(__file__).parent / "rounds_curve.json"


def features(steps: ArrayLike, window: ArrayLike, tolerance: ArrayLike) -> Array:
    """Return (.., 6) the terms 1, x, x^2, t, x t, n of the logarithm of the rounds; see the module."""
    x = np.log(np.divide(window, steps))
    t = np.log10(np.maximum(tolerance, 1e-9)) + 2
    return np.stack([np.ones_like(x), x, x**2, t, x * t, np.log(np.divide(steps, 100))], -1)


@dataclass(frozen=True)
class RoundsCurve:
    """The rounds that a windowed solver takes for one kind of sampler, as fitted by ``benchmarks/curves.py``.

    Attributes:
        coefficients: (6,) of :func:`features`.
        spread: Standard deviation of ln R among the samples of one network.
        between: Standard deviation of ln R among networks.
        acceptance: g, by which steps are accepted faster towards the end.
    """

    coefficients: tuple[float, ...]
    spread: float
    between: float
    acceptance: float

    @classmethod
    def load(cls, solver: Solver, local: Coefficients) -> RoundsCurve:
        """Return the curve of a solver with default options for samplers whose steps add noise, or do not.

        Raises:
            ValueError: For other solvers or options.
        """
        kind = kind_of(local)
        known = {name: curves[kind] for name, curves in fitted()["curves"].items() if kind in curves}
        curve = known.get(type(solver).__name__)
        options = [field for field in fields(solver) if field.name != "window"]  # type: ignore[arg-type]
        if curve is None or any(getattr(solver, field.name) != field.default for field in options):
            raise ValueError(
                f"there is no forecast for {solver!r}: plan with {', '.join(known)} and their default options, or "
                "sample with this solver without a plan."
            )
        return cls(**{**curve, "coefficients": tuple(curve["coefficients"])})

    def rounds(self, steps: int, window: int, tolerance: float) -> float:
        """Return the rounds of the median case."""
        expected = math.exp(features(steps, window, tolerance) @ np.array(self.coefficients))
        return min(max(expected, steps / window), float(steps))

    def widths(self, rounds: Array, steps: int, window: int) -> Array:
        """Return (largest of rounds, samples) the steps evaluated in every round, of samples with these rounds."""
        k = np.arange(int(rounds.max()))[:, None]
        accepted = steps * np.minimum(k / rounds, 1.0) ** self.acceptance
        return np.where(k < rounds, np.clip(np.ceil(steps - accepted), 1, window), 0.0)


@cache
def fitted() -> Any:
    """Return what ``benchmarks/curves.py`` has written: curves, and what they were fitted to."""
    return json.loads(CURVES.read_text())


def kind_of(local: Coefficients) -> str:
    """Return which curves a sampler has: whether its steps add noise."""
    return "sde" if local.noise_std.any() else "ode"
