"""Solvers: one method a file, all registered here."""

from __future__ import annotations

from ..engine.solve import Solver
from .anderson import Anderson
from .nested import Nested
from .parareal import Parareal
from .picard import Picard
from .secant import Secant
from .sequential import Sequential
from .speculative import Speculative

__all__ = ["LAW_EXACT", "SOLVERS", "Anderson", "Nested", "Parareal", "Picard", "Secant", "Sequential", "Speculative"]

SOLVERS: dict[str, type[Solver]] = {
    "sequential": Sequential,
    "picard": Picard,
    "anderson": Anderson,
    "parareal": Parareal,
    "secant": Secant,
    "nested": Nested,
}

# Exact in law: a sample as good as the sequential one, but not the same.
LAW_EXACT: dict[str, type[Solver]] = {
    "speculative": Speculative,
}
