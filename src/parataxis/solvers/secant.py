r"""A quasi-Newton solver: the slope of each output is measured, one scalar a step.

The response needs d_i, how an output moves with its input. The first evaluation of a point measures it from the
origin, d = <f, u> / <u, u>, which is right for a network that is linear there (Gaussian data, whatever the schedule);
later ones by a secant, d = <f - f', u - u'> / |u - u'|^2 with the evaluation of the round before. Neither depends on
the prediction type or on the scale of the states, and no knowledge of the schedule is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..engine.solve import Asking, Inner, Problem
from ..samplers.coefficients import Coefficients
from .window import Window, check_window

__all__ = ["Secant"]

Array = NDArray[np.float64]
LARGEST = 1.3  # of a step's growth, relative to the expected size of its states


@dataclass(frozen=True)
class Secant:
    """Quasi-Newton correction with measured slopes.

    Each step's growth J = A + B d is kept in [0, 1.3] of the ratio of expected sizes; a slope that is not finite is
    replaced by the moment-matched one; a point whose input hardly moved keeps its slope. At most N rounds are needed,
    as the first state of the window never depends on a slope.

    Attributes:
        window: Levels evaluated in a round; None for all.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        check_window(self.window)

    def refuses(self, local: Coefficients) -> str | None:
        """Every table can be solved."""
        return None

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory."""
        local = problem.coefficients
        window = Window(problem, self.window, previous=True)
        slopes = np.full(problem.steps, np.nan)
        seen = 0
        yield from window.open()
        while not window.done:
            lo, hi = window.lo, window.hi
            old = min(max(seen, lo), hi)
            response = window.response()
            secant, origin, gram = yield from window.evaluate(*_pairs(window, old), response)
            slopes[lo:hi] = _measured(window, slopes[lo:hi], secant, origin)
            slopes[lo:hi] = local.slopes(_bounded(window, slopes[lo:hi]), lo)
            norms = yield from window.checked((yield response._replace(slopes=slopes[lo:hi], gram=gram)))
            window.turn()
            errors = window.errors(norms, slopes[lo:hi])
            count = window.accept(errors)
            yield from window.settle(count, float(errors[count - 1]))
            seen = lo if window.coarse else hi
            yield from window.enter()
        return window.sample()


def _pairs(window: Window, old: int) -> tuple[Inner, Inner]:
    """Ask for what slopes are made of: moves of points before ``old`` since the last round, and points from there on.

    Both questions are asked even of no points: runs that ask the same are answered together.
    """
    lo, hi = window.lo, window.hi
    moves = Inner(
        (window.outputs(lo, old), window.states(lo, old - 1)),
        (window.outputs(lo, old, 1), window.states(lo, old - 1, 1)),
    )
    return moves, Inner((window.outputs(old, hi), window.states(old, hi - 1)))


def _measured(window: Window, known: Array, secant: Array, origin: Array) -> Array:
    """Return the slopes of the window's points: secants, and from the origin behind them."""
    lo, old, hi, problem = window.lo, window.lo + len(secant), window.hi, window.problem
    found = known.copy()
    moved = secant[:, 1, 1] > (10 * problem.rounding * window.coefficients.rms[lo:old]) ** 2 * problem.dim
    with np.errstate(divide="ignore", invalid="ignore"):
        found[: old - lo] = np.where(moved, secant[:, 0, 1] / secant[:, 1, 1], found[: old - lo])
        found[old - lo :] = origin[:, 0, 1] / origin[:, 1, 1]
    matched = window.coefficients.gaussian_slopes(window.variance)[lo:hi]
    # An output whose square overflows tells nothing either.
    measured = np.isfinite(found) & window.finite & (not window.coarse)
    measured &= np.isfinite(np.append(secant[:, 0, 0], origin[:, 0, 0]))
    return np.where(measured, found, matched)


def _bounded(window: Window, slopes: Array) -> Array:
    size = window.coefficients.rms[window.lo : window.hi + 1]
    growth = window.coefficients.growth(slopes, window.lo)
    return np.clip(growth, 0.0, LARGEST * size[1:] / size[:-1])
