r"""Coarse to fine in time: the first rounds evaluate fewer steps.

While the trajectory is far from the solution, its outputs need not be known everywhere. A round of stride s evaluates
every s-th step of the window (the first and the last among them); between them the data prediction is interpolated
linearly in log(alpha/sigma), and every step is taken with its own coefficients and its own noise. The following rounds
shrink s. Only rounds of stride 1 accept states (except the first of the window, which is exact whatever the rest is),
so the sample is the same and only the number of evaluations is less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..checks import is_int
from ..samplers.coefficients import Coefficients
from .base import Queries
from .batch import Batch
from .secant import Secant
from .windowed import Windowed

__all__ = ["CoarseToFine"]


@dataclass(frozen=True)
class CoarseToFine:
    """Another windowed solver whose first rounds evaluate fewer steps: a full window for fewer evaluations.

    Attributes:
        inner: A solver with a window.
        strides: How many steps apart the evaluations of the first rounds are, each at least 1.
    """

    inner: Windowed = field(default_factory=Secant)
    strides: tuple[int, ...] = (8, 8, 4, 4, 2, 2)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Windowed):
            raise ValueError(f"inner must be a solver with a window (picard, anderson, secant), got {self.inner!r}.")
        if not self.strides or not all(map(is_int, self.strides)):
            raise ValueError(f"strides must be whole numbers of at least 1, one at least, got {self.strides!r}.")

    @property
    def window(self) -> int | None:
        """Steps that a round reaches over."""
        return self.inner.window

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Return what the inner solver does not support."""
        return self.inner.unsupported(coefficients)

    def solve(self, batch: Batch) -> Queries:
        """Solve the samples of a batch."""
        batch.problem = dataclasses.replace(batch.problem, strides=self.strides)
        return self.inner.solve(batch)
