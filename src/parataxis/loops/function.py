"""A function that runs a sampling loop, made parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..solvers.base import Solver
from .loop import Loop, reachable
from .report import Report
from .solver import solve_loop

if TYPE_CHECKING:
    from ..engine.distributed.ranks import Ranks

__all__ = ["Parallel"]


class Parallel:
    """A function that runs a sampling loop, parallel in time; ``report`` says how the latest call went."""

    def __init__(
        self,
        function: Callable[..., Any],
        solver: Solver,
        tolerance: float,
        denoisers: tuple[nn.Module, ...] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """See :func:`parallel`."""
        functools.update_wrapper(self, function, updated=())
        self.function, self.solver, self.tolerance = function, solver, tolerance
        self.report = Report()
        self._denoisers = denoisers
        self._ranks = ranks
        self.loop: Loop | None = None  # what is kept from call to call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop."""
        found = self._denoisers
        modules = _modules(self.function, args, kwargs)
        if found is None:
            if len(modules) != 1:
                raise ValueError(
                    f"the loop {self.function!r} can see {len(modules)} modules, and which it calls level by level is "
                    "not clear: name them with denoisers=[...]."
                )
            found = (modules[0],)
        others = tuple((module, "__call__") for module in modules if not any(module is one for one in found))
        loop = self.loop
        if loop is None or loop.denoisers != found or loop.memoized != others:

            def run(args: tuple[Any, ...], kwargs: dict[str, Any], quiet: bool) -> Any:
                return self.function(*args, **kwargs)

            loop = self.loop = Loop(run, found, others, ranks=self._ranks)
        return solve_loop(loop, args, kwargs, self.solver, self.tolerance, self.report)


def _modules(function: Callable[..., Any], args: Any, kwargs: Any) -> list[nn.Module]:
    """Return the outermost modules that a function can see."""
    found: list[nn.Module] = []
    for value in reachable(function, args, kwargs):
        if isinstance(value, nn.Module) and not any(value is one for one in found):
            found.append(value)
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]
