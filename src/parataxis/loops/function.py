"""A function that runs a sampling loop, made parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.executor import row_limits
from ..fingerprint import loop_fingerprint
from ..progress import reported
from ..solvers.base import Solver
from .auto import plan_loop, run_loop
from .loop import Loop, reachable
from .report import Report
from .schedulers import schedulers_in, writes_past_versions

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..engine.distributed.ranks import Ranks
    from ..planning import Plan

__all__ = ["Parallel"]


class Parallel:
    """A function that runs a sampling loop, parallel in time.

    Attributes:
        function: The unmodified one.
        solver: How the loop is solved.
        tolerance: Relative error allowed.
        report: How the latest call went.
        loop: What is kept of the loop from call to call.
        calibration: Compared at every call, and reported by; None without.
        progress: Whether a bar shows the accepted steps.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        solver: Solver | str,
        tolerance: float,
        denoisers: tuple[nn.Module, ...] | None = None,
        ranks: Ranks | None = None,
        *,
        max_rows: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        """See :func:`parallel`."""
        functools.update_wrapper(self, function, updated=())
        self._limit, self._buckets = row_limits(max_rows, buckets)
        self.function, self.solver, self.tolerance = function, solver, tolerance
        self.report = Report()
        self._denoisers = denoisers
        self._ranks = ranks
        self.loop: Loop | None = None
        self.calibration: Calibration | None = None
        self.progress = False

    def __repr__(self) -> str:
        """Return what is solved, and how."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"Parallel({name}, {self.solver!r}, tolerance={self.tolerance:g})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop."""
        loop = self._current(args, kwargs)
        if self.calibration is not None:
            self.calibration.check(loop_fingerprint(self.function, args, kwargs))
        name = getattr(self.function, "__name__", type(self.function).__name__)
        with reported(loop, name, self.report, self.calibration, bar=self.progress):
            return run_loop(loop, args, kwargs, self.solver, self.tolerance, self.report)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Return the plan of a call with these arguments; see :func:`parataxis.plan`."""
        return plan_loop(self._current(args, kwargs), args, kwargs, self.tolerance)

    def _current(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Loop:
        """Return the loop; a new one if it calls other modules than before."""
        denoisers = self._denoisers
        modules = _modules(self.function, args, kwargs)
        if denoisers is None:
            if len(modules) != 1:
                raise ValueError(
                    f"found {len(modules)} modules in the loop {self.function!r}; pass the one that it calls at every "
                    "step: denoisers=[...]."
                )
            denoisers = (modules[0],)
        # A module around a denoiser (a preconditioning) belongs to the loop.
        wrappers = [m for m in modules if any(part is denoiser for part in m.modules() for denoiser in denoisers)]
        others = tuple((module, "__call__") for module in modules if not _contains(wrappers, module))
        loop = self.loop
        if loop is None or loop.denoisers != denoisers or loop.memoized != others:

            def run(args: tuple[Any, ...], kwargs: dict[str, Any], quiet: bool) -> Any:
                return self.function(*args, **kwargs)

            owner = (_name(self.function), self.function)
            loop = self.loop = Loop(
                run,
                denoisers,
                others,
                limit=self._limit,
                buckets=self._buckets,
                schedulers=self._schedulers,
                ranks=self._ranks,
                owner=owner,
                unsupported=partial(_unsupported, denoisers),
            )
        return loop

    def _schedulers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the schedulers that it can see, to run it in one pass; none where it may write past versions.

        What is written through ``.data`` leaves no trace in a parameter; passes of a recorded loop watch every write.
        """
        values = list(reachable(self.function, args, kwargs))
        return [] if writes_past_versions(values) else schedulers_in(values)


def _name(function: Callable[..., Any]) -> str:
    """Return how messages name a function: methods by their owner."""
    name = getattr(function, "__name__", type(function).__name__)
    return f"self.{name}" if isinstance(function, MethodType) else name


def _unsupported(denoisers: Sequence[nn.Module]) -> str | None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in denoisers):
        return (
            "its denoiser is a TorchScript module, whose calls cannot be taken over: pass a module whose forward calls "
            "it, and let the loop call that one."
        )
    return None


def _modules(function: Callable[..., Any], args: Any, kwargs: Any) -> list[nn.Module]:
    """Return the outermost modules that a function can see."""
    modules: list[nn.Module] = []
    for value in reachable(function, args, kwargs):
        if isinstance(value, nn.Module) and not _contains(modules, value):
            modules.append(value)
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner]


def _contains(modules: Sequence[nn.Module], module: nn.Module) -> bool:
    return any(module is other for other in modules)  # a module may define ==, so not `in`
