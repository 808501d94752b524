r"""Nested nodes: coarse to fine in time.

While the trajectory is far from the solution, its outputs need not be known everywhere. A round of stride s evaluates
every s-th point of the window (the first and the last among them); between them the data prediction is interpolated
linearly in log(alpha/sigma), and every step is taken with its own coefficients and its own noise. The following
rounds shrink s. Only rounds of stride 1 settle states (but for the first of the window, which is exact whatever the
rest), so the sample is the same and only the work is less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..engine.solve import Asking, Problem, Solver
from ..samplers.coefficients import Coefficients
from .secant import Secant

__all__ = ["CoarseToFine"]


@dataclass(frozen=True)
class CoarseToFine:
    """Another windowed solver whose first rounds evaluate fewer points: a full window for less work.

    Attributes:
        inner: A solver with a window.
        strides: How many points apart the evaluations of the first rounds are, each at least 1.
    """

    inner: Solver = field(default_factory=Secant)
    strides: tuple[int, ...] = (8, 8, 4, 4, 2, 2)

    def __post_init__(self) -> None:
        if not hasattr(self.inner, "window"):
            raise ValueError(f"inner must be a solver with a window (picard, anderson, secant), got {self.inner!r}.")
        whole = [isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in self.strides]
        if not whole or not all(whole):
            raise ValueError(f"strides must be whole numbers of at least 1, one at least, got {self.strides!r}.")

    @property
    def window(self) -> int | None:
        """Levels that a round reaches over."""
        window: int | None = getattr(self.inner, "window", None)
        return window

    def refuses(self, local: Coefficients) -> str | None:
        """Refuse what the solver refuses."""
        return self.inner.refuses(local)

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory."""
        return self.inner(dataclasses.replace(problem, strides=self.strides))
