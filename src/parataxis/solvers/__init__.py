"""Solvers: one method a file, all registered here."""

from __future__ import annotations

import difflib
from typing import Any

from ..checks import check_solver
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
    "as_solver",
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


def as_solver(solver: Any) -> Solver:
    """Return a solver: this one, the one of this name with its default options, or for None ``Secant(window=8)``.

    Raises:
        TypeError: If it is neither a solver nor a name.
        ValueError: If there is no solver of this name, with the nearest one.
    """
    if solver is None:
        return Secant(window=8)
    if isinstance(solver, str):
        known = {**SOLVERS, **EXACT_IN_DISTRIBUTION}
        if solver not in known:
            near = difflib.get_close_matches(solver, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no solver {solver!r}.{hint} Choose one of {', '.join(known)}.")
        return known[solver]()
    check_solver(solver)
    made: Solver = solver
    return made
