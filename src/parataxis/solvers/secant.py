r"""A quasi-Newton solver: the slope of each output is measured, one scalar a step.

    d_i = <f - f', u - u'> / |u - u'|^2

u' and f' are input and output of the evaluation before. A step that is evaluated for the first time has none, and the
origin u' = f' = 0 takes their place: d = <f, u> / <u, u>, which is right for a network that is linear there (Gaussian
data, whatever the schedule). Neither depends on the prediction type or on the scale of the states, and no knowledge of
the schedule is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from .window import Measured, Window, check_window
from .windowed import Windowed

__all__ = ["Secant"]

MAX_GROWTH = 1.3  # of a step, relative to the expected rms of its states: larger slopes are noise of the measurement


@dataclass(frozen=True)
class Secant(Windowed):
    """Quasi-Newton correction with measured slopes.

    Each step's growth J = A + B d is kept in [0, 1.3] of the ratio of expected rms; a slope that is not finite is
    replaced by the one of the exact network for Gaussian data; a step whose input hardly moved keeps its slope. At most
    N rounds are needed, as the first state of the window never depends on a slope.

    Attributes:
        window: Steps evaluated in a round; None for all.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        check_window(self.window)

    def slopes(self, window: Window, measured: Measured) -> Array:
        """Return secants, and slopes from the origin for steps that are new."""
        if window.W == 1:  # the first state does not depend on a slope
            return np.zeros_like(window.a)
        pairs = measured.pairs
        dx_dx, df_dx = pairs[..., 0, 0], pairs[..., 0, 1]
        rounding = window.errors.smallest_move * window.rms
        moved = ~window.evaluated | (dx_dx > rounding * rounding)
        slopes = np.where(moved, df_dx / dx_dx, window.slopes)
        # An output whose square overflows says nothing either.
        known = np.isfinite(slopes) & np.isfinite(pairs[..., 1, 1])
        if measured.finite is not None:
            known &= measured.finite
        if window.strided:
            known &= ~window.coarse[:, None]
        if not known.all():
            slopes = np.where(known, slopes, window.gaussian_slopes())
        growth = window.growth(slopes)
        return window.slopes_for_growth(np.minimum(np.maximum(growth, 0.0), MAX_GROWTH * window.rms_ratio))
