"""Early stopping: after a number of rounds, or when a preview no longer changes visibly.

Each is a callable for ``stop=`` of :func:`parataxis.sample`; :attr:`parataxis.Solution.reason` then says ``stopped:``
and its name. The result is the present estimate of the sample, without an error estimate.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from .engine.run import Run

__all__ = ["error_below", "preview_settled", "rounds"]


@dataclass(frozen=True)
class rounds:
    """Stop after so many rounds."""

    limit: int

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"rounds must be at least 1, got {self.limit!r}.")

    def __call__(self, run: Run) -> bool:
        """Return whether the run has made so many rounds."""
        return run.rounds >= self.limit


@dataclass(frozen=True)
class error_below:
    """Stop when the sample would change by less than this, relative, between two rounds: |x_r - x_{r-1}| / |x_r|."""

    bound: float
    _last: MutableMapping[Run, Tensor] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"the bound must be positive, got {self.bound!r}.")

    def __reduce__(self) -> tuple[type, tuple[float]]:
        """Pickle the rule, without the runs that it has seen."""
        return type(self), (self.bound,)

    def __call__(self, run: Run) -> bool:
        """Return whether the estimate of the sample has changed by less than the bound."""
        estimate = run.estimate
        before = self._last.get(run)
        self._last[run] = estimate
        return before is not None and float((estimate - before).norm()) <= self.bound * float(estimate.norm())


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class preview_settled:
    """Stop when two previews in a row differ from the one before by at least ``psnr`` dB (early stopping of ParaTAA).

    PSNR = 10 log10(peak^2 / mean squared difference). Early previews can stand still before the sample has formed, so
    a difference counts only when the estimate itself changed less than in the round before.

    Attributes:
        decode: From an estimate (*shape) to an image; the identity for pixel models.
        psnr: Decibels; at 40 a difference is hardly visible.
        peak: Range of the preview's values; 2 for [-1, 1].
    """

    decode: Callable[[Tensor], Tensor] = _same
    psnr: float = 40.0
    peak: float = 2.0
    _seen: MutableMapping[Run, tuple[Tensor, Tensor, float, int]] = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[type, tuple[Callable[[Tensor], Tensor], float, float]]:
        """Pickle the rule, without the runs that it has seen."""
        return type(self), (self.decode, self.psnr, self.peak)

    def __call__(self, run: Run) -> bool:
        """Return whether the preview has stopped changing."""
        estimate = run.estimate
        preview = self.decode(estimate).float()
        change, streak = float("inf"), 0
        if run in self._seen:
            last, picture, previous, streak = self._seen[run]
            change = float((estimate - last).norm())
            error = float((preview - picture).square().mean())
            quiet = error <= self.peak**2 * 10 ** (-self.psnr / 10)
            streak = streak + 1 if quiet and change <= previous else 0
        self._seen[run] = (estimate, preview, change, streak)
        return streak >= 2
