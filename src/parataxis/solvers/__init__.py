"""Solvers: one method a file, all registered here."""

from __future__ import annotations

from .anderson import Anderson
from .base import Solver
from .coarse_to_fine import CoarseToFine
from .parareal import Parareal
from .picard import Picard
from .secant import Secant
from .sequential import Sequential
from .speculative import Speculative
from .window import Measured, Window
from .windowed import Windowed

__all__ = [
    "EXACT_IN_DISTRIBUTION",
    "SOLVERS",
    "Anderson",
    "CoarseToFine",
    "Measured",
    "Parareal",
    "Picard",
    "Secant",
    "Sequential",
    "Speculative",
    "Window",
    "Windowed",
]

SOLVERS: dict[str, type[Solver]] = {
    "sequential": Sequential,
    "picard": Picard,
    "anderson": Anderson,
    "parareal": Parareal,
    "secant": Secant,
    "coarse_to_fine": CoarseToFine,
}

# A sample from the same distribution as the sequential one, but another sample.
EXACT_IN_DISTRIBUTION: dict[str, type[Solver]] = {
    "speculative": Speculative,
}
