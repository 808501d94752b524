"""The sequential loop: one level after another. What every other solver is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.solve import Asking, Problem
from ..samplers.coefficients import Coefficients
from .window import Window

__all__ = ["Sequential"]


@dataclass(frozen=True)
class Sequential:
    """Forward substitution: x_{i+1} = step_i(x), N rounds of one level each."""

    def refuses(self, local: Coefficients) -> str | None:
        """Every table can be solved."""
        return None

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory."""
        window = Window(problem, 1)
        yield from window.open()
        while not window.done:
            [norms] = yield from window.evaluate(window.response(np.zeros(1)))
            yield from window.checked(norms)
            window.turn()
            yield from window.settle(1, 0.0)
            yield from window.enter(roll=False)
        return window.sample()
